"""Preconditioning: how a sample and a network's output join, f(x, t, u) = c_skip x + c_out F(c_in x)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bicm_kernels import backend, reference
from bicm_kernels.ops import arguments
from bicm_kernels.ops.arguments import Integer, Number, dynamo
from bicm_kernels.ops.library import define, library

_ops = torch.ops.bicm_kernels

PARAMETERIZATIONS = ("bcm", "cm", "edm")


def _fake_like_first(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _fake_two(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def _fake_gradient(gradient: Tensor, *rest: Any) -> Tensor:
    return gradient.new_empty(gradient.shape, dtype=rest[-1])


_DENOISE = "bool cm, bool scaled"
for _schema, _fake in {
    "scale_input(Tensor x, float t, float sigma_data) -> Tensor": _fake_like_first,
    "scale_input.tensor(Tensor x, Tensor? t, Tensor? sigma_data) -> Tensor": _fake_like_first,
    f"denoise(Tensor x, Tensor F, float t, float u, float sigma_data, {_DENOISE}) -> Tensor": _fake_like_first,
    f"denoise.tensor(Tensor x, Tensor F, Tensor? t, Tensor? u, Tensor? sigma_data, {_DENOISE}) -> Tensor": (
        _fake_like_first
    ),
    f"denoise_gradient(Tensor gradient, Tensor? t, Tensor? u, Tensor? sigma_data, {_DENOISE}, bool in_F, "
    "ScalarType dtype) -> Tensor": _fake_gradient,
    "renoise(Tensor x, Tensor F, float t, float u, float sigma, float next_sigma, float sigma_data, bool cm, "
    "SymInt? seed, SymInt step, SymInt sample_id) -> (Tensor, Tensor)": _fake_two,
    "renoise.tensor(Tensor x, Tensor F, Tensor? t, Tensor? u, Tensor? sigma, Tensor? next_sigma, Tensor? sigma_data, "
    "bool cm, Tensor? seed, Tensor? step, Tensor? sample_id) -> (Tensor, Tensor)": _fake_two,
    # The same two with a derivative. They stand apart because carrying one doubles the cost of every call.
    "scale_input_tracked(Tensor x, Tensor t, Tensor sigma_data) -> Tensor": _fake_like_first,
    f"denoise_tracked(Tensor x, Tensor F, Tensor t, Tensor u, Tensor sigma_data, {_DENOISE}) -> Tensor": (
        _fake_like_first
    ),
}.items():
    define(_schema, ["x", "F", "gradient"], _fake)

library.impl("scale_input_tracked", lambda *args: _ops.scale_input.tensor(*args), "CompositeExplicitAutograd")
library.impl("denoise_tracked", lambda *args: _ops.denoise.tensor(*args), "CompositeExplicitAutograd")


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


torch.library.register_autograd(
    "bicm_kernels::scale_input_tracked", _input_gradient, setup_context=_save_input, lib=library
)
torch.library.register_autograd(
    "bicm_kernels::denoise_tracked", _denoise_gradient, setup_context=_save_denoise, lib=library
)


def _target(parameterization: str, u: Number | None, sigma_min: float) -> Number:
    """The level that a denoiser leads to: u, or the parameterisation's own end."""
    if parameterization not in PARAMETERIZATIONS:
        raise ValueError(f"parameterization must be one of {', '.join(PARAMETERIZATIONS)}, got {parameterization!r}")
    if u is not None and parameterization != "bcm":
        given = arguments.describe(u)
        raise ValueError(f"u must be None for parameterization={parameterization!r}: only 'bcm' takes it, got {given}")
    if parameterization == "edm":
        return 0.0
    return sigma_min if u is None else u


def _check(states: dict[str, Any], numbers: dict[str, Any], key: tuple[Any, ...] = ()) -> None:
    """Raise what is wrong with the arguments, if anything is."""
    first_name, first = next(iter(states.items()))
    arguments.check_state(first_name, first)
    for name, x in states.items():
        arguments.check_state(name, x, first, first_name)
    for name, number in numbers.items():
        arguments.check_number(name, number, first)
    if key:
        arguments.check_key(key[0], key[1], key[2], first.shape[0], first.device)


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
    if not dynamo() and backend.lane is not None:
        result = backend.lane.scale_input(x, t, sigma_data)
        if result is not None:
            return result
    numbers = {"t": t, "sigma_data": sigma_data}
    return _call("scale_input", {"x": x}, numbers, lambda: reference.scale_input(x, t, sigma_data=sigma_data))


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
        u: level to arrive at, for ``bcm`` alone; float, 0-d or (B,) tensor. None means sigma_min for ``bcm``; ``cm``
            leads to sigma_min and ``edm`` to 0.
        parameterization: ``bcm`` (BCM eq. 20, 39, 43), ``cm`` (BCM eq. 17) or ``edm``.
        sigma_data: standard deviation of the data.
        sigma_min: the smallest level, where ``cm`` and ``bcm`` without u arrive.
        scaled: x is the network's input, c_in(t) times the sample, as ``noisy_pair`` and ``renoise`` leave it.

    Returns:
        A tensor in the dtype and layout of x. Differentiable in x and F through the fused kernel, in t and u, and
        twice, through the reference.

    Raises:
        TypeError, ValueError: an argument has another type, shape, device or name.

    >>> import torch, bicm_kernels as bk
    >>> bk.denoise(torch.ones(1, 2), torch.ones(1, 2), 3.0, 3.0)
    tensor([[1., 1.]])
    """
    target = _target(parameterization, u, sigma_min)
    if not dynamo() and backend.lane is not None:
        result = backend.lane.denoise(x, F, t, target, sigma_data, parameterization == "cm", scaled)
        if result is not None:
            return result
    numbers = {"t": t, "u": target, "sigma_data": sigma_data}
    return _call(
        "denoise",
        {"x": x, "F": F},
        numbers,
        lambda: reference.denoise(
            x, F, t, u, parameterization=parameterization, sigma_data=sigma_data, sigma_min=sigma_min, scaled=scaled
        ),
        (parameterization == "cm", scaled),
    )


def _call(
    name: str, states: dict[str, Any], numbers: dict[str, Any], plain_torch: Any, flags: tuple[bool, ...] = ()
) -> Any:
    """An op without noise: its kernel, its tracked twin where a derivative is recorded, or its reference."""
    tensors, values = [*states.values()], tuple(numbers.values())
    try:
        tracked = arguments.requires_grad(*tensors)
        fallback = arguments.needs_reference(tensors[0], tracked=arguments.requires_grad(*values))
        if fallback or arguments.unseen(tensors[0]):
            _check(states, numbers)
        if fallback:
            return plain_torch()
        if not tracked and arguments.plain(values):
            return getattr(_ops, name).default(*tensors, *values, *flags)
        table = [arguments.coefficient(value) for value in values]
        op = getattr(_ops, f"{name}_tracked").default if tracked else getattr(_ops, name).tensor
        return op(*tensors, *table, *flags)
    except (RuntimeError, TypeError, AttributeError) as error:
        arguments.explain(error, lambda: _check(states, numbers))


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
        (x_s, scaled input of the next evaluation), both in the dtype and layout of x.

    Raises:
        TypeError, ValueError: an argument has another type, shape, device, range or name.

    >>> import torch, bicm_kernels as bk
    >>> x_s, scaled = bk.renoise(torch.ones(1, 2), torch.ones(1, 2), 3.0, 3.0, 0.0, seed=0); scaled
    tensor([[2., 2.]])
    """
    following = sigma if next_sigma is None else next_sigma
    target = _target(parameterization, u, sigma_min)
    cm = parameterization == "cm"
    if not dynamo() and backend.lane is not None:
        results = backend.lane.renoise(x, F, t, target, sigma, following, sigma_data, cm, seed, step, sample_id)
        if results is not None:
            return results
    states = {"x": x, "F": F}
    numbers = {"t": t, "u": target, "sigma": sigma, "next_sigma": following, "sigma_data": sigma_data}
    values = tuple(numbers.values())
    arguments.check_vmap(seed)
    key = (arguments.signed(seed) if type(seed) is int else seed, step, sample_id)
    try:
        fallback = arguments.needs_reference(x, tracked=arguments.requires_grad(x, F, *values))
        if fallback or arguments.unseen(x):
            _check(states, numbers, key)
        if fallback:
            return reference.renoise(
                x,
                F,
                t,
                u,
                sigma,
                next_sigma=next_sigma,
                seed=seed,
                step=step,
                sample_id=sample_id,
                parameterization=parameterization,
                sigma_data=sigma_data,
                sigma_min=sigma_min,
            )
        if arguments.plain(values) and arguments.plain(key):
            return _ops.renoise.default(x, F, *values, cm, *key)
        table = [arguments.coefficient(value) for value in values]
        return _ops.renoise.tensor(x, F, *table, cm, *arguments.key(*key, x))
    except (RuntimeError, TypeError, AttributeError, OverflowError, IndexError) as error:
        arguments.explain(error, lambda: _check(states, numbers, key))
