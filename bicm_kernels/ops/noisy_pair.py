"""One noise at two levels: what consistency training compares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bicm_kernels import reference
from bicm_kernels.ops import arguments
from bicm_kernels.ops.arguments import Integer, Number
from bicm_kernels.ops.library import define, library
from bicm_kernels.ops.preconditioning import PARAMETERIZATIONS

_PAIR = (
    "Tensor x, Tensor sigma_low, Tensor sigma_high, Tensor seed, Tensor step, Tensor sample_id, Tensor? x_hat, "
    "Tensor? mask, Tensor? sigma_data"
)

_ops = torch.ops.bicm_kernels


def _check_noisy_pair(
    x: Any,
    sigma_low: object,
    sigma_high: object,
    key: tuple[object, ...],
    x_hat: Any,
    mask: Any,
    sigma_data: object,
    F: Any,
    sigma_min: object,
    parameterization: object,
) -> None:
    arguments.check_state("x", x)
    arguments.check_number("sigma_low", sigma_low, x)
    arguments.check_number("sigma_high", sigma_high, x)
    if sigma_data is not None:
        arguments.check_number("sigma_data", sigma_data, x)
    arguments.check_key(key[0], key[1], key[2], x.shape[0], x.device)
    if F is None:
        if (x_hat is None) != (mask is None):
            raise ValueError("x_hat and mask go together: mask tells for which samples x_hat takes the place of x")
        if x_hat is None:
            return
        arguments.check_state("x_hat", x_hat, x, "x")
        if x_hat.dtype != x.dtype:
            raise TypeError(f"x_hat must have the dtype of x, {x.dtype}, got {x_hat.dtype}")
    else:
        if x_hat is not None:
            raise ValueError("x_hat and F exclude one another: x_hat is made of F, which is the network's output")
        arguments.check_state("F", F, x, "x")
        arguments.check_number("sigma_min", sigma_min, x)
        if parameterization not in PARAMETERIZATIONS:
            given = ", ".join(PARAMETERIZATIONS)
            raise ValueError(f"parameterization must be one of {given}, got {parameterization!r}")
        if mask is None:
            return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, got {arguments.describe(mask)}")
    if mask.shape != x.shape[:1] or mask.device != x.device:
        raise ValueError(f"mask must have shape ({x.shape[0]},) and lie on {x.device}, got {arguments.describe(mask)}")


def _fake_noisy_pair(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


for _name in ("noisy_pair", "noisy_pair_tracked"):
    define(f"{_name}({_PAIR}) -> (Tensor, Tensor)", ["x", "x_hat"], _fake_noisy_pair)

# What the network generates at the low level takes the place of x: GC's pair without a generated sample in memory.
define(
    "generated_pair(Tensor x, Tensor F, Tensor sigma_low, Tensor sigma_high, Tensor end, Tensor sigma_data, "
    "Tensor seed, Tensor step, Tensor sample_id, Tensor? mask, bool cm, bool scales) -> (Tensor, Tensor)",
    ["x", "F"],
    _fake_noisy_pair,
)

library.impl("noisy_pair_tracked", lambda *args: _ops.noisy_pair.default(*args), "CompositeExplicitAutograd")


def _save_levels(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    _, low, high, _, _, _, _, mask, sigma_data = inputs
    ctx.save_for_backward(low, high, mask, sigma_data)


@arguments.faithful
def _pair_gradient(ctx: Any, low: Tensor, high: Tensor) -> tuple[Tensor | None, ...]:
    sigma_low, sigma_high, mask, sigma_data = ctx.saved_tensors
    compute = torch.float64 if low.dtype == torch.float64 else torch.float32
    one = torch.ones((), dtype=torch.float64)
    plain = arguments.plain_gradient(low) and arguments.plain_gradient(high)
    scales = (
        [one, one] if sigma_data is None else [_scale(sigma, sigma_data, compute) for sigma in (sigma_low, sigma_high)]
    )

    def summed(chosen: Tensor | None) -> Tensor:
        weights = scales if chosen is None else [chosen.to(compute) * scale for scale in scales]
        if plain:
            return _ops.affine_step.tensor([low, high], weights, None, None, None, None, None)
        return reference.affine_step([low, high], weights)

    x = summed(None if mask is None else ~mask) if ctx.needs_input_grad[0] else None
    x_hat = summed(mask) if ctx.needs_input_grad[6] else None
    return x, *[None] * 5, x_hat, None, None


def _scale(sigma: Tensor, sigma_data: Tensor, compute: torch.dtype) -> Tensor:
    """c_in as the forward pass formed it, 0-d or (B,): on the host where both numbers are, so that nothing waits."""
    return reference.c_in(sigma.to(compute), sigma_data.to(compute))


torch.library.register_autograd(
    "bicm_kernels::noisy_pair_tracked", _pair_gradient, setup_context=_save_levels, lib=library
)


def noisy_pair(
    x: Tensor,
    sigma_low: Number,
    sigma_high: Number,
    *,
    seed: Integer,
    step: Integer,
    sample_id: Integer = 0,
    x_hat: Tensor | None = None,
    mask: Tensor | None = None,
    sigma_data: Number | None = None,
    F: Tensor | None = None,
    parameterization: str = "bcm",
    sigma_min: Number = 0.002,
) -> tuple[Tensor, Tensor]:
    """One noise at two levels, (x + sigma_low n, x + sigma_high n): the pair that consistency training compares.

    Args:
        x: clean samples (B, ...), float16, bfloat16, float32 or float64, any strides.
        sigma_low, sigma_high: noise levels; float, 0-d or (B,) tensor. A level of exactly 0 adds nothing.
        seed, step, sample_id: the noise's key, see ``normal``. Without another step, training would see one noise
            again and again.
        x_hat: generated samples like x that take its place where ``mask`` is true (GC eq. 21, Alg. 1).
        mask: (B,) bool tensor.
        sigma_data: standard deviation of the data. Where it is given, both are multiplied by c_in of their level, as
            networks take them (EDM; BCM eq. 20); ``denoise`` and ``consistency_loss`` go on from there with
            ``scaled=True``, and the samples that are not scaled need not exist.
        F: instead of x_hat, the network's output on x + sigma_low n, with the noise of this key: like x, of any
            floating dtype. x_hat = c_skip (x + sigma_low n) + c_out F, formed in the compute type and never stored
            (GC eq. 13-15); everywhere without a mask. Rows that the mask leaves out are not read.
        parameterization, sigma_min: of the network that gave F, as for ``denoise``; its sigma_data is the one above,
            or 0.5.

    Returns:
        Two tensors in the dtype and layout of x. Differentiable in x and x_hat through the fused kernel; in the
        levels, in x and F where F is given, and twice, through the reference.

    Raises:
        TypeError, ValueError: an argument has another type, shape, device or range.

    >>> import torch, bicm_kernels as bk
    >>> low, high = bk.noisy_pair(torch.zeros(2, 3), 1.0, 2.0, seed=1, step=0); torch.equal(2 * low, high)
    True
    """
    arguments.check_vmap(seed)
    key = (arguments.signed(seed) if type(seed) is int else seed, step, sample_id)

    def check() -> None:
        _check_noisy_pair(x, sigma_low, sigma_high, key, x_hat, mask, sigma_data, F, sigma_min, parameterization)

    try:
        tracked = arguments.requires_grad(sigma_low, sigma_high, sigma_data)
        if F is not None:
            tracked = tracked or arguments.requires_grad(x, F, sigma_min)
        fallback = arguments.needs_reference(x, tracked=tracked)
        if fallback or x_hat is not None or mask is not None or F is not None or arguments.unseen(x):
            check()
        if fallback:
            return reference.noisy_pair(
                x,
                sigma_low,
                sigma_high,
                seed=seed,
                step=step,
                sample_id=sample_id,
                x_hat=x_hat,
                mask=mask,
                sigma_data=sigma_data,
                F=F,
                parameterization=parameterization,
                sigma_min=sigma_min,
            )
        levels = [arguments.coefficient(level) for level in (sigma_low, sigma_high)]
        if F is not None:
            end = 0.0 if parameterization == "edm" else sigma_min
            numbers = arguments.coefficients((end, 0.5 if sigma_data is None else sigma_data))
            flags = (mask, parameterization == "cm", sigma_data is not None)
            return _ops.generated_pair.default(x, F, *levels, *numbers, *arguments.key(*key, x), *flags)
        op = _ops.noisy_pair_tracked if arguments.requires_grad(x, x_hat) else _ops.noisy_pair
        data = None if sigma_data is None else arguments.coefficient(sigma_data)
        return op.default(x, *levels, *arguments.key(*key, x), x_hat, mask, data)
    except arguments.FAILURES as error:
        arguments.explain(error, check)
