"""Bidirectional consistency training: the loss of one batch, on fused ops, from keyed draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bicm_diffusion.consistency.frozen import asked, check_network, evaluate_frozen
from bicm_diffusion.consistency.grid import LevelTable, drawn, partner_probabilities
from bicm_diffusion.consistency.shared_draws import draws_alike, dropout_key
from bicm_diffusion.described import described
from bicm_diffusion.keys import LEVELS, PARTNERS
from bicm_diffusion.samplers.checks import check_arguments, check_integer, check_model, check_output, check_state
from bicm_diffusion.schedules.karras import T_MIN
from bicm_kernels import (
    affine_step,
    consistency_loss,
    denoise,
    fold_in,
    noisy_pair,
    scale_input,
    uniform,
)

TARGETS = ("shared", "direct")
MADE = "Levels, as draw_levels returns"
#: By how much of itself a table's smallest level may miss t_min: float32 rounds by less.
NEAR = 1e-6


class Levels(NamedTuple):
    """Levels of a batch, each (B,) float64: `low` is t_n, `high` its neighbour t_{n+1}, `partner` t_n' (BCM eq. 9)."""

    low: Tensor
    high: Tensor
    partner: Tensor


class DrawnLevels(Levels):
    """Levels that know the smallest one of the table that they were drawn from."""

    smallest: float | None = None


@dataclass(frozen=True)
class BctLoss:
    """The two terms of the loss, each a mean over the batch; `total` is their sum, which training minimises."""

    consistency: Tensor
    trajectory: Tensor

    @property
    def total(self) -> Tensor:
        """Return the sum, which training minimises."""
        return self.consistency + self.trajectory

    @property
    def terms(self) -> dict[str, Tensor]:
        """Return the terms by name."""
        return {"consistency": self.consistency, "trajectory": self.trajectory}


def draw_levels(table: LevelTable, batch: int, *, seed: int, step: int, sample_id: int = 0) -> Levels:
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
    levels = DrawnLevels(table.levels[n], table.levels[n + 1], table.levels[partner])
    if table.levels.is_cpu:
        levels.smallest = float(table.levels[0])
    return levels


def bct_loss(
    network: nn.Module,
    x: Tensor,
    levels: Levels,
    *,
    seed: int | Tensor,
    step: int | Tensor,
    sample_id: int | Tensor = 0,
    extra_args: Mapping[str, Any] | None = None,
    c: float | None = None,
    sigma_data: float = 0.5,
    t_min: float = T_MIN,
    target: str = "shared",
    gradient: str = "forward",
) -> BctLoss:
    """Return the BCT loss of a batch (BCM eq. 9, Alg. 1), f = denoise(x, F, t, u) with the bcm parameterisation:

    consistency: d(f(x_{n+1}, t_{n+1}, t_min), sg f(x_n, t_n, t_min)) / (t_{n+1} - t_n), the same noise in both;
    trajectory:  d(f̄(f(x_n, t_n, t_n'), t_n', t_min), sg f(x_n, t_n, t_min)) / |t_n - t_n'|.

    f̄ has frozen parameters, yet gradients flow through its input; the target is evaluated once for both terms.
    All evaluations share their dropout mask, keyed by (seed, step) apart from the noise.

    network: called as network(c_in(t)·x, t, u, **extra_args) -> (B, …), with t and u (B,) in x's precision.
    x: clean samples (B, …), floating. levels: from `draw_levels`, on a table that begins at t_min; partner differs from
        low.
    c: the distance's constant; None means 0.00054·√d. seed, step, sample_id: the key, see `bicm_kernels.normal`.
    target: "shared", or "direct" for the ablation of BCM eq. 7, which is known to fail: there the trajectory
        term's target is sg f(x_n', t_n', t_min).
    gradient: "forward" or "backward", see `bicm_kernels.pseudo_huber`: the same bits for an upstream of a power of
        two; "backward" has second derivatives.
    Raises TypeError for arguments of another kind and for a network in DataParallel, in FSDP1, or with a
    DistributedDataParallel inside that notes which parameters are used; ValueError for another target, gradient or
    shape, and for levels that do not begin at t_min, as far as the host can tell.
    """
    check_model(network, "network(c_in(t)·x, t, u)", "network")
    check_network(network)
    check_state("x", x)
    check_levels(levels, x, Levels._fields)
    levels = levels if isinstance(levels, Levels) else Levels(*levels[:3])
    check_floor(levels, t_min)
    check_arguments("extra_args", extra_args)
    if target not in TARGETS:
        raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {target!r}")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    low, high, partner = (level.to(device=x.device, dtype=dtype) for level in levels)
    gap, leap = levels.high - levels.low, (levels.low - levels.partner).abs()
    end = torch.full_like(low, t_min)
    alike = draws_alike(dropout_key(seed, step), x.device)

    def evaluate(scaled: Tensor, t: Tensor, u: Tensor) -> Tensor:
        with alike():
            output = asked(network, scaled, t, u, **(extra_args or {}))
        check_output(output, x, name="network")
        return output

    # Only c_in x_t is ever stored: what the network takes is all that the rest needs.
    noise: dict[str, Any] = {"seed": seed, "step": step, "sample_id": sample_id}
    x_low, x_high = noisy_pair(x, low, high, **noise, sigma_data=sigma_data)
    scaled: dict[str, Any] = {"scaled": True, "sigma_data": sigma_data}
    with torch.no_grad():
        goal = denoise(x_low, evaluate(x_low, low, end), low, t_min, **scaled)
    options: dict[str, Any] = {"c": c, "sigma_min": t_min, "gradient": gradient, **scaled}
    output = evaluate(x_high, high, end)
    consistency = consistency_loss(
        x_high, output, high, None, goal, weight=gap.reciprocal().to(x.device, dtype), **options
    )

    if target == "direct":
        x_partner, _ = noisy_pair(x, partner, low, **noise, sigma_data=sigma_data)
        with torch.no_grad():
            goal = denoise(x_partner, evaluate(x_partner, partner, end), partner, t_min, **scaled)
    moved, same = _Leap.apply(evaluate(x_low, low, partner), x_low, low, partner, sigma_data)
    with alike():
        output = evaluate_frozen(network, (same, partner, end), extra_args or {})
    trajectory = consistency_loss(
        moved, output, partner, None, goal, weight=leap.reciprocal().to(x.device, dtype), **options
    )
    return BctLoss(consistency, trajectory)


def check_levels(levels: object, x: Tensor, names: Sequence[str], *, name: str = "levels", made: str = MADE) -> None:
    """Raise unless there are tensors (B,) of these names, as x has B samples; made: what is expected."""
    given = levels if isinstance(levels, tuple | list) else ()
    if len(given) < len(names) or not all(isinstance(level, Tensor) for level in given):
        raise TypeError(f"{name}: expected {made} them, got {described(levels)}")
    for label, level in zip(names, given, strict=False):
        if level.shape != x.shape[:1]:
            raise ValueError(f"{name}: expected {label} of shape ({len(x)},), as x has, got {tuple(level.shape)}")


def check_floor(levels: Sequence[Tensor], t_min: float) -> None:
    """Raise ValueError where levels do not begin at t_min: the table's smallest, or any that is below, on the CPU.

    levels: those of a batch, and the smallest of their table where they were drawn from one.
    """
    if torch.compiler.is_compiling():
        return
    smallest = getattr(levels, "smallest", None)
    if smallest is None:
        host = [level for level in levels if type(level) is Tensor and level.is_cpu and level.numel()]
        smallest = min((float(level.detach().min()) for level in host), default=t_min)
        wrong = smallest < t_min * (1 - NEAR)
    else:
        wrong = abs(smallest - t_min) > NEAR * max(smallest, t_min)
    if wrong:
        raise ValueError(
            f"levels: expected them to begin at t_min = {t_min:.6g}, got {smallest:.6g}; give the loss and "
            "karras_levels one t_min"
        )


class _Leap(torch.autograd.Function):
    """c_in(u) denoise(x_t, F, t, u) of c_in(t) x_t, twice: the gradients of both uses meet in one pass."""

    @staticmethod
    def forward(ctx: Any, F: Tensor, x: Tensor, t: Tensor, u: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
        one, zero = torch.ones_like(t)[:, None], torch.zeros_like(t)[:, None]
        c_in = scale_input(one, u, sigma_data=sigma_data)
        pairs = (one, zero), (zero, one)
        # c_in(u) c_skip and c_in(u) c_out.
        weights = [(c_in * denoise(*pair, t, u, sigma_data=sigma_data, scaled=True))[:, 0] for pair in pairs]
        ctx.save_for_backward(*weights)
        ctx.dtypes = x.dtype, F.dtype
        moved = affine_step([x, F], weights)
        return moved, moved.view_as(moved)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, F = (
            affine_step(gradients, [weight, weight]).to(dtype) if needed else None
            for weight, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[1::-1], strict=True)
        )
        return F, x, None, None, None
