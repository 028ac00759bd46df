"""Bidirectional consistency training: the loss of one batch, on fused ops, from keyed draws."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bicm_diffusion.consistency.frozen import asked, check_network, evaluate_frozen
from bicm_diffusion.consistency.levels import Levels, check_floor, check_levels
from bicm_diffusion.consistency.shared_draws import draws_alike, dropout_key
from bicm_diffusion.objectives.evaluation import noise_key
from bicm_diffusion.samplers.checks import check_arguments, check_level, check_model, check_output, check_state
from bicm_diffusion.schedules.karras import T_MIN
from bicm_kernels import affine_step, consistency_loss, denoise, denoised_step, noisy_pair, scale_input

CHOICES = {"target": ("shared", "direct"), "leap": ("low", "high")}


@dataclass(frozen=True)
class BctLoss:
    """The two terms of the loss, each a mean over the batch; `total` is their sum, to be minimised."""

    consistency: Tensor
    trajectory: Tensor

    @property
    def total(self) -> Tensor:
        """Return the sum, to be minimised."""
        return self.consistency + self.trajectory

    @property
    def terms(self) -> dict[str, Tensor]:
        """Return the terms by name."""
        return {"consistency": self.consistency, "trajectory": self.trajectory}


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
    leap: str = "low",
    per_root: bool = False,
    gradient: str = "auto",
) -> BctLoss:
    """Return the BCT loss of a batch (BCM eq. 9, Alg. 1), f = denoise(x, F, t, u) with the bcm parameterisation:

    consistency: d(f(x_{n+1}, t_{n+1}, t_min), sg f(x_n, t_n, t_min)) / (t_{n+1} - t_n), the same noise in both;
    trajectory:  d(f̄(f(x_n, t_n, t_n'), t_n', t_min), sg f(x_n, t_n, t_min)) / |t_n - t_n'|.

    f̄ has frozen parameters but is differentiated in its input; the target is evaluated once for both terms.
    All evaluations share their dropout mask, keyed by (seed, step, first sample) with another purpose than the noise.

    network: called as network(c_in(t)·x, t, u, **extra_args) -> (B, …), with t and u (B,) in x's precision.
    x: clean samples (B, …), floating. levels: from `draw_levels`, on a table that begins at t_min; partner differs from
        low.
    sigma_data: σ_d, the standard deviation of the data. t_min: the lowest level, at which f is the sample itself.
    c: the distance's constant; None means 0.00054·√d. seed, step, sample_id: the key, see `bicm_kernels.normal`.
    target: "shared", or "direct" for the ablation of BCM eq. 7, which is known to fail: with it the trajectory
        term's target is sg f(x_n', t_n', t_min).
    leap: "low", or "high" for a trajectory term that starts one level higher, d(f̄(f(x_{n+1}, t_{n+1}, t_n'), t_n',
        t_min), sg f(x_n, t_n, t_min)) / |t_n - t_n'|. per_root: whether distances are divided by √d. The authors'
        released ImageNet-64 weights were trained with leap="high", per_root=True and c=0.06.
    gradient: "auto", "forward" or "backward", see `bicm_kernels.pseudo_huber`: the same bits for an upstream of a power
        of two; "forward" has no second derivatives.
    Raises TypeError for arguments of another kind and for a network in DataParallel, in FSDP1, or with a
    DistributedDataParallel inside that records which parameters are used; ValueError for another target, leap,
    gradient or shape. Warns of levels that do not begin at t_min, if they are on the host.

    >>> from bicm_diffusion import LevelTable, draw_levels, karras_levels
    >>> x, levels = torch.zeros(4, 2), draw_levels(LevelTable(karras_levels(11)), 4, seed=0, step=0)
    >>> sorted(bct_loss(lambda x, t, u: x, x, levels, seed=0, step=0).terms)
    ['consistency', 'trajectory']
    """
    check_model(network, "network(c_in(t)·x, t, u)", "network")
    check_network(network)
    check_state("x", x)
    check_level("sigma_data", sigma_data)
    check_level("t_min", t_min, zero=True)
    check_levels(levels, x, Levels._fields, made="Levels, as draw_levels returns")
    if not getattr(levels, "has_partners", True):
        raise ValueError("levels: expected a table of at least 3 levels, of which one is a partner, got 2")
    levels = levels if isinstance(levels, Levels) else Levels(*levels[:3])
    check_floor(levels, t_min)
    check_arguments("extra_args", extra_args)
    for name, choice in (("target", target), ("leap", leap)):
        if choice not in CHOICES[name]:
            raise ValueError(f"{name}: expected one of {', '.join(CHOICES[name])}, got {choice!r}")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    low, high, partner = (level.to(device=x.device, dtype=dtype) for level in levels)
    gaps = levels.high - levels.low, (levels.low - levels.partner).abs()
    if per_root and len(x):
        gaps = gaps[0] * math.sqrt(x[0].numel()), gaps[1] * math.sqrt(x[0].numel())
    near, far = (gap.reciprocal().to(x.device, dtype) for gap in gaps)
    end = torch.full_like(low, t_min)
    alike = draws_alike(dropout_key(seed, step, sample_id), x.device)

    def evaluate(scaled: Tensor, t: Tensor, u: Tensor) -> Tensor:
        with alike():
            output = asked(network, (scaled, t, u), extra_args or {})
        check_output(output, x, name="network")
        return output

    # Only c_in x_t is stored: the other computations use the network's input.
    noise = noise_key(x, seed, step, sample_id)
    x_low, x_high = noisy_pair(x, low, high, **noise, sigma_data=sigma_data)
    scaled: dict[str, Any] = {"scaled": True, "sigma_data": sigma_data}
    with torch.no_grad():
        goal = denoise(x_low, evaluate(x_low, low, end), low, t_min, **scaled)
    options: dict[str, Any] = {"c": c, "sigma_min": t_min, "gradient": gradient, **scaled}
    output = evaluate(x_high, high, end)
    consistency = consistency_loss(x_high, output, high, None, goal, weight=near, **options)

    if target == "direct":
        x_partner, _ = noisy_pair(x, partner, low, **noise, sigma_data=sigma_data)
        with torch.no_grad():
            goal = denoise(x_partner, evaluate(x_partner, partner, end), partner, t_min, **scaled)
    x_start, start = (x_low, low) if leap == "low" else (x_high, high)
    moved, given = _Leap.apply(evaluate(x_start, start, partner), x_start, start, partner, sigma_data)
    with alike():
        output = evaluate_frozen(network, (given, partner, end), extra_args or {})
    trajectory = consistency_loss(moved, output, partner, None, goal, weight=far, **{**options, "scaled": False})
    return BctLoss(consistency, trajectory)


class _Leap(torch.autograd.Function):
    """x = denoise(x_t, F, t, u) of c_in(t) x_t, and c_in(u) x: the gradients of both are combined in one pass.

    x itself, by the op of the target, because both are the same bits where u is t_min and t is the target's level: the
    distance is 0 there, as in eager code. From c_in(u) x, the difference would be a rounding, whose direction is noise.
    """

    @staticmethod
    def forward(ctx: Any, F: Tensor, x: Tensor, t: Tensor, u: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
        one, zero = torch.ones_like(t)[:, None], torch.zeros_like(t)[:, None]
        c_in = scale_input(one, u, sigma_data=sigma_data)[:, 0]
        pairs = (one, zero), (zero, one)
        # c_skip and c_out, by which denoise itself multiplies.
        weights = [denoise(*pair, t, u, sigma_data=sigma_data, scaled=True)[:, 0] for pair in pairs]
        ctx.save_for_backward(*weights, c_in)
        ctx.dtypes = x.dtype, F.dtype
        given, moved, _ = denoised_step([x, F], weights, [0.0, 0.0], x0_weight=c_in)
        return moved, given

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *weights, c_in = ctx.saved_tensors
        x, F = (
            affine_step(gradients, [weight, weight * c_in]).to(dtype) if needed else None
            for weight, dtype, needed in zip(weights, ctx.dtypes, ctx.needs_input_grad[1::-1], strict=True)
        )
        return F, x, None, None, None
