"""Keyed noise: a pure function of (seed, sample, step, element), the same bits on every device and in every batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from bicm_kernels import backend, reference
from bicm_kernels.ops import arguments, checks
from bicm_kernels.ops.arguments import Integer, Number, dynamo
from bicm_kernels.ops.multistep import affine_gradient
from bicm_kernels.ops.op import Op
from bicm_kernels.ops.row import Call

#: The version of the mapping from keys to numbers. Stored test vectors check it; a change is a breaking change.
NOISE_VERSION = 1


@dataclass(eq=False)
class Draw(Op):
    """Keyed numbers, written to a tensor of the requested shape: (out, seed, step, sample_id)."""

    keyed: bool = True
    outs: tuple[str, ...] = ()

    def reference(self, call: Call) -> Tensor:
        named = self.named(call)
        out = named.pop("out")
        return getattr(reference, self.name)(out.shape, dtype=out.dtype, device=out.device, **named)

    def check_tensor(self, name: str, x: object, first: Tensor | None, first_name: str) -> None:
        checks.check_state("shape", x)


NORMAL = Draw("normal", ("out!",))
UNIFORM = Draw("uniform", ("out!",))


def _empty(shape: Sequence[int], dtype: torch.dtype | None, device: torch.device | str | None) -> Tensor:
    dtype = dtype or torch.get_default_dtype()
    if dtype not in checks.FLOATING:
        raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
    direct = backend.direct
    if direct is not None and getattr(device, "type", device) in (None, "cpu") and not dynamo():
        kept: Tensor | None = direct.empty_on_host(shape, dtype)
        if kept is not None:
            return kept
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    except RuntimeError:
        if not isinstance(shape, int) and any(size < 0 for size in shape):
            raise ValueError(f"shape must hold sizes of at least 0, got {tuple(shape)}") from None
        raise
    except TypeError:
        if device is not None and not isinstance(device, str | torch.device | int):
            raise
        raise TypeError(f"shape must be a sequence of integers (B, ...), got {checks.describe(shape)}") from None


def normal(
    shape: Sequence[int],
    *,
    seed: Integer,
    step: Integer = 0,
    sample_id: Integer = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal numbers keyed by (seed, sample, step, element); they do not depend on device, batch or layout.

    Args:
        shape: (B, ...); sample b draws as sample ``sample_id + b``.
        seed: int in [-2^63, 2^64), a 0-d int64 tensor, or a (B,) int64 tensor of one seed per sample (then sample = 0).
        step: int in [0, 2^32) or an int64 tensor, 0-d or (B,); different steps draw different noise.
        sample_id: int in [0, 2^32), a 0-d int64 tensor, or a (B,) int64 tensor of the ids themselves.
        dtype: float16, bfloat16, float32 or float64 (torch's default); float32 numbers rounded once, |n| <= 6.77.
        device: the result's device.

    Raises:
        TypeError, ValueError: an argument has another type, shape or range.

    Philox4x32-10 at counter (e // 4, sample, step), then Box-Muller; see ``NOISE_VERSION``.

    >>> import torch, bicm_kernels as bk
    >>> torch.equal(bk.normal((8, 3), seed=1)[5:], bk.normal((3, 3), seed=1, sample_id=5))
    True
    """
    return NORMAL.call(_empty(shape, dtype, device), seed, step, sample_id)


def uniform(
    shape: Sequence[int],
    *,
    seed: Integer,
    step: Integer = 0,
    sample_id: Integer = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniform numbers in (0, 1], keyed by (seed, sample, step, element) like ``normal``.

    Args:
        shape, seed, step, sample_id, dtype, device: as for ``normal``.

    u = fl32(fl32(r) + 1/2) 2^-32 from each 32-bit lane r; in float16 the smallest of them round to 0.

    Raises:
        TypeError, ValueError: an argument has another type, shape or range.

    >>> import bicm_kernels as bk
    >>> bool(bk.uniform((4, 100), seed=1).min() > 0)
    True
    """
    return UNIFORM.call(_empty(shape, dtype, device), seed, step, sample_id)


@dataclass(eq=False)
class FoldIn(Op):
    """Seeds derived from seeds: the tensors are integers, 0-d or (B,); a 0-d one may be on the host."""

    respells: ClassVar[bool] = True

    def states(self) -> tuple[str, ...]:
        return ()

    def fake(self, seed: Tensor, data: Tensor) -> Tensor:
        shaped, placed = (data, seed)[seed.dim() >= data.dim()], (data, seed)[data.is_cpu]
        return seed.new_empty(shaped.shape, device=placed.device)

    def step(self, call: Call) -> Call:
        if not all(isinstance(x, Tensor) for x in call):
            self.check(call, None)  # checked before conversion, because a tensor's value is not read later
        return tuple(arguments.integer(x) for x in call)

    def returns(self, call: Call, outs: Any) -> bool:
        return True

    def spread(self, step: Call) -> tuple[list[Tensor], list[Any]]:
        return sorted(step, key=lambda x: x.is_cpu), [*step]

    def check(self, call: Call, outs: Any) -> None:
        tensors = [x for x in call if isinstance(x, Tensor)]
        device = next((x.device for x in tensors if not x.is_cpu), torch.device("cpu"))
        batch = next((x.shape[0] for x in tensors if x.dim() == 1), 1)
        for name, x in zip(self.tensors, call, strict=True):
            checks.check_integer(name, x, batch, device, -(2**63), 2**64)


FOLD_IN = FoldIn("fold_in", ("seed", "data"))


def fold_in(seed: Integer, data: Integer) -> Integer:
    """A new seed for another purpose, so that times, masks and dropout never share a key with noise.

    Args:
        seed, data: ints in [-2^63, 2^64), or int64 tensors, 0-d or (B,).

    Returns:
        A seed in [0, 2^63): an int for ints, an int64 tensor where an argument is a tensor or a graph is traced.

    Raises:
        TypeError, ValueError: an argument has another type, shape or range.

    >>> import bicm_kernels as bk
    >>> bk.fold_in(0, 1) != bk.fold_in(0, 2)
    True
    """
    if not isinstance(seed, Tensor) and not isinstance(data, Tensor) and not arguments.compiling():
        return (_folded if type(seed) is type(data) is int else _folded.__wrapped__)(seed, data)
    return FOLD_IN.call(seed, data)


@lru_cache
def _folded(seed: Any, data: Any) -> int:
    """Of ints; a training step derives the same few seeds again and again."""
    FOLD_IN.check((seed, data), None)
    return reference.fold_in_words(int(seed), int(data))


ADD_NOISE = Op("add_noise", ("x",), numbers=("scale", "sigma"), noise="sigma", differentiable=True)


def _save_scale(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


@arguments.faithful
def _scale_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return affine_gradient([gradient], ctx.saved_tensors), *[None] * 5


ADD_NOISE.differentiate(_scale_gradient, _save_scale)


def add_noise(
    x: Tensor,
    sigma: Number,
    *,
    scale: Number = 1.0,
    seed: Integer,
    step: Integer = 0,
    sample_id: Integer = 0,
) -> Tensor:
    """Forward diffusion in one pass: scale x + sigma n with keyed noise n that is never stored.

    Args:
        x: (B, ...), float16, bfloat16, float32 or float64, any strides; the result has its dtype and layout.
        sigma: noise level, float, 0-d or (B,) tensor; a sample whose sigma is exactly 0 draws nothing.
        scale: weight of x (alpha of a variance-preserving process), like sigma.
        seed, step, sample_id: the noise's key, see ``normal``.

    Raises:
        TypeError, ValueError: an argument has another type, shape, device or range.

    Differentiable in x through the fused kernel; in sigma and scale, and twice, through the reference.

    >>> import torch, bicm_kernels as bk
    >>> x = torch.zeros(2, 3); torch.equal(bk.add_noise(x, 2.0, seed=1), 2 * bk.normal((2, 3), seed=1))
    True
    """
    return ADD_NOISE.call(x, scale, sigma, seed, step, sample_id)
