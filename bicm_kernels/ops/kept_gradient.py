"""Losses whose gradient is formed with the value, kept in place of the inputs, and scaled when upstream is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bicm_kernels.ops import arguments
from bicm_kernels.ops.library import define, library
from bicm_kernels.torch_internals import is_batched_gradient, keeps_graph, refusing, transformed

Gradients = tuple[Tensor | None, ...]

_ops = torch.ops.bicm_kernels
_HALVES = (torch.float16, torch.bfloat16)
_TWICE = b"""the loss kept its gradient and not its inputs: a second derivative needs gradient="backward\""""

define(
    "scale_gradients_(Tensor upstream, Tensor(a!)[] gradients) -> ()", ["gradients"], lambda upstream, gradients: None
)


def can_be_kept(inputs: Sequence[Tensor]) -> bool:
    """Whether no gradient is a half, which would lose digits before the upstream gradient is known."""
    return not any(x.dtype in _HALVES and x.requires_grad for x in inputs)


def wanted_bits(needs: Sequence[bool]) -> int:
    """The inputs whose gradients are needed, as the schemas' bit mask; the third may be a weight, which needs none."""
    return needs[0] + 2 * needs[1] + 4 * needs[2]


def _products(upstream: Tensor, kept: Sequence[Tensor]) -> list[Tensor]:
    """Copies in new memory."""
    columns = (-1, *[1] * (kept[0].dim() - 1)) if kept and upstream.dim() else ()
    return [upstream.reshape(columns).to(x.dtype) * x for x in kept]


def scaled(upstream: Tensor, kept: Sequence[Tensor]) -> Sequence[Tensor]:
    """Scale gradients for an upstream of 1 to the given upstream, in place unless a retained graph needs them again.

    On the CPU the upstream is read here; elsewhere the kernel reads it, and returns at once where it is 1.
    """
    # Tracers pass tensor subclasses that have no value to read.
    plain = type(upstream) is Tensor and not (arguments.compiling() or is_batched_gradient(upstream))
    if not plain or transformed() or keeps_graph():
        return _products(upstream, kept)
    if not (upstream.is_cpu and upstream.dim() == 0 and upstream.item() == 1.0):
        _ops.scale_gradients_.default(upstream, kept)
    return kept


def differentiate(upstream: Tensor, kept: Sequence[Tensor], needs: Sequence[bool]) -> Gradients:
    """The gradients of the inputs that need one, in their order; double backward raises."""
    with torch.no_grad():
        results = scaled(upstream, kept)
    if torch.is_grad_enabled() and results:
        results = refusing(_TWICE, [*results])
    found = iter(results)
    return tuple(next(found) if need else None for need in needs)


class Kept(torch.autograd.Function):
    """The losses for eager calls; ``call`` holds the op for value and gradients, and its non-tensor arguments."""

    @staticmethod
    def forward(ctx: Any, call: tuple[Callable[..., Any], tuple[Any, ...]], *tensors: Any) -> Tensor:
        op, options = call
        ctx.needs = ctx.needs_input_grad[1:]
        value, gradients = op(wanted_bits(ctx.needs), *tensors, *options)
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> Any:
        return None, *differentiate(upstreams[0], ctx.saved_tensors, ctx.needs)


def register(name: str) -> None:
    """Register the derivative of a traced op (int needs, ...) -> (value, gradients)."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
        gradients = output[1]
        ctx.mark_non_differentiable(*gradients)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*gradients)
        ctx.needs = [isinstance(x, Tensor) and bool(inputs[0] >> k & 1) for k, x in enumerate(inputs[1:])]

    def backward(ctx: Any, upstream: Tensor | None, _: Any) -> Gradients:
        if upstream is None:
            return (None,) * (1 + len(ctx.needs))
        return None, *differentiate(upstream, ctx.saved_tensors, ctx.needs)

    torch.library.register_autograd(f"bicm_kernels::{name}", backward, setup_context=setup_context, lib=library)
