"""Keyed noise: a pure function of (seed, sample, step, element), the same bits on every device and in every batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bicm_kernels import backend, reference
from bicm_kernels.ops import arguments
from bicm_kernels.ops.arguments import Integer, Number
from bicm_kernels.ops.library import define, library
from bicm_kernels.ops.op import Op
from bicm_kernels.torch_internals import transformed

#: The version of the mapping from keys to numbers. Stored vectors guard it; it changes only with a new major version.
NOISE_VERSION = 1

_ops = torch.ops.bicm_kernels


def _check_draw(out: Tensor, seed: Integer, step: Integer, sample_id: Integer) -> None:
    arguments.check_state("shape", out)
    arguments.check_key(seed, step, sample_id, out.shape[0], out.device)


def _fake_draw(out: Tensor, seed: Integer, step: Integer, sample_id: Integer) -> None:
    """Nothing: the output is there."""


for _name in ("normal", "uniform"):
    define(f"{_name}(Tensor(a!) out, SymInt seed, SymInt step, SymInt sample_id) -> ()", ["out"], _fake_draw)
    define(f"{_name}.tensor(Tensor(a!) out, Tensor seed, Tensor step, Tensor sample_id) -> ()", ["out"], _fake_draw)


def _draw(
    name: str,
    shape: Sequence[int],
    seed: Integer,
    step: Integer,
    sample_id: Integer,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> Tensor:
    dtype = dtype or torch.get_default_dtype()
    if dtype not in arguments.FLOATING:
        raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
    out = torch.empty(shape, dtype=dtype, device=device)
    arguments.check_state("shape", out)
    arguments.check_vmap(seed)
    fallback = transformed() or backend.running(out.device.type) == "reference"
    if fallback or arguments.unseen(out):
        _check_draw(out, seed, step, sample_id)
    if fallback:
        draw = getattr(reference, name)
        return draw(out.shape, seed=seed, step=step, sample_id=sample_id, dtype=dtype, device=out.device)
    op = getattr(_ops, name)
    try:
        if type(seed) is type(step) is type(sample_id) is int and not arguments.compiling():
            op.default(out, arguments.signed(seed), step, sample_id)
        else:
            op.tensor(out, *arguments.key(seed, step, sample_id, out))
    except arguments.FAILURES as error:
        arguments.explain(error, lambda: _check_draw(out, seed, step, sample_id))
    return out


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
        step: int in [0, 2^32) or an int64 tensor, 0-d or (B,): another step, other noise.
        sample_id: int in [0, 2^32), a 0-d int64 tensor, or a (B,) int64 tensor of the ids themselves.
        dtype: float16, bfloat16, float32 or float64 (torch's default); float32 numbers rounded once, |n| <= 6.77.
        device: where the result lies.

    Raises:
        TypeError, ValueError: an argument has another type, shape or range.

    Philox4x32-10 at counter (e // 4, sample, step), then Box-Muller; see ``NOISE_VERSION``.

    >>> import torch, bicm_kernels as bk
    >>> torch.equal(bk.normal((8, 3), seed=1)[5:], bk.normal((3, 3), seed=1, sample_id=5))
    True
    """
    return _draw("normal", shape, seed, step, sample_id, dtype, device)


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
    return _draw("uniform", shape, seed, step, sample_id, dtype, device)


def _fake_fold_in(seed: Tensor, data: Tensor) -> Tensor:
    shape = (seed if seed.dim() >= data.dim() else data).shape
    return seed.new_empty(shape, device=_device_of(seed, data))


define("fold_in(Tensor seed, Tensor data) -> Tensor", [], _fake_fold_in)


def _device_of(seed: object, data: object) -> torch.device:
    """Where a new seed lies: on the host only if both parts do."""
    devices = [x.device for x in (seed, data) if isinstance(x, Tensor)]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def _check_fold_in(seed: object, data: object) -> None:
    device = _device_of(seed, data)
    batch = next((x.shape[0] for x in (seed, data) if isinstance(x, Tensor) and x.dim() == 1), 1)
    arguments.check_integer("seed", seed, batch, device, -(2**63), 2**64)
    arguments.check_integer("data", data, batch, device, -(2**63), 2**64)


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
    _check_fold_in(seed, data)
    both_numbers = not isinstance(seed, Tensor) and not isinstance(data, Tensor)
    if both_numbers and not arguments.compiling():
        return reference.fold_in_words(int(seed), int(data))
    if transformed() or backend.running(_device_of(seed, data).type) == "reference":
        return reference.fold_in(arguments.integer(seed), data)
    try:
        return _ops.fold_in.default(arguments.integer(seed), arguments.integer(data))
    except RuntimeError as error:
        arguments.fail(error)


def _add_noise(x: Tensor, sigma: Tensor, scale: Tensor, seed: Tensor, step: Tensor, sample_id: Tensor) -> Tensor:
    """add_noise is the affine step of one tensor: the op exists to carry the derivative."""
    return _ops.affine_step.tensor([x], [scale], None, sigma, seed, step, sample_id)


define(
    "add_noise(Tensor x, Tensor sigma, Tensor scale, Tensor seed, Tensor step, Tensor sample_id) -> Tensor",
    ["x"],
    lambda x, *_: torch.empty_like(x),
)
library.impl("add_noise", _add_noise, "CompositeExplicitAutograd")


def _save_scale(ctx: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])  # type: ignore[attr-defined]


@arguments.faithful
def _scale_gradient(ctx: object, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (scale,) = ctx.saved_tensors  # type: ignore[attr-defined]
    if not arguments.plain_gradient(gradient):
        return reference.affine_step([gradient], [scale]), *[None] * 5
    return _ops.affine_step.tensor([gradient], [scale], None, None, None, None, None), *[None] * 5


torch.library.register_autograd("bicm_kernels::add_noise", _scale_gradient, setup_context=_save_scale, lib=library)

ADD_NOISE = Op(
    "add_noise",
    ("x",),
    guided=True,
    coefficients=("scale",),
    numbers=("sigma",),
    noise="sigma",
    schema="affine_step",
    plain=lambda guidance_scale, **named: reference.add_noise(**named),
    tracked=lambda tensors, scales, _, sigma, *key: _ops.add_noise.default(tensors[0], sigma, scales[0], *key),
)


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
    return ADD_NOISE.call((x,), (scale,), None, sigma, seed, step, sample_id)
