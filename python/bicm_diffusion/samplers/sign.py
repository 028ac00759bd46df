"""SIGN's samplers: an idempotent network applied repeatedly, to its own result or to a noisy copy of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from bicm_diffusion.described import described
from bicm_diffusion.keys import SIGN
from bicm_diffusion.samplers import checks
from bicm_diffusion.samplers.signature import sampler
from bicm_diffusion.schedules.schedule import check_steps
from bicm_kernels import add_noise, fold_in

Integer = int | Tensor


@sampler()
def sign_recursive(model: Callable[[Tensor], Tensor], x: Tensor, *, steps: int = 1) -> Tensor:
    """Return f(f(… f(x))), the recursive sampler of SIGN (Alg. 2).

    model: called as `model(x)` with x (B, …), any floating dtype, and returns such a tensor; it takes no time. The
    result has x's dtype. steps: the number of applications, at least 1. Convergence is not checked, so that the loop
    can be captured.
    Raises ValueError where steps is out of range, and TypeError for arguments of another kind.

    >>> sign_recursive(torch.sign, torch.tensor([[0.3, -2.0]]), steps=2)
    tensor([[ 1., -1.]])
    """
    _check(model, x)
    check_steps(steps)
    for _ in range(steps):
        x = _asked(model, x)
    return x


@sampler()
def sign_masked(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    sigmas: Sequence[float],
    *,
    mask: Tensor | None = None,
    seed: Integer,
    sample_id: Integer = 0,
) -> Tensor:
    """Return the result of SIGN's multistep sampler with editing (Alg. 3).

    x ← f(x')⊙M + x'⊙(1 - M), then for sigma_1 > … > sigma_{N-1}: x ← f(x + sigma_i·n)⊙M + x⊙(1 - M).
    x: x' (B, …), any floating dtype; the result has its dtype. sigmas: the noise levels to apply, falling, each ≥ 0;
    the paper's list of N runs to sigma_N, which it does not use. mask: bool, of the shape of x or broadcast to it: True
    is filled in, False is kept to the bit; None fills in everything. The noise of level i has the key (seed, sample_id,
    i), apart from that of `bicm_kernels.normal` with the same seed.
    Raises TypeError for a mask that is not bool or another argument of another kind, and ValueError for levels that do
    not fall or a mask that does not broadcast.

    >>> kept = torch.tensor([[True, False]])
    >>> sign_masked(torch.sign, torch.tensor([[0.3, -2.0]]), [0.1], mask=kept, seed=0)
    tensor([[ 1., -2.]])
    """
    _check(model, x)
    _check_mask(mask, x)
    sigmas = _numbers(sigmas)
    if any(low >= high for high, low in pairwise(sigmas)) or any(sigma < 0 for sigma in sigmas):
        raise ValueError(f"sigmas: expected falling noise levels of at least 0, got {sigmas}")
    key = fold_in(seed, SIGN)
    x = _filled(_asked(model, x), x, mask)
    for i, sigma in enumerate(sigmas, start=1):
        x = _filled(_asked(model, add_noise(x, sigma, seed=key, step=i, sample_id=sample_id)), x, mask)
    return x


def _filled(new: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    return new if mask is None else torch.where(mask, new, x)


def _asked(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    output = model(x)
    checks.check_output(output, x)
    return output.to(x.dtype)


def _check(model: object, x: object) -> None:
    checks.check_model(model, "model(x)")
    checks.check_state("x", x)


def _check_mask(mask: object, x: Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given = mask.dtype if isinstance(mask, Tensor) else described(mask)
        raise TypeError(f"mask: expected a bool tensor, got {given}")
    fits = zip(reversed(mask.shape), reversed(x.shape), strict=False)
    if mask.dim() > x.dim() or any(size not in (1, whole) for size, whole in fits):
        raise ValueError(f"mask: expected a shape that broadcasts to {tuple(x.shape)}, got {tuple(mask.shape)}")


def _numbers(sigmas: object) -> list[float]:
    try:
        return [float(sigma) for sigma in sigmas]  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise TypeError(f"sigmas: expected noise levels, got {described(sigmas)}") from None
