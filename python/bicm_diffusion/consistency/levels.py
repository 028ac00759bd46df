"""The levels of a batch in consistency training, drawn from a table by a key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bicm_diffusion.consistency.grid import LevelTable, drawn, partner_probabilities
from bicm_diffusion.described import described
from bicm_diffusion.keys import LEVELS, PARTNERS, device_of
from bicm_diffusion.samplers.checks import check_batch
from bicm_diffusion.samplers.notices import warn
from bicm_kernels import fold_in, uniform

#: The relative tolerance between a table's smallest level and t_min: float32 rounds by less.
NEAR = 1e-6


class Levels(NamedTuple):
    """Levels of a batch, each (B,) float64: `low` is t_n, `high` the next one t_{n+1}, `partner` t_n' (BCM eq. 9)."""

    low: Tensor
    high: Tensor
    partner: Tensor


class DrawnLevels(Levels):
    """Levels with the smallest level of their table, and whether it has partners: it needs three levels."""

    smallest: float | None = None
    has_partners: bool = True


def draw_levels(
    table: LevelTable, batch: int, *, seed: int | Tensor, step: int | Tensor, sample_id: int | Tensor = 0
) -> Levels:
    """Return the levels of a batch: n ~ p(n), n' ~ p̃(n'|n), keyed by (seed, sample, step).

    They are on the device of sample_id where that is no host tensor, otherwise on the table's. Of two levels `partner`
    is the low one, which `bct_loss` refuses.
    Raises TypeError unless table is a `LevelTable`.

    >>> from bicm_diffusion import karras_levels
    >>> levels = draw_levels(LevelTable(karras_levels(11)), 4, seed=0, step=0)
    >>> bool((levels.low < levels.high).all() and (levels.low != levels.partner).all())
    True
    """
    if not isinstance(table, LevelTable):
        raise TypeError(
            f"table: expected a LevelTable, got {described(table)}; LevelTable(karras_levels(N)) makes one of N levels"
        )
    check_batch(batch)
    device = device_of(seed, step, sample_id, default=table.levels.device)
    ids = sample_id.to(device) if isinstance(sample_id, Tensor) else sample_id
    first, second = (
        uniform((batch, 1), seed=fold_in(seed, purpose), step=step, sample_id=ids, dtype=torch.float64, device=device)
        for purpose in (LEVELS, PARTNERS)
    )
    values, probabilities = table.levels.to(device), table.probabilities.to(device)
    n = drawn(probabilities, first[:, 0])
    partner = drawn(partner_probabilities(probabilities, n), second[:, 0]) if len(probabilities) > 1 else n
    levels = DrawnLevels(values[n], values[n + 1], values[partner])
    levels.has_partners = len(probabilities) > 1
    if table.levels.is_cpu:
        levels.smallest = float(table.levels[0])
    return levels


def check_levels(levels: object, x: Tensor, names: Sequence[str], *, name: str = "levels", made: str) -> None:
    """Raise unless there are tensors (B,) of these names, as x has B samples; made: the expected type, for messages."""
    given = levels if isinstance(levels, tuple | list) else ()
    if len(given) < len(names) or not all(isinstance(level, Tensor) for level in given):
        raise TypeError(f"{name}: expected {made} them, got {described(levels)}")
    for label, level in zip(names, given, strict=False):
        if level.shape != x.shape[:1]:
            raise ValueError(f"{name}: expected {label} of shape ({len(x)},), as x has, got {tuple(level.shape)}")
    if not (isinstance(levels, DrawnLevels) or torch.compiler.is_compiling()):
        _check_order(dict(zip(names, given, strict=False)), name)


def _check_order(levels: dict[str, Tensor], name: str) -> None:
    """Raise ValueError where levels on the host are out of order: the loss of a negative gap would be maximised."""
    values = {label: _on_host(level) for label, level in levels.items()}
    if any(value is None for value in values.values()):
        return
    for lower, upper in (("low", "high"), ("r", "t")):
        if lower in values and not (values[lower] < values[upper]).all():
            raise ValueError(f"{name}: expected {lower} < {upper} for every sample, got another order")
    if "partner" in values and (values["partner"] == values["low"]).any():
        raise ValueError(f"{name}: expected partner other than low for every sample")


def _on_host(level: Tensor) -> Any:
    """The numbers of a plain float tensor on the host as a NumPy array, which compares ten times faster; else None."""
    if type(level) is not Tensor or not level.is_cpu or level.dtype not in (torch.float32, torch.float64):
        return None
    try:
        return level.detach().numpy()
    except RuntimeError:  # under a transform
        return None


def check_floor(levels: Sequence[Tensor], t_min: float) -> None:
    """Warn where levels do not begin at t_min: the table's smallest, or any below it, on the CPU.

    levels: those of a batch, and the smallest of their table where they were drawn from one.
    """
    if torch.compiler.is_compiling():
        return
    smallest = getattr(levels, "smallest", None)
    if smallest is None:
        host = [value for value in map(_on_host, levels) if value is not None and value.size]
        smallest = min((float(value.min()) for value in host), default=t_min)
        wrong = smallest < t_min * (1 - NEAR)
    else:
        wrong = abs(smallest - t_min) > NEAR * max(smallest, t_min)
    if wrong:
        warn(
            f"levels: expected them to begin at t_min = {t_min:.6g}, got {smallest:.6g}; give the loss and "
            "karras_levels one t_min",
            UserWarning,
        )
