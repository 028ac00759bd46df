"""Gradients that are formed with a value, kept in place of the inputs, and scaled when upstream is known."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bicm_kernels import backend
from bicm_kernels.ops import arguments
from bicm_kernels.ops.library import define
from bicm_kernels.torch_internals import is_batched_gradient, keeps_graph, refusing, transformed

Gradients = tuple[Tensor | None, ...]

_ops = torch.ops.bicm_kernels
_HALVES = (torch.float16, torch.bfloat16)
_TWICE = b"""the loss kept its gradient and not its inputs: a second derivative needs gradient="backward" or "auto\""""

define(
    "scale_gradients_(Tensor upstream, Tensor(a!)[] gradients) -> ()", ["gradients"], lambda upstream, gradients: None
)


def can_be_kept(inputs: Sequence[Tensor]) -> bool:
    """Whether no gradient is a half, which would lose digits before the upstream gradient is known."""
    return not any(x.dtype in _HALVES and x.requires_grad for x in inputs)


def _products(upstream: Tensor, kept: Sequence[Tensor]) -> list[Tensor]:
    """Copies in new memory."""
    columns = (-1, *[1] * (kept[0].dim() - 1)) if kept and upstream.dim() else ()
    return [upstream.reshape(columns).to(x.dtype) * x for x in kept]


_multiply = arguments.faithful(_ops.scale_gradients_.default)


def scaled(upstream: Tensor, kept: Sequence[Tensor]) -> Sequence[Tensor]:
    """Scale gradients for an upstream of 1 to the given upstream, in place unless a retained graph needs them again.

    On the CPU the upstream is read here; elsewhere the kernel reads it, and returns at once where it is 1.
    """
    direct = backend.direct
    if direct is not None and not (arguments.compiling() or keeps_graph()) and direct.scale_gradients_(upstream, kept):
        return kept
    # Tracers pass tensor subclasses that have no value to read.
    plain = type(upstream) is Tensor and not (arguments.compiling() or is_batched_gradient(upstream))
    if not plain or transformed() or keeps_graph():
        return _products(upstream, kept)
    if not (upstream.is_cpu and upstream.dim() == 0 and upstream.item() == 1.0):
        _multiply(upstream, kept)
    return kept


def differentiate(upstream: Tensor, kept: Sequence[Tensor]) -> Sequence[Tensor]:
    """The gradients that were kept, scaled; double backward raises."""
    if not torch.is_grad_enabled():
        return scaled(upstream, kept)
    with torch.no_grad():
        results = scaled(upstream, kept)
    return refusing(_TWICE, [*results]) if results else results


def filled(needs: Sequence[bool], results: Sequence[Tensor]) -> Gradients:
    """The gradients of all inputs in their order, None for one that is not needed."""
    found = iter(results)
    return tuple([next(found) if need else None for need in needs])
