"""Pseudo-Huber losses: one pass over the inputs forward, one backward, and nothing of their size kept in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bicm_kernels import backend, reference
from bicm_kernels.ops import arguments
from bicm_kernels.ops.arguments import Number
from bicm_kernels.ops.library import library

Gradients = tuple[Tensor | None, ...]
_Kernel = Callable[..., Any]
_Kernels = tuple[_Kernel, _Kernel]

_ops = torch.ops.bicm_kernels
_CODES: dict[str, dict[Any, int]] = {
    "parameterization": {"bcm": 0, "cm": 1, "edm": 2},
    "scaled": {False: 0, True: 1},
    "kind": {"vector": 0, "elementwise": 1},
    "reduction": {"mean": 0, "sum": 1, "none": 2},
}
_NAMES = {name: tuple(codes) for name, codes in _CODES.items()}
_PARAMETERIZATION, _SCALED, _KIND, _REDUCTION = _CODES.values()
_PER_SAMPLE = _REDUCTION["none"]
_MAY_BE_NONE = ("u", "weight", "c")


@dataclass(frozen=True)
class _Loss:
    """A loss in its schema's order: tensors, the first ``inputs`` of which it differentiates, then other arguments."""

    name: str
    tensors: tuple[str, ...]
    inputs: int
    options: tuple[str, ...]
    reference: Callable[..., Tensor]
    #: The op and its derivative, by the overload's name.
    kernels: dict[str, _Kernels] = field(default_factory=dict)

    def schema(self, number: str) -> str:
        """The arguments of the op, numbers as ``float`` or as ``Tensor``."""
        types = (
            dict.fromkeys(self.tensors, "Tensor") | dict.fromkeys(self.options, number) | dict.fromkeys(_CODES, "int")
        )
        names = (*self.tensors, *self.options)
        return ", ".join(f"{types[name]}{'?' if name in _MAY_BE_NONE else ''} {name}" for name in names)

    def named(self, call: Sequence[Any]) -> dict[str, Any]:
        """The arguments of a call by name, codes as names."""
        values = dict(zip((*self.tensors, *self.options), call, strict=True))
        return {name: _NAMES[name][x] if name in _NAMES else x for name, x in values.items()}


_PSEUDO_HUBER = _Loss(
    "pseudo_huber", ("pred", "target", "weight"), 2, ("c", "kind", "reduction"), reference.pseudo_huber
)
_CONSISTENCY_LOSS = _Loss(
    "consistency_loss",
    ("F", "target", "x", "t", "u", "weight"),
    3,
    ("c", "sigma_data", "sigma_min", "parameterization", "scaled", "kind", "reduction"),
    reference.consistency_loss,
)


def _gradients(
    loss: _Loss, kernel: _Kernel, upstream: Tensor, sums: Tensor, needs: Sequence[bool], call: Sequence[Any]
) -> Gradients:
    """The derivatives that are needed, in one pass; through the reference where they are differentiated themselves."""
    if torch.is_grad_enabled() or arguments.batched(upstream) or arguments.transformed():
        results = _reference_gradients(loss, upstream, needs, call)
    else:
        # The third argument is an input or a weight, which needs none here.
        results = kernel(upstream, sums, needs[0] + 2 * needs[1] + 4 * needs[2], *call)
    found = iter(results)
    return tuple(next(found) if need else None for need in needs)


def _reference_gradients(loss: _Loss, upstream: Tensor, needs: Sequence[bool], call: Sequence[Any]) -> Sequence[Tensor]:
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, because one tensor may be given twice.
        inputs = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in call[: loss.inputs]]
        value = loss.reference(**loss.named([*inputs, *call[loss.inputs :]]))
        wanted = [x for x, need in zip(inputs, needs, strict=False) if need]
        return torch.autograd.grad(value, wanted, upstream, create_graph=differentiable)


# A loss, its op and derivative, and the arguments that are not tensors.
_Call = tuple[_Loss, _Kernels, tuple[Any, ...]]


class _Tracked(torch.autograd.Function):
    """The losses for eager calls; what ``register_autograd`` makes for traced graphs costs several times as much."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Any) -> Tensor:
        value, sums = call[1][0](*tensors, *call[2])
        ctx.save_for_backward(sums, *tensors)
        ctx.call = call
        return value

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> Any:
        loss, (_, kernel), options = ctx.call
        sums, *tensors = ctx.saved_tensors
        return None, *_gradients(loss, kernel, upstreams[0], sums, ctx.needs_input_grad[1:], (*tensors, *options))


def _register(loss: _Loss) -> None:
    """Define a loss and its derivative, with numbers and with tensors; the latter, for traced graphs, has autograd."""

    def fake_value(*call: Any) -> tuple[Tensor, Tensor]:
        first, each = call[0], call[-1] == _PER_SAMPLE
        wide = any(x.dtype == torch.float64 for x in call[: loss.inputs])
        value = first.new_empty(first.shape[:1] if each else (), dtype=torch.float64 if wide else torch.float32)
        return value, first.new_empty(first.shape[:1], dtype=torch.float64)

    def fake_gradients(upstream: Tensor, sums: Tensor, needs: int, *call: Any) -> list[Tensor]:
        return [torch.empty_like(x) for k, x in enumerate(call[: loss.inputs]) if needs >> k & 1]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(output[1], *(x if isinstance(x, Tensor) else None for x in inputs))
        ctx.call = [None if isinstance(x, Tensor) else x for x in inputs]

    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> Gradients:
        sums, *tensors = ctx.saved_tensors
        call = [x if tensor is None else tensor for x, tensor in zip(ctx.call, tensors, strict=True)]
        return _gradients(loss, loss.kernels["tensor"][1], upstream, sums, ctx.needs_input_grad, call)

    for overload, number in (("", "float"), (".tensor", "Tensor")):
        schema = loss.schema(number)
        derivative = f"{loss.name}_backward{overload}"
        library.define(f"{loss.name}{overload}({schema}) -> (Tensor, Tensor)")
        library.define(f"{derivative}(Tensor upstream, Tensor sums, int needs, {schema}) -> Tensor[]")
        torch.library.register_fake(f"bicm_kernels::{loss.name}{overload}", fake_value, lib=library)
        torch.library.register_fake(f"bicm_kernels::{derivative}", fake_gradients, lib=library)
        named = overload.lstrip(".") or "default"
        loss.kernels[named] = tuple(getattr(getattr(_ops, loss.name + x), named) for x in ("", "_backward"))
    torch.library.register_autograd(
        f"bicm_kernels::{loss.name}.tensor", backward, setup_context=setup_context, lib=library
    )


for _loss in (_PSEUDO_HUBER, _CONSISTENCY_LOSS):
    _register(_loss)


def _check(loss: _Loss, call: Sequence[Any]) -> None:
    """Raise what is wrong with a loss's arguments, if anything is."""
    values = dict(zip((*loss.tensors, *loss.options), call, strict=True))
    first = "x" if "x" in values else loss.tensors[0]
    arguments.check_state(first, values[first])
    for name in loss.tensors[: loss.inputs]:
        arguments.check_state(name, values[name], values[first], first)
    for name in (*loss.tensors[loss.inputs :], *loss.options):
        value = values[name]
        if name in _CODES:
            if not isinstance(value, str | bool) or value not in _CODES[name]:
                raise ValueError(f"{name} must be one of {', '.join(map(str, _CODES[name]))}, got {value!r}")
        elif value is not None or name not in _MAY_BE_NONE:
            arguments.check_number(name, value, values[first])
    c = values["c"]
    if c is None and values["kind"] == "elementwise":
        raise ValueError("c must be given for kind='elementwise', where it has no usual value, got None")
    if isinstance(c, float | int) and not arguments.compiling() and not c >= 0:
        raise ValueError(f"c must be at least 0, got {c!r}")
    if values.get("u") is not None and values["parameterization"] != "bcm":
        raise ValueError(f"u must be None for parameterization={values['parameterization']!r}: only bcm takes it")


def _quick(loss: _Loss, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Tensor | None:
    """The loss of an eager call on the CPU whose numbers need no conversion; None where a call is another or wrong."""
    if arguments.transformed() or not tensors[0].is_cpu:
        return None
    tracked = False
    for place, x in enumerate(tensors):
        if place < loss.inputs:
            tracked = tracked or x.requires_grad
        elif x is not None and (type(x) is not Tensor or x.requires_grad):
            return None
    kernels = loss.kernels["default"]
    if tracked and torch.is_grad_enabled():
        return _apply((loss, kernels, options), *tensors)
    return kernels[0](*tensors, *options)[0]


# Without the detour through Function.apply, which looks for the transforms that were ruled out before.
_apply = super(torch.autograd.Function, _Tracked).apply


def _run(loss: _Loss, tensors: tuple[Any, ...], numbers: tuple[Any, ...], names: tuple[str | bool, ...]) -> Tensor:
    """Run a loss's kernel, or its reference where a derivative, a transform or the backend asks for it.

    ``tensors``, ``numbers`` and the ``names`` of codes follow one another in the schema's order.
    """
    values = (*tensors, *numbers, *names)
    traced = arguments.compiling()
    try:
        codes = [_CODES[option][name] for option, name in zip(loss.options[len(numbers) :], names, strict=True)]
        fallback = arguments.needs_reference(
            tensors[0], tracked=arguments.requires_grad(*tensors[loss.inputs :], *numbers)
        )
        if traced or fallback:
            _check(loss, values)
        if fallback:
            return loss.reference(**dict(zip((*loss.tensors, *loss.options), values, strict=True)))
        tensors = (*tensors[: loss.inputs], *map(_number, tensors[loss.inputs :]))
        overload = "default"
        if traced or any(isinstance(x, Tensor) for x in numbers):
            overload, numbers = "tensor", tuple(map(_number, numbers))
        if traced or not arguments.requires_grad(*tensors):
            return loss.kernels[overload][0](*tensors, *numbers, *codes)[0]
        # Copies, because nothing would notice if they were overwritten before the backward pass.
        numbers = tuple(x.clone() if isinstance(x, Tensor) else x for x in numbers)
        return _Tracked.apply((loss, loss.kernels[overload], (*numbers, *codes)), *tensors)
    except (RuntimeError, TypeError, AttributeError, KeyError, OverflowError) as error:
        arguments.explain(error, lambda: _check(loss, values))


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
) -> Tensor:
    """Pseudo-Huber loss, the distance of consistency training (BCM eq. 11), with nothing stored between the passes.

    ``vector``: sqrt(|r|^2 + c^2) - c per sample, r = pred - target; ``elementwise``: the mean of sqrt(r_i^2 + c^2) - c
    over a sample's elements. Both are computed as s / (sqrt(s + c^2) + c); value and gradient are 0 at s = c = 0.

    Args:
        pred, target: (B, ...) of one shape, each float16, bfloat16, float32 or float64, any strides.
        c: where the square turns into the norm, >= 0; float, 0-d or (B,) tensor. None is 0.00054 sqrt(d) for
            ``vector``, d elements in a sample; ``elementwise`` must be given one.
        weight: weight of each sample, a (B,) tensor, a 0-d tensor or a float; None weighs all alike.
        kind: "vector" or "elementwise".
        reduction: "mean" or "sum" of the weighted distances over the batch, or "none".

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
    if backend.native_cpu and not arguments.compiling() and (c is None or type(c) is float):
        try:
            loss = _quick(_PSEUDO_HUBER, tensors, (c, _KIND[kind], _REDUCTION[reduction]))
            if loss is not None:
                return loss
        except (RuntimeError, TypeError, AttributeError, KeyError):
            pass  # the long way says why
    return _run(_PSEUDO_HUBER, tensors, (c,), (kind, reduction))


def consistency_loss(
    x: Tensor,
    F: Tensor,
    t: Number,
    u: Number | None,
    target: Tensor,
    *,
    c: Number | None = None,
    weight: Number | None = None,
    kind: str = "vector",
    reduction: str = "mean",
    parameterization: str = "bcm",
    sigma_data: Number = 0.5,
    sigma_min: Number = 0.002,
    scaled: bool = False,
) -> Tensor:
    """``pseudo_huber(denoise(x, F, t, u), target)`` without the denoised sample: training allocates F's gradient alone.

    c_skip x + c_out F (BCM eq. 20, 39, 43) exists in the compute type only: unlike ``denoise`` it is not rounded to the
    dtype of x.

    Args:
        x: noisy sample (B, ...), float16, bfloat16, float32 or float64, any strides.
        F: network output, like x, of any of these dtypes.
        t, u: noise levels from and to; float, 0-d or (B,) tensor. u = None is sigma_min for "bcm"; "cm" and "edm" take
            no u.
        target: like x, of any of these dtypes.
        c, weight, kind, reduction: as for ``pseudo_huber``.
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
    if backend.native_cpu and not arguments.compiling() and (c is None or type(c) is float):
        try:
            codes = (_PARAMETERIZATION[parameterization], _SCALED[scaled], _KIND[kind], _REDUCTION[reduction])
            loss = _quick(_CONSISTENCY_LOSS, tensors, (c, sigma_data, sigma_min, *codes))
            if loss is not None:
                return loss
        except (RuntimeError, TypeError, AttributeError, KeyError):
            pass  # the long way says why
    return _run(_CONSISTENCY_LOSS, tensors, (c, sigma_data, sigma_min), (parameterization, scaled, kind, reduction))
