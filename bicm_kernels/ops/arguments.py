"""Arguments of the ops: when a kernel may run, how numbers become tensors, and what a failed call raises.

The kernels check their arguments in C++ and raise terse errors; after a failure `explain` raises the full message of
`checks`.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any, NoReturn

import torch
from torch import Tensor

from bicm_kernels import backend
from bicm_kernels.ops.checks import WORD, check_key, describe, is_index
from bicm_kernels.torch_internals import (
    differs_between_slices,
    dispatch_modes,
    inside_vmap,
    is_batched_gradient,
    is_tracing,
    transformed,
    transforms_alone,
)

Number = float | Tensor
Integer = int | Tensor

#: The errors of an invalid call; `explain` then builds the message.
FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, OverflowError)
#: The prefix of errors from the kernels' argument checks; errors of CUDA and of torch lack it.
REFUSED = "bicm_kernels: "

#: The default of noise_weight. Identity shows that the caller omitted it, at no cost; a 0.0 that is passed
#: is another object, and where it is the same one, the only effect is a needless warning.
UNWEIGHTED = 0.0
_unweighted: set[str] = set()

compiling = torch.compiler.is_compiling
#: Whether Dynamo traces, which does not support the native library's own functions.
dynamo = torch.compiler.is_dynamo_compiling


def scripting() -> bool:
    """Whether TorchScript traces; never called under Dynamo, which cannot trace this check."""
    return not dynamo() and is_tracing()


_NO_TENSORS = frozenset((float, int, bool, list, tuple, type(None)))


def is_tensor(value: object) -> bool:
    """Whether a value is a tensor; isinstance takes long to say that one is none."""
    return type(value) not in _NO_TENSORS and isinstance(value, Tensor)


def unseen(first: Tensor) -> bool:
    """Whether no kernel checks this call: it is traced, or its tensors have no memory."""
    return compiling() or dispatch_modes() > 0 or first.is_meta


def has_kernel(first: Tensor) -> bool:
    """Whether a kernel runs on the tensor's device."""
    if first.is_cpu:
        return backend.cpu_is_compiled
    return not first.is_meta and backend.running(first.device.type) != "reference"


def requires_grad(*values: object) -> bool:
    """Whether autograd would record an operation on any of these values."""
    if torch.is_grad_enabled():
        for x in values:
            if isinstance(x, Tensor) and x.requires_grad:
                return True
    return False


def needs_reference(first: Tensor, *, tracked: bool) -> bool:
    """Whether the call needs the differentiable PyTorch reference."""
    return backend.running(first.device.type) == "reference" or tracked or transformed()


def plain_gradient(gradient: Tensor) -> bool:
    """Whether a kernel may compute a derivative: it is not differentiated or mapped again."""
    return not (is_batched_gradient(gradient) or requires_grad(gradient) or transformed())


def check_vmap(seed: object) -> None:
    """Raise under ``torch.vmap`` unless seeds are per sample: every slice would draw the same noise."""
    if not transforms_alone() or not inside_vmap():
        return
    if not isinstance(seed, Tensor) or (seed.dim() == 0 and not differs_between_slices(seed)):
        raise ValueError(
            f"seed must hold one seed per sample, a (B,) int64 tensor, under torch.vmap, got {describe(seed)}: "
            "each slice would repeat the same noise"
        )


def numbers(values: Sequence[Any]) -> list[Any]:
    """The numbers of a step, with lists of coefficients flattened."""
    flat: list[Any] = []
    for value in values:
        if isinstance(value, list | tuple):
            flat += value
        else:
            flat.append(value)
    return flat


def weight_list(name: str, weights: Sequence[Any]) -> list[Any]:
    """The weights of an affine map as a list."""
    try:
        return list(weights)
    except TypeError:
        hint = f"; write [{weights}]" if isinstance(weights, float | int) else ""
        raise TypeError(f"{name} must hold one weight per tensor, got {describe(weights)}{hint}") from None


def saveable(value: Any) -> Any:
    """A value that torch saves for the backward pass: a copy of a tensor made in inference mode."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def saveables(call: Sequence[Any]) -> list[Any]:
    """The same for the arguments of a call."""
    return [saveables(x) if isinstance(x, list | tuple) else saveable(x) for x in call]


def plain(values: Sequence[Any]) -> bool:
    """Whether a call holds Python numbers only and is not traced: they are then passed unchanged."""
    return not compiling() and no_tensors(values)


def no_tensors(values: Sequence[Any]) -> bool:
    """Whether all values are Python numbers."""
    for value in values:
        kind = type(value)
        if kind is float or kind is int or value is None:
            continue
        if isinstance(value, Tensor) or (kind in (list, tuple) and not no_tensors(value)):
            return False
    return True


# Making a tensor of a number takes longer than a small kernel, and these are never written to: cache them. An inference
# tensor could not be saved for a backward pass.
@lru_cache(1024)
def _kept_float(value: float, sign: float) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=torch.float64, device="cpu")


@lru_cache(1024)
def _kept_integer(value: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(signed(value), dtype=torch.int64, device="cpu")


def coefficient(value: Number) -> Tensor:
    """A float as a 0-d float64 tensor; tensors unchanged. In a traced graph a product avoids specialisation."""
    if isinstance(value, Tensor):
        return value
    if compiling():
        return torch.ones((), dtype=torch.float64) * value
    if dispatch_modes() > 0:  # such a mode would put its own tensor class into the cache
        return torch.tensor(value, dtype=torch.float64, device="cpu")
    return _kept_float(value, math.copysign(1.0, value))  # 0.0 and -0.0 are equal


def coefficients(values: Sequence[Any]) -> list[Any]:
    """The values of a step as tensors: lists element by element, None unchanged."""
    make = coefficient if compiling() or dispatch_modes() > 0 else _kept
    return [
        None if value is None else [make(x) for x in value] if isinstance(value, (list, tuple)) else make(value)
        for value in values
    ]


def _kept(value: Number) -> Tensor:
    # Checked first, because isinstance with Tensor is slow for numbers.
    return _kept_float(value, math.copysign(1.0, value)) if type(value) is float else coefficient(value)


def signed(seed: int) -> int:
    """A seed in [-2^63, 2^64) as the signed 64-bit integer with the same bits."""
    return seed - 2**64 if 2**63 <= seed < 2**64 else seed


def counter(value: Any) -> Any:
    """An integer as schemas take it: NumPy's as Python's, seeds signed; tensors and None unchanged.

    Raises TypeError for other values, which torch would truncate.
    """
    if type(value) is int:
        return signed(value)
    if value is None or isinstance(value, Tensor | torch.SymInt):
        return value
    return signed(operator.index(value))


def whole(value: Any) -> Any:
    """NumPy's integers as Python's; other values unchanged."""
    if isinstance(value, int | float | Tensor | torch.SymInt) or value is None or not is_index(value):
        return value
    return operator.index(value)


def integer(value: Integer) -> Tensor:
    """An int as a 0-d int64 tensor; tensors unchanged."""
    if isinstance(value, Tensor):
        return value
    if compiling():
        return torch.full((), signed(value), dtype=torch.int64)  # it must stay symbolic
    value = int(value)  # arithmetic on NumPy's integers overflows
    return torch.tensor(signed(value), dtype=torch.int64, device="cpu") if dispatch_modes() else _kept_integer(value)


def key(seed: Integer | None, step: Integer, sample_id: Integer, like: Tensor) -> tuple[Tensor | None, ...]:
    """The integers of a noise key as tensors; checked here, because a tensor's value is not read later."""
    if seed is None:
        return None, None, None
    batch = like.shape[0]
    plain = type(seed) is type(step) is type(sample_id) is int and -(2**63) <= seed < 2**64
    # The size of an exported batch is not compared, which would bound it.
    if plain and 0 <= step < WORD and 0 <= sample_id <= WORD - (0 if torch.compiler.is_exporting() else batch):
        if not (compiling() or dispatch_modes()):
            return _kept_integer(seed), _kept_integer(step), _kept_integer(sample_id)
    else:
        check_key(seed, step, sample_id, batch, like.device)
    return integer(seed), integer(step), integer(sample_id)


def notice_unweighted(name: str) -> None:
    """Warn once that a seed without a noise_weight draws nothing."""
    if dynamo() or name in _unweighted:
        return
    _unweighted.add(name)
    text = "no noise is drawn: pass noise_weight=..., or noise_weight=0.0 where none is meant"
    warnings.warn(f"{name}: seed is given and noise_weight is left at 0.0, so {text}", UserWarning, stacklevel=3)


def faithful(derivative: Callable[..., Any]) -> Callable[..., Any]:
    """A derivative whose errors have torch's exception classes."""

    @wraps(derivative)
    def call(*args: Any) -> Any:
        try:
            return derivative(*args)
        except RuntimeError as error:
            fail(error)

    return call


def explain(error: Exception, check: Callable[[], None]) -> NoReturn:
    """Raise the error that the check finds in a failed call, or the original error where it finds none."""
    try:
        check()
    except (TypeError, ValueError) as better:
        raise better from None
    _, refused, reason = str(error).partition(REFUSED)
    if refused:
        raise ValueError(reason.splitlines()[0]) from None
    fail(error)


def fail(error: Exception) -> NoReturn:
    """Raise an error that no argument caused, with torch's exception class.

    Every error that crosses the stable ABI arrives as a RuntimeError.
    """
    if type(error) is RuntimeError and "out of memory" in str(error):
        raise torch.OutOfMemoryError(str(error)) from None
    raise error
