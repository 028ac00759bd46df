"""Arguments of the ops: when a kernel may run, how numbers become tensors, and messages for invalid calls.

The kernels check their arguments in C++ and raise terse errors; after a failure `explain` builds the full message. It
applies the same rules and names the argument, what was given and what was expected. Valid calls skip it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache, wraps
from numbers import Integral, Real
from typing import Any, NoReturn

import torch
from torch import Tensor

from bicm_kernels import backend
from bicm_kernels.reference import arithmetic
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

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WORD = 2**32
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
    """An integer of a key as schemas take it: NumPy's as Python's, seeds signed; other values unchanged."""
    if type(value) is int:
        return signed(value)
    return signed(int(value)) if isinstance(value, Integral) else value


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
    if plain and 0 <= step < WORD and 0 <= sample_id <= WORD - batch:
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


def describe(value: object) -> str:
    """A short description of a value, for error messages."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    kind, text = type(value).__name__, repr(value)
    if len(text) <= 60 and "tensor(" not in text and "array(" not in text:
        return f"{text} ({kind})"
    if isinstance(value, list | tuple):
        return f"a {kind} of {len(value)} ({', '.join(dict.fromkeys(type(x).__name__ for x in value))})"
    shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
    return f"a {kind}{shape}"


def tensor_in(value: Any) -> str:
    """The tensor's place in a network's output, for error messages; empty where it is not known."""
    if isinstance(value, tuple | list):
        return "; pass its first element" if value and isinstance(value[0], Tensor) else ""
    for name in ("sample", *getattr(value, "__dict__", {})):
        if isinstance(getattr(value, name, None), Tensor):
            return f"; pass its .{name}"
    if isinstance(value, Mapping):
        return next((f"; pass its [{name!r}]" for name, x in value.items() if isinstance(x, Tensor)), "")
    return "; torch.from_numpy makes one of it" if type(value).__module__ == "numpy" and hasattr(value, "shape") else ""


def check_sequence(name: str, value: Any, instead: str = "[x]") -> None:
    """Raise unless ``value`` is a sequence of tensors rather than one tensor."""
    arithmetic.check_sequence(name, value, instead)
    if not hasattr(value, "__len__") or not hasattr(value, "__getitem__"):
        raise TypeError(f"{name}: expected a sequence of tensors, got {describe(value)}")


def check_state(
    name: str,
    x: object,
    first: Tensor | None = None,
    first_name: str = "",
    dtypes: Collection[torch.dtype] = FLOATING,
    expected: str = "float16, bfloat16, float32 or float64",
) -> None:
    """Raise unless ``x`` is a (B, ...) tensor of one of these dtypes that agrees with the first in shape and device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {describe(x)}{tensor_in(x)}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must be {expected}, got {x.dtype}")
    if x.dim() == 0:
        raise ValueError(f"{name} must have a batch dimension, (B, ...), got a 0-d tensor")
    if first is None:
        return
    if x.shape != first.shape:
        raise ValueError(f"{name} must have the shape of {first_name}, {tuple(first.shape)}, got {tuple(x.shape)}")
    if x.device != first.device:
        raise ValueError(f"{name} must be on the device of {first_name}, {first.device}, got {x.device}")


def check_number(name: str, value: object, first: Tensor) -> None:
    """Raise unless ``value`` is a float, a 0-d or a (B,) floating tensor."""
    if not isinstance(value, Tensor):
        if not isinstance(value, Real | torch.SymFloat | torch.SymInt):
            raise TypeError(f"{name} must be a float, a 0-d tensor or a (B,) tensor, got {describe(value)}")
        return
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be a floating tensor, got {value.dtype}")
    check_per_sample(name, value, first.shape[0], first.device)


def check_per_sample(name: str, value: Tensor, batch: int, device: torch.device) -> None:
    """Raise unless a tensor argument is 0-d or (B,) and on a device that the kernel can read."""
    if value.dim() > 1 or (value.dim() == 1 and value.shape[0] != batch):
        raise ValueError(f"{name} must be a 0-d or a ({batch},) tensor, got shape {tuple(value.shape)}")
    if value.device != device and not (value.dim() == 0 and value.device.type == "cpu"):
        raise ValueError(f"{name} must be on {device}, got {value.device}")


def check_integer(name: str, value: object, batch: int, device: torch.device, low: int, high: int) -> None:
    """Raise unless ``value`` is an int in [low, high), or a 0-d or (B,) int64 tensor."""
    if isinstance(value, Tensor):
        if value.dtype != torch.int64:
            whole = not (value.is_floating_point() or value.is_complex())
            hint = f"; {name}.long() makes one" if whole else ""
            raise TypeError(f"{name} must be an int or an int64 tensor, got {value.dtype}{hint}")
        check_per_sample(name, value, batch, device)
    elif not isinstance(value, Integral | torch.SymInt):
        several = hasattr(value, "__len__") and not isinstance(value, str | bytes)
        hint = f"; torch.as_tensor({name}, dtype=torch.int64) makes one" if several else ""
        if isinstance(value, torch.Generator):
            raise TypeError(f"{name} must be an int or an int64 tensor, got a torch.Generator; pass its initial_seed()")
        raise TypeError(f"{name} must be an int or an int64 tensor, got {describe(value)}{hint}")
    else:
        check_range(name, value, low, high)


def check_range(name: str, value: object, low: int, high: int) -> None:
    """Raise unless an int is in [low, high); tensors are not read."""
    if not isinstance(value, Tensor) and not low <= value < high:  # type: ignore[operator]
        raise ValueError(f"{name} must be in [{power(low)}, {power(high)}), got {value}")


def power(bound: int) -> str:
    """A bound of an integer range in readable form, such as 2**32."""
    if abs(bound) < WORD:
        return str(bound)
    return f"{'-' if bound < 0 else ''}2**{round(math.log2(abs(bound)))}"


def check_key(seed: object, step: object, sample_id: object, batch: int, device: torch.device) -> None:
    """Raise unless seed, step and sample_id can key the noise of a batch."""
    if seed is None:
        raise ValueError("seed must be given where noise is drawn (noise_weight is not zero), got None")
    check_integer("seed", seed, batch, device, -(2**63), 2**64)
    check_integer("step", step, batch, device, 0, WORD)
    check_integer("sample_id", sample_id, batch, device, 0, WORD)
    if isinstance(sample_id, Integral):
        sample_id = int(sample_id)  # arithmetic on NumPy's integers overflows
    if isinstance(sample_id, int) and sample_id + batch > WORD:
        raise ValueError(f"sample_id + B must be at most 2**32, got {sample_id} + {batch}")
    per_sample_seed = isinstance(seed, Tensor) and seed.dim() == 1
    if per_sample_seed and (isinstance(sample_id, Tensor) or sample_id != 0):
        raise ValueError(f"sample_id must be left at 0 where seed holds one seed per sample, got {describe(sample_id)}")


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
