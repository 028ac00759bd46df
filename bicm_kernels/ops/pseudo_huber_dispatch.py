"""Schemas, fakes and derivatives of the losses, of which the gradient is formed backward or with the value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bicm_kernels import reference
from bicm_kernels.ops import arguments, kept_gradient
from bicm_kernels.ops.kept_gradient import Gradients, wanted_bits
from bicm_kernels.ops.library import define, library
from bicm_kernels.torch_internals import is_batched_gradient, transformed

_Kernel = Callable[..., Any]


class Kernels(NamedTuple):
    """An overload's ops: the value, its derivative, and both at once."""

    value: _Kernel
    derivative: _Kernel
    both: _Kernel


_SUFFIXES = ("", "_backward", "_with_gradients")

_ops = torch.ops.bicm_kernels
CODES: dict[str, dict[Any, int]] = {
    "parameterization": {"bcm": 0, "cm": 1, "edm": 2},
    "scaled": {False: 0, True: 1},
    "kind": {"vector": 0, "elementwise": 1},
    "reduction": {"mean": 0, "sum": 1, "none": 2},
}
_NAMES = {name: tuple(codes) for name, codes in CODES.items()}
_PER_SAMPLE = CODES["reduction"]["none"]
MAY_BE_NONE = ("u", "weight", "c")


@dataclass(frozen=True)
class Loss:
    """A loss in its schema's order: tensors, the first ``inputs`` of which it differentiates, then other arguments."""

    name: str
    tensors: tuple[str, ...]
    inputs: int
    options: tuple[str, ...]
    reference: Callable[..., Tensor]
    #: By the overload's name.
    kernels: dict[str, Kernels] = field(default_factory=dict)

    def schema(self, number: str) -> str:
        """The arguments of the op, numbers as ``float`` or as ``Tensor``."""
        types = (
            dict.fromkeys(self.tensors, "Tensor") | dict.fromkeys(self.options, number) | dict.fromkeys(CODES, "int")
        )
        names = (*self.tensors, *self.options)
        return ", ".join(f"{types[name]}{'?' if name in MAY_BE_NONE else ''} {name}" for name in names)

    def named(self, call: Sequence[Any]) -> dict[str, Any]:
        """The arguments of a call by name, codes as names."""
        values = dict(zip((*self.tensors, *self.options), call, strict=True))
        return {name: _NAMES[name][x] if name in _NAMES else x for name, x in values.items()}


PSEUDO_HUBER = Loss("pseudo_huber", ("pred", "target", "weight"), 2, ("c", "kind", "reduction"), reference.pseudo_huber)
CONSISTENCY_LOSS = Loss(
    "consistency_loss",
    ("F", "target", "x", "t", "u", "weight"),
    3,
    ("c", "sigma_data", "sigma_min", "parameterization", "scaled", "kind", "reduction"),
    reference.consistency_loss,
)


@arguments.faithful
def _gradients(
    loss: Loss, kernel: _Kernel, upstream: Tensor, sums: Tensor, needs: Sequence[bool], call: Sequence[Any]
) -> Gradients:
    """The derivatives that are needed, in one pass; through the reference where they are differentiated themselves."""
    if torch.is_grad_enabled() or is_batched_gradient(upstream) or transformed():
        results = _reference_gradients(loss, upstream, needs, call)
    else:
        results = kernel(upstream, sums, wanted_bits(needs), *call)
    found = iter(results)
    return tuple(next(found) if need else None for need in needs)


def _reference_gradients(loss: Loss, upstream: Tensor, needs: Sequence[bool], call: Sequence[Any]) -> Sequence[Tensor]:
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, because one tensor may be given twice.
        inputs = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in call[: loss.inputs]]
        value = loss.reference(**loss.named([*inputs, *call[loss.inputs :]]))
        wanted = [x for x, need in zip(inputs, needs, strict=False) if need]
        return torch.autograd.grad(value, wanted, upstream, create_graph=differentiable)


# A loss, its ops, and the arguments that are not tensors.
_Call = tuple[Loss, Kernels, tuple[Any, ...]]


class Tracked(torch.autograd.Function):
    """The losses for eager calls; what ``register_autograd`` makes for traced graphs costs several times as much."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Any) -> Tensor:
        value, sums = call[1].value(*tensors, *call[2])
        ctx.save_for_backward(sums, *tensors)
        ctx.call = call
        return value

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> Any:
        loss, kernels, options = ctx.call
        sums, *tensors = ctx.saved_tensors
        return None, *_gradients(
            loss, kernels.derivative, upstreams[0], sums, ctx.needs_input_grad[1:], (*tensors, *options)
        )


def _register(loss: Loss) -> None:
    """Define a loss's ops, with numbers and with tensors; the latter, for traced graphs, have autograd."""

    def loss_like(call: Sequence[Any]) -> Tensor:
        first, each = call[0], call[-1] == _PER_SAMPLE
        wide = any(x.dtype == torch.float64 for x in call[: loss.inputs])
        return first.new_empty(first.shape[:1] if each else (), dtype=torch.float64 if wide else torch.float32)

    def gradients_like(needs: int, call: Sequence[Any]) -> list[Tensor]:
        return [torch.empty_like(x) for k, x in enumerate(call[: loss.inputs]) if needs >> k & 1]

    def fake_value(*call: Any) -> tuple[Tensor, Tensor]:
        return loss_like(call), call[0].new_empty(call[0].shape[:1], dtype=torch.float64)

    def fake_gradients(upstream: Tensor, sums: Tensor, needs: int, *call: Any) -> list[Tensor]:
        return gradients_like(needs, call)

    def fake_both(needs: int, *call: Any) -> tuple[Tensor, list[Tensor]]:
        return loss_like(call), gradients_like(needs, call)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(output[1], *(x if isinstance(x, Tensor) else None for x in inputs))
        ctx.call = [None if isinstance(x, Tensor) else x for x in inputs]

    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> Gradients:
        sums, *tensors = ctx.saved_tensors
        call = [x if tensor is None else tensor for x, tensor in zip(ctx.call, tensors, strict=True)]
        return _gradients(loss, loss.kernels["tensor"][1], upstream, sums, ctx.needs_input_grad, call)

    fakes: tuple[_Kernel, ...] = (fake_value, fake_gradients, fake_both)
    for overload, number in (("", "float"), (".tensor", "Tensor")):
        schema, names = loss.schema(number), [loss.name + suffix for suffix in _SUFFIXES]
        signatures = (
            f"({schema}) -> (Tensor, Tensor)",
            f"(Tensor upstream, Tensor sums, int needs, {schema}) -> Tensor[]",
            f"(int needs, {schema}) -> (Tensor, Tensor[])",
        )
        for name, signature, fake in zip(names, signatures, fakes, strict=True):
            define(f"{name}{overload}{signature}", loss.tensors[: loss.inputs], fake)
        named = overload.lstrip(".") or "default"
        loss.kernels[named] = Kernels(*[getattr(getattr(_ops, name), named) for name in names])
    torch.library.register_autograd(
        f"bicm_kernels::{loss.name}.tensor", backward, setup_context=setup_context, lib=library
    )
    kept_gradient.register(f"{loss.name}{_SUFFIXES[-1]}.tensor")


for _loss in (PSEUDO_HUBER, CONSISTENCY_LOSS):
    _register(_loss)
