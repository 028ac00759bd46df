"""Pseudo-Huber losses: one pass over the inputs forward, one backward, and nothing of their size kept in between.

Or one pass in all, of which the gradient is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bicm_kernels import backend
from bicm_kernels.ops import arguments
from bicm_kernels.ops.arguments import Number
from bicm_kernels.ops.kept_gradient import Kept, can_be_kept, wanted_bits
from bicm_kernels.ops.pseudo_huber_dispatch import CODES, CONSISTENCY_LOSS, MAY_BE_NONE, PSEUDO_HUBER, Loss, Tracked
from bicm_kernels.torch_internals import apply_of, transformed

_PARAMETERIZATION, _SCALED, _KIND, _REDUCTION = CODES.values()
#: Whether the gradient is formed with the value.
_GRADIENT = {"backward": False, "forward": True}


def _check(loss: Loss, call: Sequence[Any], gradient: object) -> None:
    """Raise what is wrong with a loss's arguments, if anything is."""
    values = dict(zip((*loss.tensors, *loss.options), call, strict=True))
    first = "x" if "x" in values else loss.tensors[0]
    arguments.check_state(first, values[first])
    for name in loss.tensors[: loss.inputs]:
        arguments.check_state(name, values[name], values[first], first)
    for name in (*loss.tensors[loss.inputs :], *loss.options):
        value = values[name]
        if name in CODES:
            if not isinstance(value, str | bool) or value not in CODES[name]:
                raise ValueError(f"{name} must be one of {', '.join(map(str, CODES[name]))}, got {value!r}")
        elif value is not None or name not in MAY_BE_NONE:
            arguments.check_number(name, value, values[first])
    c = values["c"]
    if c is None and values["kind"] == "elementwise":
        raise ValueError("c must be given for kind='elementwise', where it has no usual value, got None")
    if isinstance(c, float | int) and not arguments.compiling() and not c >= 0:
        raise ValueError(f"c must be at least 0, got {c!r}")
    if (u := values.get("u")) is not None and (name := values["parameterization"]) != "bcm":
        raise ValueError(
            f"u must be None for parameterization={name!r}: only 'bcm' takes it, got {arguments.describe(u)}"
        )
    if not isinstance(gradient, str) or gradient not in _GRADIENT:
        raise ValueError(f"gradient must be one of {', '.join(_GRADIENT)}, got {gradient!r}")


def _quick(loss: Loss, tensors: tuple[Any, ...], options: tuple[Any, ...], keeps: bool) -> Tensor | None:
    """The loss of an eager call on the CPU whose numbers need no conversion; None where a call is another or wrong."""
    if transformed() or not tensors[0].is_cpu:
        return None
    tracked = False
    for place, x in enumerate(tensors):
        if place < loss.inputs:
            tracked = tracked or x.requires_grad
        elif x is not None and (type(x) is not Tensor or x.requires_grad):
            return None
    kernels = loss.kernels["default"]
    if tracked and torch.is_grad_enabled():
        if keeps and can_be_kept(tensors[: loss.inputs]):
            return _apply_kept((kernels.both, options), *tensors)
        return _apply((loss, kernels, options), *tensors)
    return kernels.value(*tensors, *options)[0]


# Without the detour through Function.apply, which looks for the transforms that were ruled out before.
_apply = apply_of(Tracked)
_apply_kept = apply_of(Kept)


def _run(
    loss: Loss, tensors: tuple[Any, ...], numbers: tuple[Any, ...], names: tuple[str | bool, ...], gradient: str
) -> Tensor:
    """Run a loss's kernel, or its reference where a derivative, a transform or the backend asks for it.

    ``tensors``, ``numbers`` and the ``names`` of codes follow one another in the schema's order.
    """
    values = (*tensors, *numbers, *names)
    traced = arguments.compiling()
    try:
        codes = [CODES[option][name] for option, name in zip(loss.options[len(numbers) :], names, strict=True)]
        keeps = _GRADIENT[gradient]
        fallback = arguments.needs_reference(
            tensors[0], tracked=arguments.requires_grad(*tensors[loss.inputs :], *numbers)
        )
        if fallback or arguments.unseen(tensors[0]):
            _check(loss, values, gradient)
        if fallback:
            return loss.reference(**dict(zip((*loss.tensors, *loss.options), values, strict=True)))
        inputs = tensors[: loss.inputs]
        tensors = (*inputs, *map(_number, tensors[loss.inputs :]))
        overload = "default"
        if traced or any(isinstance(x, Tensor) for x in numbers):
            overload, numbers = "tensor", tuple(map(_number, numbers))
        kernels, tracked = loss.kernels[overload], arguments.requires_grad(*inputs)
        keeps = keeps and tracked and can_be_kept(inputs)
        if traced and keeps:
            needs = wanted_bits([*[x.requires_grad for x in inputs], False])
            return kernels.both(needs, *tensors, *numbers, *codes)[0]
        if traced or not tracked:
            return kernels.value(*tensors, *numbers, *codes)[0]
        if keeps:
            return Kept.apply((kernels.both, (*numbers, *codes)), *tensors)
        # Copies, because nothing would notice if they were overwritten before the backward pass.
        numbers = tuple(x.clone() if isinstance(x, Tensor) else x for x in numbers)
        return Tracked.apply((loss, kernels, (*numbers, *codes)), *tensors)
    except arguments.FAILURES as error:
        arguments.explain(error, lambda: _check(loss, values, gradient))


def _number(value: Number | None) -> Tensor | None:
    return None if value is None else arguments.coefficient(value)


def pseudo_huber(
    pred: Tensor,
    target: Tensor,
    *,
    c: Number | None = None,
    weight: Number | None = None,
    kind: str = "vector",
    reduction: str = "mean",
    gradient: str = "backward",
) -> Tensor:
    """Pseudo-Huber loss, the distance of consistency training (BCM eq. 11), with nothing stored between the passes.

    ``vector``: sqrt(|r|^2 + c^2) - c per sample, r = pred - target; ``elementwise``: the mean of sqrt(r_i^2 + c^2) - c
    over a sample's elements. Both are computed as s / (sqrt(s + c^2) + c); value and gradient are 0 at s = c = 0.
    Squares may overflow or underflow. An infinite residual makes the distance infinite and its own derivative NaN.

    Args:
        pred, target: (B, ...) of one shape, each float16, bfloat16, float32 or float64, any strides.
        c: where the square turns into the norm, >= 0; float, 0-d or (B,) tensor. None is 0.00054 sqrt(d) for
            ``vector``, d elements in a sample; ``elementwise`` must be given one.
        weight: weight of each sample, a (B,) tensor, a 0-d tensor or a float; None weighs all alike.
        kind: "vector" or "elementwise".
        reduction: "mean" or "sum" of the weighted distances over the batch, or "none".
        gradient: "backward" re-reads the inputs in the backward pass. "forward" reads them once, forms the gradients
            with the value and keeps them in place of the inputs. The backward pass gives them out, times the incoming
            gradient where that is not 1: one more rounding where it is no power of two. Gradients of halves are not
            kept, since they could not be scaled without loss: where one is needed, "forward" is as "backward". Second
            derivatives raise: the inputs are gone.

    Returns:
        The loss, 0-d or (B,), float64 where pred or target is float64, else float32: it is not rounded to halves. The
        gradient of a tensor has that tensor's dtype and layout. Of an empty batch the mean is NaN and the sum 0.

    Raises:
        TypeError, ValueError: an argument has another type, shape, device, name or range.

    Differentiable in pred and target through the fused kernel; in c and weight, and twice, through the reference.

    >>> import torch, bicm_kernels as bk
    >>> bk.pseudo_huber(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), c=0.0)
    tensor(5.)
    """
    tensors = (pred, target, weight)
    if backend.cpu_is_compiled and not arguments.compiling() and (c is None or type(c) is float):
        try:
            loss = _quick(PSEUDO_HUBER, tensors, (c, _KIND[kind], _REDUCTION[reduction]), _GRADIENT[gradient])
            if loss is not None:
                return loss
        except arguments.FAILURES:
            pass  # the long way says why
    return _run(PSEUDO_HUBER, tensors, (c,), (kind, reduction), gradient)


def consistency_loss(
    x: Tensor,
    F: Tensor,
    t: Number,
    u: Number | None = None,
    target: Tensor | None = None,
    *,
    c: Number | None = None,
    weight: Number | None = None,
    kind: str = "vector",
    reduction: str = "mean",
    parameterization: str = "bcm",
    sigma_data: Number = 0.5,
    sigma_min: Number = 0.002,
    scaled: bool = False,
    gradient: str = "backward",
) -> Tensor:
    """``pseudo_huber(denoise(x, F, t, u), target)`` without the denoised sample: training allocates F's gradient alone.

    c_skip x + c_out F (BCM eq. 20, 39, 43) exists in the compute type only: unlike ``denoise`` it is not rounded to the
    dtype of x.

    Args:
        x: noisy sample (B, ...), float16, bfloat16, float32 or float64, any strides.
        F: network output, like x, of any of these dtypes.
        t: noise level, >= 0; float, 0-d or (B,) tensor.
        u: level to arrive at, for "bcm" alone; float, 0-d or (B,) tensor. None means sigma_min for "bcm"; "cm" leads to
            sigma_min and "edm" to 0.
        target: like x, of any of these dtypes; must be given, by its name where u is left out.
        c, weight, kind, reduction, gradient: as for ``pseudo_huber``.
        parameterization: "bcm" (t to u), "cm" (t to sigma_min) or "edm" (t to 0).
        sigma_data, sigma_min: standard deviation of the data and smallest noise level; floats.
        scaled: x is the network's input, c_in(t) times the noisy sample: see ``noisy_pair``.

    Returns:
        The loss, as for ``pseudo_huber``.

    Raises:
        TypeError, ValueError: an argument has another type, shape, device, name or range.

    Differentiable in F, x and target through the fused kernel; in t, u, c and weight, and twice, through the reference.

    >>> import torch, bicm_kernels as bk
    >>> x = torch.tensor([[3.0, 4.0]]); bk.consistency_loss(x, x, 2.0, 2.0, 0 * x, c=0.0)
    tensor(5.)
    """
    tensors = (F, target, x, t, u, weight)
    if backend.cpu_is_compiled and not arguments.compiling() and (c is None or type(c) is float):
        try:
            found = (_PARAMETERIZATION[parameterization], _SCALED[scaled], _KIND[kind], _REDUCTION[reduction])
            loss = _quick(CONSISTENCY_LOSS, tensors, (c, sigma_data, sigma_min, *found), _GRADIENT[gradient])
            if loss is not None:
                return loss
        except arguments.FAILURES:
            pass  # the long way says why
    codes = (parameterization, scaled, kind, reduction)
    return _run(CONSISTENCY_LOSS, tensors, (c, sigma_data, sigma_min), codes, gradient)
