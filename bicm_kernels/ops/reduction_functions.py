"""The autograd functions of reductions in eager calls, by what they keep between the passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from bicm_kernels.ops import arguments
from bicm_kernels.ops.kept_gradient import can_be_kept, differentiate, filled, scaled
from bicm_kernels.ops.op import direct_call
from bicm_kernels.torch_internals import (
    apply_of,
    call_backward_at_once,
    is_batched_gradient,
    saves_through_hooks,
    transformed,
)

if TYPE_CHECKING:
    from bicm_kernels.ops.reduction import Reduction

Kernel = Callable[..., Any]


class Kernels(NamedTuple):
    """An overload's ops: the value, its derivative, and both at once."""

    value: Kernel
    derivative: Kernel
    both: Kernel


# An op, its kernels, the arguments that are not tensors, and which states are tracked, see `bits`.
_Call = tuple["Reduction", Kernels, Sequence[Any], int]
# The value, and what it leaves for its derivative, where the native library has made them already.
_Made = tuple[Tensor, Sequence[Tensor]] | None


def bits(needs: Sequence[bool]) -> int:
    """The tensors whose gradients are needed, as the schemas say it."""
    found = 0
    for k, need in enumerate(needs):
        found += need << k
    return found


@lru_cache(maxsize=64)
def places(needs: int) -> tuple[int, ...]:
    """Where the bits are that are set."""
    return tuple(k for k in range(needs.bit_length()) if needs >> k & 1)


@arguments.faithful
def gradients(
    op: Reduction,
    kernel: Kernel,
    upstream: Tensor,
    sums: Sequence[Tensor],
    needs: int,
    tensors: Sequence[Any],
    rest: Sequence[Any],
) -> Sequence[Tensor]:
    """The derivatives that are needed, in one pass; through the reference where they are differentiated themselves."""
    if not (torch.is_grad_enabled() or is_batched_gradient(upstream) or transformed()):
        found: Sequence[Tensor] | None = None
        if op.goes_direct and not arguments.compiling():
            found = direct_call(f"{op.name}_backward", upstream, *sums, needs, *tensors, *rest)
        return kernel(upstream, *sums, needs, *op.joined(tensors, rest)) if found is None else found
    return _by_reference(op, upstream, needs, tensors, rest)


def _by_reference(
    op: Reduction, upstream: Tensor, needs: int, tensors: Sequence[Any], rest: Sequence[Any]
) -> Sequence[Tensor]:
    differentiable = torch.is_grad_enabled()
    states, others = op.divided(tensors)
    with torch.enable_grad():
        # Views, because one tensor may be given twice.
        inputs = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in states]
        value = op.plain_value([*inputs, *others], rest)
        return torch.autograd.grad(value, [inputs[k] for k in places(needs)], upstream, create_graph=differentiable)


# Only tracked states are arguments of their own, since torch takes .3 us for each. TorchScript has to see all tensors:
# it gets them so, with None in place of the tuple, and may run what it traced with others tracked.


def _seen(ctx: Any, call: _Call, given: Sequence[Any]) -> tuple[_Call, Sequence[Any]]:
    """A call that TorchScript traces, and its tensors."""
    return (*call[:3], bits(ctx.needs_input_grad[3:])), given


def _returned(ctx: Any, found: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Gradients in the places of the arguments that need them."""
    needs = ctx.needs_input_grad
    return (None, None, None, *found) if len(needs) == 3 + len(found) else filled(needs, found)


class Tracked(torch.autograd.Function):
    """An op for eager calls; what ``register_autograd`` makes for traced graphs costs several times as much."""

    @staticmethod
    def forward(ctx: Any, call: _Call, made: _Made, tensors: Sequence[Any] | None, *given: Any) -> Tensor:
        if tensors is None:
            call, tensors = _seen(ctx, call, given)
        op, kernels, rest, _ = call
        value, sums = made or op.opened(kernels.value(*op.joined(tensors, rest)))
        ctx.save_for_backward(*sums, *tensors)
        ctx.call = call
        return value

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> Any:
        op, kernels, rest, needs = ctx.call
        saved = ctx.saved_tensors  # read once, as checkpoints ask for
        sums, tensors = saved[: op.sums], saved[op.sums :]
        return _returned(ctx, gradients(op, kernels.derivative, upstreams[0], sums, needs, tensors, rest))


class Kept(torch.autograd.Function):
    """The same with the gradients formed with the value, kept in place of the tensors."""

    @staticmethod
    def forward(ctx: Any, call: _Call, made: _Made, tensors: Sequence[Any] | None, *given: Any) -> Tensor:
        if tensors is None:
            call, tensors = _seen(ctx, call, given)
        op, kernels, rest, needs = call
        value, found = made or kernels.both(needs, *op.joined(tensors, rest))
        ctx.save_for_backward(*found)
        return value

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> Any:
        return _returned(ctx, differentiate(upstreams[0], ctx.saved_tensors))


class KeptBeside(torch.autograd.Function):
    """The same with the gradients kept beside references to the tensors, which second derivatives need."""

    @staticmethod
    def forward(ctx: Any, call: _Call, made: _Made, tensors: Sequence[Any] | None, *given: Any) -> Tensor:
        if tensors is None:
            call, tensors = _seen(ctx, call, given)
        op, kernels, rest, needs = call
        value, found = made or kernels.both(needs, *op.joined(tensors, rest))
        ctx.save_for_backward(*found, *tensors)
        ctx.call = op, rest, needs, len(found)
        return value

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> Any:
        # All are unpacked: this raises where a tensor was written to in place, as it does for the other functions.
        saved, (op, rest, needs, count) = ctx.saved_tensors, ctx.call
        if torch.is_grad_enabled():
            return _returned(ctx, _twice(op, upstreams[0], needs, saved[count:], rest))
        return _returned(ctx, scaled(upstreams[0], saved[:count]))


_twice = arguments.faithful(_by_reference)

#: Which function records a call, by the name of its way.
FUNCTIONS: dict[str, type[torch.autograd.Function]] = {"backward": Tracked, "forward": Kept, "auto": KeptBeside}
for _function in FUNCTIONS.values():
    call_backward_at_once(_function)
#: Without the detour through Function.apply, which looks for transforms that an undisturbed call has not.
APPLIES: dict[str, Kernel] = {name: apply_of(function) for name, function in FUNCTIONS.items()}
#: The ways of a gradient, and what the native library calls them: see `Way` in csrc/torch/direct_losses.cpp.
GRADIENTS = {"auto": 2, "backward": 0, "forward": 1}


def way_of(gradient: str, states: Sequence[Tensor]) -> str:
    """How a call that autograd records gets its gradients: as it asks, or "backward" where they cannot be kept."""
    if gradient == "backward" or not can_be_kept(states):
        return "backward"
    # Hooks pack what is saved, such as copies in other memory: then it is the inputs alone.
    return "backward" if gradient == "auto" and saves_through_hooks() else gradient
