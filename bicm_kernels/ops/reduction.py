"""Ops that reduce samples to numbers as rows of the table: each is three ops, since gradients form backward or with the
value, and are kept then in place of the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter

from bicm_kernels.ops import arguments
from bicm_kernels.ops.kept_gradient import can_be_kept, differentiate, filled
from bicm_kernels.ops.library import define, library
from bicm_kernels.ops.op import Op, derivatives
from bicm_kernels.ops.reduction_functions import (
    APPLIES,
    FUNCTIONS,
    GRADIENTS,
    Kernels,
    bits,
    gradients,
    way_of,
)
from bicm_kernels.ops.row import NUMBERS, TENSORS, Call
from bicm_kernels.torch_internals import bare, undisturbed

_Kernel = Callable[..., Any]

_SUFFIXES = ("", "_backward", "_with_gradients")


def check_choice(name: str, value: object, choices: dict[Any, Any]) -> None:
    """Raise unless a value is one of those that have a meaning."""
    if not isinstance(value, str | bool) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


@dataclass(eq=False)
class Reduction(Op):
    """A number from each sample's states, or one from all. A call has names where the schemas have codes of flags.

    A guided op's schemas take the tensors in one list, the states, and no others.
    """

    #: Where the states end among the tensors, in which it is differentiated; None: all are states.
    states_end: int | None = None
    # Of the class: see Row.__post_init__ for why an object has few attributes.
    #: How many tensors a value leaves for its derivative.
    sums: ClassVar[int] = 0
    #: Whether the native library has functions for it that bypass the dispatcher: see `direct_call`.
    goes_direct: ClassVar[bool] = False
    #: By the overload's name; "bare" is the one with numbers, called without torch's wrapper.
    kernels: dict[str, Kernels] = field(default_factory=dict)

    def define(self) -> None:
        """Define the ops, with numbers and with tensors; the latter, for traced graphs, have autograd."""
        sums = "Tensor sums, " * self.sums
        for overload, types in (("", NUMBERS), (".tensor", TENSORS)):
            given = ", ".join(self.parameters(types))
            signatures = (
                f"({given}) -> {'(Tensor, Tensor)' if self.sums else 'Tensor'}",
                f"(Tensor upstream, {sums}int needs, {given}) -> Tensor[]",
                f"(int needs, {given}) -> (Tensor, Tensor[])",
            )
            names = [self.name + suffix for suffix in _SUFFIXES]
            fakes: tuple[_Kernel, ...] = (self.fake, self.fake_gradients, self.fake_both)
            states = ("tensors",) if self.guided else self.tensors[: self.states_end]
            for name, signature, fake in zip(names, signatures, fakes, strict=True):
                define(f"{name}{overload}{signature}", states, fake)
            named = overload.lstrip(".") or "default"
            packets = [getattr(torch.ops.bicm_kernels, name) for name in names]
            self.kernels[named] = Kernels(*[getattr(packet, named) for packet in packets])
        self.kernels["bare"] = Kernels(*map(bare, self.kernels["default"]))
        self.register_derivatives()

    def value_like(self, tensors: Sequence[Any], rest: Sequence[Any]) -> Tensor:
        """The value of a call of a schema, without values: a number per sample, in the compute type."""
        wide = any(x.dtype == torch.float64 for x in tensors[: self.states_end])
        return tensors[0].new_empty(tensors[0].shape[:1], dtype=torch.float64 if wide else torch.float32)

    def fake(self, *call: Any) -> Any:
        tensors, rest = self.parted(call)
        value = self.value_like(tensors, rest)
        return (value, value.new_empty(tensors[0].shape[:1], dtype=torch.float64)) if self.sums else value

    def fake_gradients(self, upstream: Tensor, *call: Any) -> list[Tensor]:
        """The gradients whose bits are set."""
        needs, *given = call[self.sums :]
        return [torch.empty_like(x) for k, x in enumerate(self.parted(given)[0][: self.states_end]) if needs >> k & 1]

    def fake_both(self, needs: int, *call: Any) -> tuple[Tensor, list[Tensor]]:
        """The value, and gradients."""
        sums = [call[0]] * self.sums
        return self.value_like(*self.parted(call)), self.fake_gradients(call[0], *sums, needs, *call)

    def joined(self, tensors: Sequence[Any], rest: Sequence[Any]) -> Sequence[Any]:
        """The arguments of a schema, or what stands for each, from tensors one by one and the others."""
        return ([*tensors], *rest) if self.guided else (*tensors, *rest)

    def parted(self, call: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """The same the other way round."""
        return (call[0], call[1:]) if self.guided else (call[: self.first_number], call[self.first_number :])

    def divided(self, tensors: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """The states among the tensors, and the others."""
        end = len(tensors) if self.states_end is None else self.states_end
        return tensors[:end], tensors[end:]

    def opened(self, results: Any) -> tuple[Tensor, Sequence[Tensor]]:
        """The value, and what it leaves for its derivative."""
        return (results[0], results[1:]) if self.sums else (results, ())

    def register_derivatives(self) -> None:
        """Give the traced ops their derivatives."""

        def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            flat = arguments.numbers(inputs)
            ctx.save_for_backward(*self.opened(output)[1], *(x if isinstance(x, Tensor) else None for x in flat))
            ctx.plain = [None if isinstance(x, Tensor) else x for x in flat]
            ctx.lengths = [len(x) if isinstance(x, list | tuple) else -1 for x in inputs]

        def backward(ctx: Any, upstream: Tensor, *_: Any) -> Any:
            saved = ctx.saved_tensors  # read once, as checkpoints ask for
            sums, saved = saved[: self.sums], saved[self.sums :]
            flat = iter([x if tensor is None else tensor for x, tensor in zip(ctx.plain, saved, strict=True)])
            call = [next(flat) if n < 0 else [next(flat) for _ in range(n)] for n in ctx.lengths]
            tensors, rest = self.parted(call)
            needs = self.parted(ctx.needs_input_grad)[0]
            found = gradients(self, self.kernels["tensor"].derivative, upstream, sums, bits(needs), tensors, rest)
            return (*self.joined(filled(needs, found), nothing_for(rest)),)

        def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
            needs, *call = inputs
            tensors, rest = self.parted(call)
            ctx.mark_non_differentiable(*output[1])
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*output[1])
            ctx.needs, ctx.nothing = [bool(needs >> k & 1) for k in range(len(tensors))], nothing_for(rest)

        def give_out(ctx: Any, upstream: Tensor | None, _: Any) -> Any:
            needs = ctx.needs
            if upstream is None:
                return None, *self.joined([None] * len(needs), ctx.nothing)
            return None, *self.joined(filled(needs, differentiate(upstream, ctx.saved_tensors)), ctx.nothing)

        def nothing_for(rest: Sequence[Any]) -> list[Any]:
            return [[None] * len(x) if isinstance(x, list | tuple) else None for x in rest]

        for suffix, derivative, context in (("", backward, save), (_SUFFIXES[-1], give_out, keep)):
            name = f"bicm_kernels::{self.name}{suffix}.tensor"
            torch.library.register_autograd(name, derivative, setup_context=context, lib=library)
            derivatives.add(f"{name.replace('::', '/')}/Autograd")

    def plain_value(self, tensors: Sequence[Any], rest: Sequence[Any]) -> Tensor:
        """The reference of what a schema takes."""
        raise NotImplementedError

    def spelled(self, call: Call) -> tuple[Sequence[Any], Sequence[Any]]:
        """The tensors of a call one by one, and the others as the schemas have them; raises for what has no meaning."""
        raise NotImplementedError

    def laid_out(self, tensors: Sequence[Any]) -> Sequence[Any]:
        """The tensors as the kernels take them; numbers among them as tensors."""
        return tensors

    def rest_as_tensors(self, call: Call, rest: Sequence[Any]) -> Sequence[Any]:
        """The others as the overload with tensors takes them."""
        raise NotImplementedError

    def reduced(self, call: Call, gradient: str) -> Tensor:
        """The value of a call, by a kernel, or by the reference where something asks for it."""
        if not arguments.dynamo():
            try:
                value = self.quick(call, gradient)
                if value is not None:
                    return value
            except arguments.FAILURES:
                pass  # the long way says why
        try:
            check_choice("gradient", gradient, GRADIENTS)
            return self.long(call, gradient)
        except arguments.FAILURES as error:
            arguments.explain(error, lambda: self.check_all(call, gradient))

    def quick(self, call: Call, gradient: str) -> Tensor | None:
        """The value of an eager call of plain numbers; None where a call is another."""
        if not (undisturbed() and gradient in GRADIENTS):
            return None
        tensors, rest = self.spelled(call)
        if not (arguments.has_kernel(tensors[0]) and arguments.no_tensors(rest)):
            return None
        (states, others), tracked = self.divided(tensors), False
        for x in states:
            if type(x) is not Tensor and type(x) is not Parameter:
                return None
            tracked = tracked or x.requires_grad
        for x in others:
            if x is not None and (type(x) is not Tensor or x.requires_grad):
                return None
        kernels = self.kernels["bare"]
        if tracked and torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            for x in tensors:
                if x is not None and x.is_inference():
                    return None  # torch could not save it
            apply = APPLIES[way_of(gradient, states)]
            value: Tensor = apply(*self.recorded(kernels, tensors, rest))
            return value
        return self.opened(kernels.value(*self.joined(tensors, rest)))[0]

    def long(self, call: Call, gradient: str) -> Tensor:
        tensors, rest = self.spelled(call)
        numbers = arguments.numbers(rest)
        others = self.divided(tensors)[1]
        fallback = arguments.needs_reference(tensors[0], tracked=arguments.requires_grad(*others, *numbers))
        # What TorchScript traces takes tensors one by one, and fewer than a divergence has.
        fallback = fallback or (arguments.scripting() and self.guided and not self.tensors)
        if fallback or arguments.unseen(tensors[0]):
            self.check(call, None)
        if fallback:
            recorded = torch.is_grad_enabled() and not arguments.compiling()
            plain: Tensor = self.reference(arguments.saveables(call) if recorded else call)
            return plain
        tensors = self.laid_out(tensors)
        states = tensors[: self.states_end]
        recorded = arguments.compiling() or not torch.is_inference_mode_enabled()
        tracked = recorded and arguments.requires_grad(*states)
        # TorchScript finds an overload by its arguments: without a list of tensors, the one with numbers.
        traced = arguments.compiling() or (self.guided and arguments.scripting())
        overload = "default"
        # The overload with tensors alone records its derivative.
        if (traced and tracked) or arguments.compiling() or not arguments.no_tensors(numbers):
            overload, rest = "tensor", self.rest_as_tensors(call, rest)
        kernels = self.kernels[overload]
        if traced or not tracked:
            given = self.joined(tensors, rest)
            if tracked and gradient == "forward" and can_be_kept(states):
                return self.traceable(kernels.both)(bits([x.requires_grad for x in states]), *given)[0]
            return self.opened(self.traceable(kernels.value)(*given))[0]
        if gradient == "auto" and (arguments.unseen(tensors[0]) or arguments.scripting()):
            gradient = "backward"  # kept gradients are scaled by a number that is read, which no traced graph can do
        if any(isinstance(x, Tensor) and x.is_inference() for x in tensors):
            # Torch saves no such tensor: kept gradients need none, and the backward pass reads copies.
            gradient = "forward" if gradient == "auto" else gradient
            if way_of(gradient, states) == "backward":
                tensors = [arguments.saveable(x) for x in tensors]
        # Copies, because nothing would notice if they were overwritten before the backward pass.
        copied = [[_copied(y) for y in x] if isinstance(x, list | tuple) else _copied(x) for x in rest]
        value: Tensor = FUNCTIONS[way_of(gradient, states)].apply(*self.recorded(kernels, tensors, copied))
        return value

    def recorded(self, kernels: Kernels, tensors: Sequence[Any], rest: Sequence[Any]) -> Sequence[Any]:
        """The arguments of the autograd function of a call that no kernel has run yet."""
        tracked = [x.requires_grad for x in tensors[: self.states_end]]
        call = self, kernels, rest, bits(tracked)
        if arguments.scripting():
            return call, None, None, *tensors
        return call, None, tensors, *compress(tensors, tracked)

    def check_all(self, call: Call, gradient: object) -> None:
        """Raise what is wrong with a call, if anything is."""
        self.check(call, None)
        check_choice("gradient", gradient, GRADIENTS)


def _copied(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x
