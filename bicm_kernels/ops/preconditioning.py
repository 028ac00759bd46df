"""Preconditioning of networks: f(x, t, u) = c_skip x + c_out F(c_in x)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bicm_kernels import reference
from bicm_kernels.ops import arguments, checks
from bicm_kernels.ops.arguments import Integer, Number
from bicm_kernels.ops.library import define
from bicm_kernels.ops.multistep import affine_gradient
from bicm_kernels.ops.op import Op
from bicm_kernels.reference.preconditioning import c_skip_c_out

_ops = torch.ops.bicm_kernels

PARAMETERIZATIONS = ("bcm", "cm", "edm")


def _plain_denoise(*, u: Any, cm: bool, **named: Any) -> Tensor:
    return reference.denoise(u=None if cm else u, sigma_min=u, parameterization="cm" if cm else "bcm", **named)


def _plain_renoise(*, u: Any, cm: bool, **named: Any) -> tuple[Tensor, Tensor]:
    return reference.renoise(u=None if cm else u, sigma_min=u, parameterization="cm" if cm else "bcm", **named)


# Ops with a derivative are separate, because autograd registration doubles the cost of every call.
SCALE_INPUT = Op("scale_input", ("x",), numbers=("t", "sigma_data"), differentiable=True)
DENOISE = Op(
    "denoise",
    ("x", "F"),
    numbers=("t", "u", "sigma_data"),
    flags=("bool cm", "bool scaled"),
    differentiable=True,
    plain=_plain_denoise,
)
RENOISE = Op(
    "renoise",
    ("x", "F"),
    numbers=("t", "u", "sigma", "next_sigma", "sigma_data"),
    flags=("bool cm",),
    noise="sigma",
    outs=("x_s", "scaled"),
    differentiable=True,
    plain=_plain_renoise,
)
define(
    "denoise_gradient(Tensor gradient, Tensor? t, Tensor? u, Tensor? sigma_data, bool cm, bool scaled, bool in_F, "
    "ScalarType dtype) -> Tensor",
    ["gradient"],
    lambda gradient, *rest: gradient.new_empty(gradient.shape, dtype=rest[-1]),
)


def _save_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


@arguments.faithful
def _input_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    t, sigma_data = ctx.saved_tensors
    step = _ops.scale_input.tensor if arguments.plain_gradient(gradient) else _reference_scale
    return step(gradient, t, sigma_data), None, None


def _reference_scale(x: Tensor, t: Tensor, sigma_data: Tensor) -> Tensor:
    return reference.scale_input(x, t, sigma_data=sigma_data)  # type: ignore[arg-type]


def _save_denoise(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, F, t, u, sigma_data, *flags = inputs
    ctx.save_for_backward(t, u, sigma_data)
    ctx.network_dtype, ctx.flags = F.dtype, flags


@arguments.faithful
def _denoise_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    t, u, sigma_data = ctx.saved_tensors
    plain = arguments.plain_gradient(gradient)
    gradients: list[Tensor | None] = [None, None]
    for k, dtype in enumerate((gradient.dtype, ctx.network_dtype)):
        if ctx.needs_input_grad[k]:
            function: Any = _ops.denoise_gradient.default if plain else reference.denoise_gradient
            gradients[k] = function(gradient, t, u, sigma_data, *ctx.flags, k == 1, dtype)
    return *gradients, None, None, None, None, None


def _save_renoise(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    _, F, t, u, _, next_sigma, sigma_data, cm, *_ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(t, u, next_sigma, sigma_data)
    ctx.network_dtype, ctx.cm = F.dtype, cm


@arguments.faithful
def _renoise_gradient(ctx: Any, of_x_s: Tensor | None, of_scaled: Tensor | None) -> tuple[Tensor | None, ...]:
    """In x, c_skip (g + c_in h), and in F, c_out (g + c_in h): affine maps of the gradients g and h, in one pass."""
    incoming = [g for g in (of_x_s, of_scaled) if g is not None]
    gradients: list[Tensor | None] = [None, None]
    if incoming:
        wanted = [k for k in range(2) if ctx.needs_input_grad[k]]
        dtypes = (incoming[0].dtype, ctx.network_dtype)
        weights = _renoise_weights(ctx, dtypes, of_x_s is not None, of_scaled is not None)
        at_once = len(wanted) == 2 and dtypes[0] == dtypes[1]
        if at_once and all(map(arguments.plain_gradient, incoming)):
            zero = arguments.coefficient(0.0)
            rest = (None, zero, None, None, None, None, None, None)
            gradients = [*_ops.denoised_step.tensor(incoming, weights[1], weights[0], *rest)[:2]]
        else:
            for k in wanted:
                # Rounded once, in F's dtype, as the derivative of `denoise` is.
                wide = [g.to(torch.promote_types(g.dtype, dtypes[k])) for g in incoming]
                gradients[k] = affine_gradient(wide, weights[k]).to(dtypes[k])
    return *gradients, *[None] * 9


def _renoise_weights(ctx: Any, dtypes: Sequence[torch.dtype], plain: bool, scaled: bool) -> list[list[Tensor]]:
    """The weights of incoming gradients, for x and for F: 0-d or (B,), on the host if all numbers are."""
    compute = torch.float64 if torch.float64 in dtypes else torch.float32
    t, u, next_sigma, sigma_data = (x.to(compute) for x in ctx.saved_tensors)
    scale = reference.c_in(next_sigma, sigma_data)
    outward = c_skip_c_out(t, u, sigma_data, u, "cm" if ctx.cm else "bcm")
    return [[weight] * plain + [weight * scale] * scaled for weight in outward]


DENOISE.differentiate(_denoise_gradient, _save_denoise)
RENOISE.differentiate(_renoise_gradient, _save_renoise)
SCALE_INPUT.differentiate(_input_gradient, _save_input)


def target_level(parameterization: str, u: Number | None, sigma_min: Number) -> Number:
    """The target level of a denoiser: u, or the parameterisation's smallest level."""
    if parameterization not in PARAMETERIZATIONS:
        raise ValueError(f"parameterization must be one of {', '.join(PARAMETERIZATIONS)}, got {parameterization!r}")
    if u is not None and parameterization != "bcm":
        given = checks.describe(u)
        raise ValueError(f"u must be None for parameterization={parameterization!r}: only 'bcm' takes it, got {given}")
    if parameterization == "edm":
        return 0.0
    return sigma_min if u is None else u


def scale_input(x: Tensor, t: Number, *, sigma_data: float = 0.5) -> Tensor:
    """The network's input, c_in(t) x with c_in = 1/sqrt(sigma_data^2 + t^2) (EDM; BCM eq. 20).

    Args:
        x: noisy sample (B, ...), float16, bfloat16, float32 or float64, any strides.
        t: its noise level, >= 0; float, 0-d or (B,) tensor.
        sigma_data: standard deviation of the data.

    Returns:
        A tensor in the dtype and layout of x.

    Raises:
        TypeError, ValueError: an argument has another type, shape or device.

    >>> import torch, bicm_kernels as bk
    >>> bk.scale_input(torch.ones(1, 2), 0.0)
    tensor([[2., 2.]])
    """
    return SCALE_INPUT.call(x, t, sigma_data)


def denoise(
    x: Tensor,
    F: Tensor,
    t: Number,
    u: Number | None = None,
    *,
    parameterization: str = "bcm",
    sigma_data: float = 0.5,
    sigma_min: float = 0.002,
    scaled: bool = False,
) -> Tensor:
    """The denoised sample, c_skip x + c_out F, in one pass; for ``bcm`` the sample moved from level t to level u.

    Args:
        x: sample at level t, (B, ...), any floating dtype and strides.
        F: the network's output, like x, any floating dtype.
        t: noise level, >= 0; float, 0-d or (B,) tensor.
        u: target level, only for ``bcm``; float, 0-d or (B,) tensor. None means sigma_min for ``bcm``; ``cm``
            goes to sigma_min and ``edm`` to 0.
        parameterization: ``bcm`` (BCM eq. 20, 39, 43), ``cm`` (BCM eq. 17) or ``edm``.
        sigma_data: standard deviation of the data.
        sigma_min: the smallest level, the target of ``cm`` and of ``bcm`` without u.
        scaled: x is the network's input, c_in(t) times the sample, as ``noisy_pair`` and ``renoise`` return it.

    Returns:
        A tensor in the dtype and layout of x. Differentiable in x and F through the fused kernel, in t and u, and
        twice, through the reference.

    Raises:
        TypeError, ValueError: an argument has another type, shape, device or name.

    >>> import torch, bicm_kernels as bk
    >>> bk.denoise(torch.ones(1, 2), torch.ones(1, 2), 3.0, 3.0)
    tensor([[1., 1.]])
    """
    target = target_level(parameterization, u, sigma_min)
    scaled = scaled if type(scaled) is bool else checks.flag("scaled", scaled)
    return DENOISE.call(x, F, t, target, sigma_data, parameterization == "cm", scaled)


def renoise(
    x: Tensor,
    F: Tensor,
    t: Number,
    u: Number | None,
    sigma: Number,
    *,
    next_sigma: Number | None = None,
    seed: Integer,
    step: Integer = 0,
    sample_id: Integer = 0,
    parameterization: str = "bcm",
    sigma_data: float = 0.5,
    sigma_min: float = 0.002,
) -> tuple[Tensor, Tensor]:
    """Zigzag sampling in one pass: x_s = denoise(x, F, t, u) + sigma n, and c_in(next_sigma) x_s (BCM Alg. 3).

    Args:
        x, F, t, u, parameterization, sigma_data, sigma_min: as for ``denoise``.
        sigma: level of the fresh noise; a sample whose sigma is exactly 0 draws nothing.
        next_sigma: level at which the network is evaluated next; None means sigma.
        seed, step, sample_id: the noise's key, see ``normal``.

    Returns:
        (x_s, scaled input of the next evaluation), both in the dtype and layout of x. Differentiable in x and F through
        fused kernels, in the levels, and twice, through the reference.

    Raises:
        TypeError, ValueError: an argument has another type, shape, device, range or name.

    >>> import torch, bicm_kernels as bk
    >>> x_s, scaled = bk.renoise(torch.ones(1, 2), torch.ones(1, 2), 3.0, 3.0, 0.0, seed=0); scaled
    tensor([[2., 2.]])
    """
    following = sigma if next_sigma is None else next_sigma
    target, cm = target_level(parameterization, u, sigma_min), parameterization == "cm"
    return RENOISE.call(x, F, t, target, sigma, following, sigma_data, cm, seed, step, sample_id)
