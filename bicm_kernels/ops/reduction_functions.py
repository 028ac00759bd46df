"""The autograd functions of reductions in eager calls, by what they keep between the passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from bicm_kernels.ops import arguments
from bicm_kernels.ops.kept_gradient import Gradients, can_be_kept, differentiate, filled, scaled
from bicm_kernels.ops.op import direct_call
from bicm_kernels.torch_internals import apply_of, is_batched_gradient, saves_through_hooks, transformed

if TYPE_CHECKING:
    from bicm_kernels.ops.reduction import Reduction

Kernel = Callable[..., Any]


class Kernels(NamedTuple):
    """An overload's ops: the value, its derivative, and both at once."""

    value: Kernel
    derivative: Kernel
    both: Kernel


# An op, its kernels, and the arguments that are not tensors.
_Call = tuple["Reduction", Kernels, Sequence[Any]]
# The value, and what it leaves for its derivative, where the native library has made them already.
_Made = tuple[Tensor, Sequence[Tensor]] | None


def bits(needs: Sequence[bool]) -> int:
    """The tensors whose gradients are needed, as the schemas say it."""
    found = 0
    for k, need in enumerate(needs):
        found += need << k
    return found


@arguments.faithful
def gradients(
    op: Reduction,
    kernel: Kernel,
    upstream: Tensor,
    sums: Sequence[Tensor],
    needs: Sequence[bool],
    tensors: Sequence[Any],
    rest: Sequence[Any],
) -> Gradients:
    """The derivatives that are needed, in one pass; through the reference where they are differentiated themselves."""
    if not (torch.is_grad_enabled() or is_batched_gradient(upstream) or transformed()):
        found = None
        if op.goes_direct and not arguments.compiling():
            found = direct_call(f"{op.name}_backward", upstream, *sums, bits(needs), *tensors, *rest)
        if found is None:
            found = kernel(upstream, *sums, bits(needs), *op.joined(tensors, rest))
        return filled(needs, found)
    return _by_reference(op, upstream, needs, tensors, rest)


def _by_reference(
    op: Reduction, upstream: Tensor, needs: Sequence[bool], tensors: Sequence[Any], rest: Sequence[Any]
) -> Gradients:
    differentiable = torch.is_grad_enabled()
    states, others = op.divided(tensors)
    with torch.enable_grad():
        # Views, because one tensor may be given twice.
        inputs = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in states]
        value = op.plain_value([*inputs, *others], rest)
        wanted = [x for x, need in zip(inputs, needs, strict=False) if need]
        return filled(needs, torch.autograd.grad(value, wanted, upstream, create_graph=differentiable))


class Tracked(torch.autograd.Function):
    """An op for eager calls; what ``register_autograd`` makes for traced graphs costs several times as much."""

    @staticmethod
    def forward(ctx: Any, call: _Call, made: _Made, *tensors: Any) -> Tensor:
        op, kernels, rest = call
        value, sums = made or op.opened(kernels.value(*op.joined(tensors, rest)))
        ctx.save_for_backward(*sums, *tensors)
        ctx.call = call
        return value

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> Any:
        op, kernels, rest = ctx.call
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[2:]  # read once, as checkpoints ask for
        sums, tensors = saved[: op.sums], saved[op.sums :]
        return None, None, *gradients(op, kernels.derivative, upstreams[0], sums, needs, tensors, rest)


class Kept(torch.autograd.Function):
    """The same with the gradients formed with the value, kept in place of the tensors."""

    @staticmethod
    def forward(ctx: Any, call: _Call, made: _Made, *tensors: Any) -> Tensor:
        op, kernels, rest = call
        ctx.needs = ctx.needs_input_grad[2:]
        value, found = made or kernels.both(bits(ctx.needs), *op.joined(tensors, rest))
        ctx.save_for_backward(*found)
        return value

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> Any:
        return None, None, *differentiate(upstreams[0], ctx.saved_tensors, ctx.needs)


class KeptBeside(torch.autograd.Function):
    """The same with the gradients kept beside references to the tensors, which second derivatives need."""

    @staticmethod
    def forward(ctx: Any, call: _Call, made: _Made, *tensors: Any) -> Tensor:
        op, kernels, rest = call
        value, found = made or kernels.both(bits(ctx.needs_input_grad[2:]), *op.joined(tensors, rest))
        ctx.save_for_backward(*found, *tensors)
        ctx.call = op, rest, len(found)
        return value

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> Any:
        # All are unpacked: this raises where a tensor was written to in place, as it does for the other functions.
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad
        op, rest, kept = ctx.call
        if torch.is_grad_enabled():
            return None, None, *_twice(op, upstreams[0], needs[2:], saved[kept:], rest)
        return filled(needs, scaled(upstreams[0], saved[:kept]))


_twice = arguments.faithful(_by_reference)

#: Which function records a call, by the name of its way.
FUNCTIONS: dict[str, type[torch.autograd.Function]] = {"backward": Tracked, "forward": Kept, "auto": KeptBeside}
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
