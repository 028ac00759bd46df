"""The losses as rows of the table of ops: each is three ops, since gradients are formed backward or with the value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bicm_kernels.ops import arguments, kept_gradient
from bicm_kernels.ops.kept_gradient import Gradients, Kept, can_be_kept, wanted_bits
from bicm_kernels.ops.library import define, library
from bicm_kernels.ops.op import Op
from bicm_kernels.ops.row import NUMBERS, TENSORS, Call, Types
from bicm_kernels.torch_internals import apply_of, bare, is_batched_gradient, transformed, undisturbed

_Kernel = Callable[..., Any]


class Kernels(NamedTuple):
    """An overload's ops: the value, its derivative, and both at once."""

    value: _Kernel
    derivative: _Kernel
    both: _Kernel


#: The types that an overload with numbers takes unchanged.
_PLAIN = frozenset((float, int, bool, type(None)))
_SUFFIXES = ("", "_backward", "_with_gradients")

CODES: dict[str, dict[Any, int]] = {
    "parameterization": {"bcm": 0, "cm": 1, "edm": 2},
    "scaled": {False: 0, True: 1},
    "kind": {"vector": 0, "elementwise": 1, "squared": 2},
    "reduction": {"mean": 0, "sum": 1, "none": 2},
}
_NAMES = {name: tuple(codes) for name, codes in CODES.items()}
_PER_SAMPLE = CODES["reduction"]["none"]
#: Whether the gradient is formed with the value.
_GRADIENT = {"backward": False, "forward": True}


@arguments.faithful
def _gradients(
    loss: LossOp, kernel: _Kernel, upstream: Tensor, sums: Tensor, needs: Sequence[bool], call: Sequence[Any]
) -> Gradients:
    """The derivatives that are needed, in one pass; through the reference for double backward."""
    if torch.is_grad_enabled() or is_batched_gradient(upstream) or transformed():
        results = _reference_gradients(loss, upstream, needs, call)
    else:
        results = kernel(upstream, sums, wanted_bits(needs), *call)
    found = iter(results)
    return tuple(next(found) if need else None for need in needs)


def _reference_gradients(
    loss: LossOp, upstream: Tensor, needs: Sequence[bool], call: Sequence[Any]
) -> Sequence[Tensor]:
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, because one tensor may be given twice.
        inputs = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in call[: loss.inputs]]
        value = loss.plain_value([*inputs, *call[loss.inputs :]])
        wanted = [x for x, need in zip(inputs, needs, strict=False) if need]
        return torch.autograd.grad(value, wanted, upstream, create_graph=differentiable)


def element_weight(weight: Tensor | None, first: Tensor) -> Tensor | None:
    """A weight as the kernels take it: masks as numbers, weights of elements like the inputs, without a copy."""
    if weight is None or (weight.dim() < 2 and weight.dtype != torch.bool):
        return weight
    if weight.dtype == torch.bool:
        weight = weight.to(first.dtype)
    if 1 < weight.dim() == first.dim() and weight.shape != first.shape:
        weight = weight.expand(first.shape)
    return weight


def _unsqueezed(weight: Tensor, first: Tensor) -> str:
    """A hint how to unsqueeze a mask that lacks dimensions, such as one of pixels."""
    forms = {"weight[None]": weight[None], "weight[None, None]": weight[None, None]}
    if weight.dim() > 1:
        forms["weight[:, None]"] = weight[:, None]
    fitting = [how for how, value in forms.items() if _broadcasts(value, first)]
    return f"; pass {' or '.join(fitting)}" if fitting else ""


def _broadcasts(weight: Tensor, first: Tensor) -> bool:
    return weight.dim() == first.dim() and all(a in (1, b) for a, b in zip(weight.shape, first.shape, strict=True))


def check_weight(weight: object, first: Tensor, first_name: str) -> None:
    """Raise unless a weight is a number, or floating or a mask, and one number, one per sample or one per element."""
    if not isinstance(weight, Tensor):
        if not isinstance(weight, Real | torch.SymFloat | torch.SymInt):
            what = arguments.describe(weight)
            raise TypeError(f"weight must be a float, a floating tensor or a bool mask, got {what}")
        return
    if weight.dtype != torch.bool and weight.dtype not in arguments.FLOATING:
        raise TypeError(f"weight must be a floating tensor or a bool mask, got {weight.dtype}")
    per_sample = weight.dim() == 1 and len(weight) == len(first)
    if weight.dim() and not per_sample and not _broadcasts(weight, first):
        shape, given = tuple(first.shape), tuple(weight.shape)
        raise ValueError(
            f"weight must be 0-d, ({len(first)},) or broadcast to the shape of {first_name}, {shape}, "
            f"with as many dimensions, got shape {given}{_unsqueezed(weight, first)}"
        )
    if weight.device != first.device and not (weight.dim() == 0 and weight.device.type == "cpu"):
        raise ValueError(f"weight must be on {first.device}, got {weight.device}")


# A loss, its ops, and the arguments that are not tensors.
_Call = tuple["LossOp", Kernels, tuple[Any, ...]]


class Tracked(torch.autograd.Function):
    """The losses for eager calls; ``register_autograd``, used for traced graphs, costs several times as much."""

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


# Skips Function.apply's check for transforms, which `quick` has ruled out.
_apply = apply_of(Tracked)
_apply_kept = apply_of(Kept)


@dataclass(eq=False)
class LossOp(Op):
    """A loss: tensors, the first ``inputs`` of which it differentiates; numbers; and flags, which have codes."""

    inputs: int = 2
    #: By the overload's name; "bare" is the one with numbers, called without torch's wrapper.
    kernels: dict[str, Kernels] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        tables = [CODES[name] for name in self.flag_names]
        #: The codes of names.
        self.codes = {names: tuple(t[n] for t, n in zip(tables, names, strict=True)) for names in product(*tables)}

    def parameters(self, types: Types) -> list[str]:
        number = types[0].rstrip("?")
        kinds = [*[("Tensor", name) for name in self.tensors], *[(number, name) for name in self.numbers]]
        found = [f"{kind}{'?' * (name in self.optional)} {name}" for kind, name in kinds]
        return [*found, *self.flags]

    def define(self) -> None:
        """Define the ops, with numbers and with tensors; the latter, for traced graphs, have autograd."""
        for overload, types in (("", NUMBERS), (".tensor", TENSORS)):
            given, names = ", ".join(self.parameters(types)), [self.name + suffix for suffix in _SUFFIXES]
            signatures = (
                f"({given}) -> (Tensor, Tensor)",
                f"(Tensor upstream, Tensor sums, int needs, {given}) -> Tensor[]",
                f"(int needs, {given}) -> (Tensor, Tensor[])",
            )
            fakes: tuple[_Kernel, ...] = (self.fake, self.fake_gradients, self.fake_both)
            for name, signature, fake in zip(names, signatures, fakes, strict=True):
                define(f"{name}{overload}{signature}", self.tensors[: self.inputs], fake)
            named = overload.lstrip(".") or "default"
            packets = [getattr(torch.ops.bicm_kernels, name) for name in names]
            self.kernels[named] = Kernels(*[getattr(packet, named) for packet in packets])
        self.kernels["bare"] = Kernels(*map(bare, self.kernels["default"]))
        self.register_derivatives()

    def register_derivatives(self) -> None:
        """Register the derivatives of the traced ops."""

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
            ctx.save_for_backward(output[1], *(x if isinstance(x, Tensor) else None for x in inputs))
            ctx.call = [None if isinstance(x, Tensor) else x for x in inputs]

        def backward(ctx: Any, upstream: Tensor, _: Tensor) -> Gradients:
            sums, *tensors = ctx.saved_tensors
            call = [x if tensor is None else tensor for x, tensor in zip(ctx.call, tensors, strict=True)]
            return _gradients(self, self.kernels["tensor"].derivative, upstream, sums, ctx.needs_input_grad, call)

        name = f"bicm_kernels::{self.name}.tensor"
        torch.library.register_autograd(name, backward, setup_context=setup_context, lib=library)
        kept_gradient.register(f"{self.name}{_SUFFIXES[-1]}.tensor")

    def fake(self, *call: Any) -> tuple[Tensor, Tensor]:
        return self.loss_like(call), call[0].new_empty(call[0].shape[:1], dtype=torch.float64)

    def fake_gradients(self, upstream: Tensor, sums: Tensor, needs: int, *call: Any) -> list[Tensor]:
        """The gradients whose bits are set."""
        return [torch.empty_like(x) for k, x in enumerate(call[: self.inputs]) if needs >> k & 1]

    def fake_both(self, needs: int, *call: Any) -> tuple[Tensor, list[Tensor]]:
        """The loss, and gradients."""
        return self.loss_like(call), self.fake_gradients(call[0], call[0], needs, *call)

    def loss_like(self, call: Sequence[Any]) -> Tensor:
        """The loss of a call, without a value."""
        first, each = call[0], call[-1] == _PER_SAMPLE
        wide = any(x.dtype == torch.float64 for x in call[: self.inputs])
        return first.new_empty(first.shape[:1] if each else (), dtype=torch.float64 if wide else torch.float32)

    def plain_value(self, call: Sequence[Any]) -> Tensor:
        """The reference of a call of codes."""
        names = [_NAMES[name][code] for name, code in zip(self.flag_names, call[self.first_flag :], strict=True)]
        return self.reference((*call[: self.first_flag], *names))

    def call(self, *call: Any, outs: Any = None, gradient: str = "backward") -> Tensor:
        """The loss of tensors, numbers and names, by a kernel, or by the reference where one is needed."""
        if not arguments.dynamo():
            try:
                loss = self.quick(call, gradient)
                if loss is not None:
                    return loss
            except arguments.FAILURES:
                pass  # the checked path below raises the full message
        return self.run(call, gradient)

    def quick(self, call: tuple[Any, ...], gradient: str) -> Tensor | None:
        """The loss of an eager call whose numbers need no conversion; None for other calls."""
        if not undisturbed() or not arguments.has_kernel(call[0]):
            return None
        tensors, tracked = call[: self.first_number], False
        for x in tensors[: self.inputs]:
            tracked = tracked or x.requires_grad
        for x in tensors[self.inputs :]:
            if x is not None and (type(x) is not Tensor or x.requires_grad):
                return None
        numbers = call[self.first_number : self.first_flag]
        for number in numbers:
            if type(number) not in _PLAIN:
                return None
        options, kernels = numbers + self.codes[call[self.first_flag :]], self.kernels["bare"]
        keeps = _GRADIENT[gradient]
        if tracked and torch.is_grad_enabled():
            if keeps and can_be_kept(tensors[: self.inputs]):
                return _apply_kept((kernels.both, options), *tensors)
            return _apply((self, kernels, options), *tensors)
        return kernels.value(*tensors, *options)[0]

    def run(self, call: Call, gradient: Any) -> Tensor:
        tensors, numbers = call[: self.first_number], call[self.first_number : self.first_flag]
        traced = arguments.compiling()
        try:
            codes = self.codes[tuple(call[self.first_flag :])]
            keeps = _GRADIENT[gradient]
            fallback = arguments.needs_reference(
                tensors[0], tracked=arguments.requires_grad(*tensors[self.inputs :], *numbers)
            )
            if fallback or arguments.unseen(tensors[0]):
                self.check(call, gradient)
            if fallback:
                return self.reference(call)
            inputs = tensors[: self.inputs]
            *levels, weight = arguments.coefficients(tensors[self.inputs :])
            tensors = (*inputs, *levels, element_weight(weight, tensors[0]))
            overload = "default"
            if traced or not arguments.no_tensors(numbers):
                overload, numbers = "tensor", tuple(arguments.coefficients(numbers))
            kernels, tracked = self.kernels[overload], arguments.requires_grad(*inputs)
            keeps = keeps and tracked and can_be_kept(inputs)
            if traced and keeps:
                needs = wanted_bits([*[x.requires_grad for x in inputs], False])
                return kernels.both(needs, *tensors, *numbers, *codes)[0]
            if traced or not tracked:
                return kernels.value(*tensors, *numbers, *codes)[0]
            if keeps:
                return Kept.apply((kernels.both, (*numbers, *codes)), *tensors)
            # Copies, because autograd would not detect that they were overwritten before the backward pass.
            numbers = tuple(x.clone() if isinstance(x, Tensor) else x for x in numbers)
            return Tracked.apply((self, kernels, (*numbers, *codes)), *tensors)
        except arguments.FAILURES as error:
            arguments.explain(error, lambda: self.check(call, gradient))

    def check(self, call: Call, gradient: object) -> None:
        values = dict(zip((*self.tensors, *self.numbers, *self.flag_names), call, strict=True))
        first = "x" if "x" in values else self.tensors[0]
        arguments.check_state(first, values[first])
        if values["target"] is None and values.get("u") is not None:
            given = arguments.describe(values["u"])
            raise TypeError(f"target must be given by name, target=…, where u is left out, got None, and {given} as u")
        for name in self.tensors[: self.inputs]:
            arguments.check_state(name, values[name], values[first], first)
        for name in (*self.tensors[self.inputs :], *self.numbers):
            if name == "weight" and values[name] is not None:
                check_weight(values[name], values[first], first)
            elif values[name] is not None or name not in self.optional:
                arguments.check_number(name, values[name], values[first])
        for name in self.flag_names:
            if not isinstance(values[name], str | bool) or values[name] not in CODES[name]:
                raise ValueError(f"{name} must be one of {', '.join(map(str, CODES[name]))}, got {values[name]!r}")
        c = values["c"]
        if c is None and values["kind"] == "elementwise":
            raise ValueError("c must be given for kind='elementwise', where it has no default, got None")
        if c is not None and values["kind"] == "squared":
            raise ValueError(f"c must be None for kind='squared', which does not use it, got {arguments.describe(c)}")
        if isinstance(c, float | int) and not arguments.compiling() and not c >= 0:
            raise ValueError(f"c must be at least 0, got {c!r}")
        if (u := values.get("u")) is not None and (name := values["parameterization"]) != "bcm":
            given = arguments.describe(u)
            raise ValueError(f"u must be None for parameterization={name!r}: only 'bcm' takes it, got {given}")
        if not isinstance(gradient, str) or gradient not in _GRADIENT:
            raise ValueError(f"gradient must be one of {', '.join(_GRADIENT)}, got {gradient!r}")


PSEUDO_HUBER = LossOp(
    "pseudo_huber", ("pred", "target", "weight?"), numbers=("c?",), flags=("int kind", "int reduction")
)
CONSISTENCY_LOSS = LossOp(
    "consistency_loss",
    ("F", "target", "x", "t", "u?", "weight?"),
    numbers=("c?", "sigma_data", "sigma_min"),
    flags=("int parameterization", "int scaled", "int kind", "int reduction"),
    inputs=3,
)
