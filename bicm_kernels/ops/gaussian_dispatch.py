"""The gaussian family as rows of the table of ops: a step, and densities, which are three ops each.

A density's gradients are formed in the backward pass by re-reading the tensors, or together with the value and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bicm_kernels.ops import arguments
from bicm_kernels.ops.kept_gradient import Gradients, can_be_kept, differentiate
from bicm_kernels.ops.library import define, library
from bicm_kernels.ops.op import Op
from bicm_kernels.ops.row import NUMBERS, TENSORS, Call
from bicm_kernels.torch_internals import apply_of, bare, is_batched_gradient, transformed, undisturbed

_Kernel = Callable[..., Any]

#: The codes of the schemas' reduction flag.
ADDS_UP = {"mean": False, "sum": True}
_REDUCTIONS = {adds_up: name for name, adds_up in ADDS_UP.items()}
#: Whether the gradient is formed with the value.
_GRADIENT = {"backward": False, "forward": True}


def _check_choice(name: str, value: object, choices: dict[str, bool]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _row_of(tensors: Sequence[Tensor]) -> Tensor:
    """A number per sample, in the compute type, without a value."""
    wide = any(x.dtype == torch.float64 for x in tensors)
    return tensors[0].new_empty(tensors[0].shape[:1], dtype=torch.float64 if wide else torch.float32)


class Gaussian(Op):
    """Shared by steps and densities: a standard deviation, and a reduction that schemas take as a flag."""

    def named(self, call: Call) -> dict[str, Any]:
        named = super().named(call)
        return named | {"reduction": _REDUCTIONS[named.pop("adds_up")]}

    def check(self, call: Call, outs: Any) -> None:
        super().check(call, outs)
        std = dict(self.labelled(call))["std"]
        if isinstance(std, float | int) and not arguments.compiling() and not std >= 0:
            raise ValueError(f"std must be at least 0, got {std!r}")


class Step(Gaussian):
    """A step and its log-probability; allocates its results itself."""

    @property
    def writes(self) -> bool:
        return False

    def fake(self, tensors: list[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
        return torch.empty_like(tensors[0]), _row_of(tensors)

    def reduced(self, reduction: str, *call: Any) -> Any:
        """The op of a call that ends with its key, which the flag goes before."""
        try:
            adds_up = ADDS_UP[reduction]
        except (KeyError, TypeError):
            _check_choice("reduction", reduction, ADDS_UP)
            raise
        at = self.first_flag
        return self.call(*call[:at], adds_up, *call[at:])


class Kernels(NamedTuple):
    """An overload's ops: the value, its derivative, and both at once."""

    value: _Kernel
    derivative: _Kernel
    both: _Kernel


_SUFFIXES = ("", "_backward", "_with_gradients")


def _bits(needs: Sequence[bool]) -> int:
    """The tensors whose gradients are needed, as the schemas' bit mask."""
    found = 0
    for k, need in enumerate(needs):
        found += need << k
    return found


def _fill(needs: Sequence[bool], results: Sequence[Tensor]) -> Gradients:
    found = iter(results)
    return tuple(next(found) if need else None for need in needs)


# A density, its ops, and the arguments that are not states.
_Call = tuple["Density", Kernels, tuple[Any, ...]]


@arguments.faithful
def _gradients(
    density: Density, kernel: _Kernel, upstream: Tensor, needs: Sequence[bool], tensors: Sequence[Tensor], rest: Any
) -> Gradients:
    """The derivatives that are needed, in one pass; through the reference for double backward."""
    if not (torch.is_grad_enabled() or is_batched_gradient(upstream) or transformed()):
        return _fill(needs, kernel(upstream, _bits(needs), [*tensors], *rest))
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, because one tensor may be given twice.
        inputs = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in tensors]
        value = density.plain_value(inputs, rest)
        wanted = [x for x, need in zip(inputs, needs, strict=True) if need]
        return _fill(needs, torch.autograd.grad(value, wanted, upstream, create_graph=differentiable))


class Tracked(torch.autograd.Function):
    """The densities for eager calls; ``register_autograd``, used for traced graphs, costs several times as much."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.call = call
        value: Tensor = call[1].value([*tensors], *call[2])
        return value

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> Any:
        density, kernels, rest = ctx.call
        needs = ctx.needs_input_grad[1:]
        return None, *_gradients(density, kernels.derivative, upstreams[0], needs, ctx.saved_tensors, rest)


class Kept(torch.autograd.Function):
    """The same with the gradients formed with the value, kept in place of the tensors."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> Tensor:
        ctx.needs = ctx.needs_input_grad[1:]
        value: Tensor
        value, gradients = call[1].both(_bits(ctx.needs), [*tensors], *call[2])
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> Any:
        return None, *differentiate(upstreams[0], ctx.saved_tensors, ctx.needs)


# Skips Function.apply's check for transforms, which `quick` has ruled out.
_apply = apply_of(Tracked)
_apply_kept = apply_of(Kept)


@dataclass(eq=False)
class Density(Gaussian):
    """A number per sample from states; differentiable in each of them."""

    #: By the overload's name; "bare" is the one with numbers, called without torch's wrapper.
    kernels: dict[str, Kernels] = field(default_factory=dict)

    def define(self) -> None:
        """Define the ops, with numbers and with tensors; the latter, for traced graphs, have autograd."""
        for overload, types in (("", NUMBERS), (".tensor", TENSORS)):
            given = ", ".join(self.parameters(types))
            signatures = (
                f"({given}) -> Tensor",
                f"(Tensor upstream, int needs, {given}) -> Tensor[]",
                f"(int needs, {given}) -> (Tensor, Tensor[])",
            )
            names = [self.name + suffix for suffix in _SUFFIXES]
            fakes: tuple[_Kernel, ...] = (self.fake, self.fake_gradients, self.fake_both)
            for name, signature, fake in zip(names, signatures, fakes, strict=True):
                define(f"{name}{overload}{signature}", ["tensors"], fake)
            named = overload.lstrip(".") or "default"
            packets = [getattr(torch.ops.bicm_kernels, name) for name in names]
            self.kernels[named] = Kernels(*[getattr(packet, named) for packet in packets])
        self.kernels["bare"] = Kernels(*map(bare, self.kernels["default"]))
        self.register_derivatives()

    def fake(self, tensors: list[Tensor], *_: Any) -> Tensor:
        return _row_of(tensors)

    def fake_gradients(self, upstream: Tensor, needs: int, tensors: list[Tensor], *_: Any) -> list[Tensor]:
        """The gradients whose bits are set."""
        return [torch.empty_like(x) for k, x in enumerate(tensors) if needs >> k & 1]

    def fake_both(self, needs: int, tensors: list[Tensor], *_: Any) -> tuple[Tensor, list[Tensor]]:
        """The value, and gradients."""
        return _row_of(tensors), self.fake_gradients(tensors[0], needs, tensors)

    def register_derivatives(self) -> None:
        """Register the derivatives of the traced ops."""

        def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            tensors, weights, *rest = inputs
            numbers = [x for x in (*weights, *rest) if isinstance(x, Tensor)]
            ctx.save_for_backward(*tensors, *numbers)
            ctx.count, ctx.terms = len(tensors), len(weights)
            ctx.rest = [None if isinstance(x, Tensor) else x for x in rest]
            ctx.given = [isinstance(x, Tensor) for x in rest]

        def backward(ctx: Any, upstream: Tensor) -> Any:
            tensors, numbers = ctx.saved_tensors[: ctx.count], iter(ctx.saved_tensors[ctx.count :])
            weights = [next(numbers) for _ in range(ctx.terms)]
            rest = [next(numbers) if given else x for given, x in zip(ctx.given, ctx.rest, strict=True)]
            kernel = self.kernels["tensor"].derivative
            found = _gradients(self, kernel, upstream, ctx.needs_input_grad[0], tensors, (weights, *rest))
            return [*found], [None] * ctx.terms, *[None] * len(rest)

        def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
            needs, tensors, weights, *rest = inputs
            ctx.mark_non_differentiable(*output[1])
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*output[1])
            ctx.needs = [bool(needs >> k & 1) for k in range(len(tensors))]
            ctx.terms, ctx.count = len(weights), len(rest)

        def give_out(ctx: Any, upstream: Tensor | None, _: Any) -> Any:
            nothing = [None] * len(ctx.needs)
            found = nothing if upstream is None else [*differentiate(upstream, ctx.saved_tensors, ctx.needs)]
            return None, found, [None] * ctx.terms, *[None] * ctx.count

        for suffix, derivative, context in (("", backward, save), (_SUFFIXES[-1], give_out, keep)):
            name = f"bicm_kernels::{self.name}{suffix}.tensor"
            torch.library.register_autograd(name, derivative, setup_context=context, lib=library)

    def plain_value(self, tensors: Sequence[Tensor], rest: Sequence[Any]) -> Tensor:
        """The reference, called with states one by one and the schema's other arguments."""
        weights, guidance, std, adds_up = rest
        terms = len(weights)
        operands: list[Any] = [*tensors]
        if self.tensors and len(operands) == len(self.tensors) + terms + 1:
            operands[-2:] = [(operands[-2], operands[-1])]
        else:
            guidance = None
        result: Tensor = self.reference((operands, weights, guidance, std, adds_up))
        return result

    def reduced(self, reduction: str, gradient: str, *call: Any) -> Tensor:
        """The density of a call without its flag, by a kernel, or by the reference where one is needed."""
        try:
            call = (*call, ADDS_UP[reduction])
            keeps = _GRADIENT[gradient]
        except (KeyError, TypeError):
            _check_choice("reduction", reduction, ADDS_UP)
            _check_choice("gradient", gradient, _GRADIENT)
            raise
        if not arguments.dynamo():
            try:
                value = self.quick(call, keeps)
                if value is not None:
                    return value
            except arguments.FAILURES:
                pass  # the checked path below raises the full message
        return self.long(call, keeps)

    def quick(self, call: Call, keeps: bool) -> Tensor | None:
        """The value of an eager call with plain numbers; None for other calls."""
        tensors, full = self.spread(call)
        if not (undisturbed() and arguments.has_kernel(tensors[0]) and arguments.no_tensors(full[1:])):
            return None
        kernels = self.kernels["bare"]
        if not arguments.requires_grad(*tensors):
            value: Tensor = kernels.value(*full)
            return value
        rest = tuple(full[1:])
        apply = _apply_kept if keeps and can_be_kept(tensors) else _apply
        tracked: Tensor = apply((self, kernels, rest), *tensors)
        return tracked

    def long(self, call: Call, keeps: bool) -> Tensor:
        call = (call[0], arguments.weight_list("weights", call[1]), *call[2:])
        try:
            tensors, full = self.spread(call)
            numbers = arguments.numbers(full[1:])
            fallback = arguments.needs_reference(tensors[0], tracked=arguments.requires_grad(*numbers))
            # Under TorchScript, ops take tensors one by one, and fewer than a divergence needs.
            fallback = fallback or (arguments.scripting() and not self.tensors)
            if fallback or arguments.unseen(tensors[0]):
                self.check(call, None)
            if fallback:
                plain: Tensor = self.reference(call)
                return plain
            tracked, traced = arguments.requires_grad(*tensors), arguments.compiling() or arguments.scripting()
            overload = "default"
            # Only the overload with tensors records its derivative.
            if (traced and tracked) or arguments.compiling() or not arguments.no_tensors(numbers):
                overload, full = "tensor", self.as_tensors(call, full)
            kernels = self.kernels[overload]
            keeps = keeps and tracked and can_be_kept(tensors)
            if traced or not tracked:
                return self.traced(kernels, full, keeps)
            # Copies, because autograd would not detect that they were overwritten before the backward pass.
            copied = [[_copied(x) for x in full[1]], *map(_copied, full[2:])]
            function: Any = Kept if keeps else Tracked
            value: Tensor = function.apply((self, kernels, tuple(copied)), *tensors)
            return value
        except arguments.FAILURES as error:
            arguments.explain(error, lambda: self.check(call, None))

    def traced(self, kernels: Kernels, full: Sequence[Any], keeps: bool) -> Tensor:
        """The value, from ops that record their own derivative."""
        if keeps:
            needs = _bits([x.requires_grad for x in full[0]])
            value: Tensor = self.traceable(kernels.both)(needs, *full)[0]
            return value
        plain: Tensor = self.traceable(kernels.value)(*full)
        return plain


def _copied(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x


class Divergence(Density):
    """The divergence of two means. Schemas take their tensors as one list: the reference's, then the policy's."""

    def named(self, call: Call) -> dict[str, Any]:
        named = super().named(call)
        named.pop("guidance_scale")
        half = len(call[0]) // 2
        return named | {"reference": call[0][:half], "tensors": call[0][half:]}

    def spread(self, call: Call) -> tuple[list[Tensor], list[Any]]:
        tensors, weights, _, std, adds_up = call
        if len(tensors) != 2 * len(weights) or not all(isinstance(x, Tensor) for x in tensors):
            raise TypeError("as many tensors of the reference as weights, and no pairs")
        return [*tensors], [[*tensors], weights, 0.0, std, adds_up]

    def check_tensors(self, call: Call) -> dict[str, Any]:
        half = len(call[0]) // 2
        names = [f"{name}[{k}]" for name in ("reference", "tensors") for k in range(half)]
        found = dict(zip(names, call[0], strict=True))
        for name in (*names[half:], *names[:half]):
            arguments.check_state(name, found[name], None if name == names[half] else found[names[half]], names[half])
        return found

    def labelled(self, call: Call) -> list[tuple[str, Any]]:
        return [*[(f"weights[{k}]", weight) for k, weight in enumerate(call[1])], ("std", call[3])]

    def check_lists(self, tensors: Any, reference: Any, weights: Any) -> None:
        """Raise unless there are as many tensors of each kind as weights."""
        for name, value in (("tensors", tensors), ("reference", reference)):
            arguments.check_sequence(name, value)
        if not 1 <= len(tensors) <= 5:
            raise ValueError(f"tensors must hold 1 to 5 tensors, got {len(tensors)}")
        for name, value in (("reference", reference), ("weights", weights)):
            if len(value) != len(tensors):
                raise ValueError(f"{name} must be as many as the tensors, {len(tensors)}, got {len(value)}")


GAUSSIAN_STEP = Step(
    "gaussian_step",
    guided=True,
    weights=("weights",),
    numbers=("std",),
    flags=("bool adds_up",),
    noise="std",
    outs=("next", "log_prob"),
)
GAUSSIAN_LOG_PROB = Density(
    "gaussian_log_prob", ("next",), guided=True, weights=("weights",), numbers=("std",), flags=("bool adds_up",)
)
GAUSSIAN_KL = Divergence("gaussian_kl", guided=True, weights=("weights",), numbers=("std",), flags=("bool adds_up",))
