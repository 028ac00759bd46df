"""The levels of a batch in consistency training, drawn from a table by a key."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bicm_diffusion.consistency.grid import LevelTable, drawn, partner_probabilities
from bicm_diffusion.described import described
from bicm_diffusion.keys import LEVELS, PARTNERS
from bicm_diffusion.samplers.checks import check_integer
from bicm_kernels import fold_in, uniform


class Levels(NamedTuple):
    """Levels of a batch, each (B,) float64: `low` is t_n, `high` its neighbour t_{n+1}, `partner` t_n' (BCM eq. 9)."""

    low: Tensor
    high: Tensor
    partner: Tensor


def draw_levels(
    table: LevelTable, batch: int, *, seed: int | Tensor, step: int | Tensor, sample_id: int | Tensor = 0
) -> Levels:
    """Return the levels of a batch: n ~ p(n), n' ~ p̃(n'|n), keyed by (seed, sample, step).

    Raises TypeError for no `LevelTable`.

    >>> from bicm_diffusion import karras_levels
    >>> levels = draw_levels(LevelTable(karras_levels(11)), 4, seed=0, step=0)
    >>> bool((levels.low < levels.high).all() and (levels.low != levels.partner).all())
    True
    """
    if not isinstance(table, LevelTable):
        raise TypeError(
            f"table: expected a LevelTable, got {described(table)}; LevelTable(karras_levels(N)) makes one of N levels"
        )
    check_integer("batch", batch)
    first, second = (
        uniform((batch, 1), seed=fold_in(seed, purpose), step=step, sample_id=sample_id, dtype=torch.float64)[:, 0]
        for purpose in (LEVELS, PARTNERS)
    )
    n = drawn(table.probabilities, first)
    partner = drawn(partner_probabilities(table.probabilities, n), second)
    return Levels(table.levels[n], table.levels[n + 1], table.levels[partner])
