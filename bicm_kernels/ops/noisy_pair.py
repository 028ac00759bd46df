"""One noise at two levels, for consistency training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bicm_kernels import reference
from bicm_kernels.ops import arguments, checks
from bicm_kernels.ops.arguments import Integer, Number
from bicm_kernels.ops.multistep import affine_gradient
from bicm_kernels.ops.op import Op
from bicm_kernels.ops.preconditioning import target_level
from bicm_kernels.ops.row import Call
from bicm_kernels.torch_internals import transformed


@dataclass(eq=False)
class PairOp(Op):
    """One noise at two levels; a mask selects the samples that others replace."""

    keyed: bool = True
    outs: tuple[str, ...] = ("low", "high")

    def states(self) -> tuple[str, ...]:
        return tuple(name for name in super().states() if name != "mask")

    def check_tensors(self, call: Call) -> dict[str, Any]:
        tensors = dict(zip(self.tensors, call, strict=False))
        if "x_hat" in tensors and (tensors["x_hat"] is None) != (tensors["mask"] is None):
            raise ValueError("x_hat and mask go together: mask selects the samples that x_hat replaces")
        x, F, mask = call[:3]
        if "F" in tensors and isinstance(mask, Tensor) and mask.dtype == torch.int64:
            check_places(x, F, mask)
            F, mask = F.new_empty(x.shape), mask >= 0
        return super().check_tensors((x, F, mask, *call[3:]))

    def check_tensor(self, name: str, x: object, first: Tensor | None, first_name: str) -> None:
        if first is None or name != "mask":
            checks.check_state(name, x, first, first_name)
            if first is not None and name == "x_hat" and x.dtype != first.dtype:  # type: ignore[attr-defined]
                raise TypeError(f"x_hat must have the dtype of x, {first.dtype}, got {x.dtype}")  # type: ignore[attr-defined]
            return
        if not isinstance(x, Tensor) or x.dtype != torch.bool:
            raise TypeError(f"mask must be a bool tensor, got {checks.describe(x)}")
        if x.shape != first.shape[:1] or x.device != first.device:
            shape = f"({first.shape[0]},)"
            raise ValueError(f"mask must have shape {shape} and be on {first.device}, got {checks.describe(x)}")


def check_places(x: object, F: object, places: Tensor) -> None:
    """Raise unless places are in range, where they are on the host, and F has samples like x."""
    checks.check_state("x", x)
    checks.check_state("F", F)
    assert isinstance(x, Tensor) and isinstance(F, Tensor)
    if F.shape[1:] != x.shape[1:] or (not arguments.compiling() and not len(F)):
        shape = f"(N, {', '.join(map(str, x.shape[1:]))})"
        raise ValueError(f"F must have shape {shape} and a sample, as mask holds places in it, got {tuple(F.shape)}")
    if places.shape != x.shape[:1] or places.device != x.device:
        given = checks.describe(places)
        raise ValueError(f"mask must have shape ({x.shape[0]},) and be on {x.device}, got {given}")
    traced = arguments.unseen(places) or arguments.scripting() or transformed()
    readable = type(places) is Tensor and places.is_cpu and not traced
    if readable and len(places) and int(places.max()) >= len(F):
        raise ValueError(f"mask must hold places below {len(F)}, the number of samples in F, got {int(places.max())}")


def _plain_generated(*, sigma_data: Any, cm: bool, scales: bool, **named: Any) -> tuple[Tensor, Tensor]:
    form = "cm" if cm else "bcm"
    data = sigma_data if scales else None
    return reference.noisy_pair(sigma_data=data, parameterization=form, **named)


NOISY_PAIR = PairOp(
    "noisy_pair",
    ("x", "x_hat?", "mask?"),
    numbers=("sigma_low", "sigma_high", "sigma_data?"),
    differentiable=True,
)
# The network's prediction at the low level replaces x: GC's pair without a generated sample in memory.
GENERATED_PAIR = PairOp(
    "generated_pair",
    ("x", "F", "mask?"),
    numbers=("sigma_low", "sigma_high", "sigma_min", "sigma_data"),
    flags=("bool cm", "bool scales"),
    plain=_plain_generated,
)


def _save_levels(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    _, _, mask, low, high, sigma_data, *_ = inputs
    ctx.save_for_backward(low, high, mask, sigma_data)


@arguments.faithful
def _pair_gradient(ctx: Any, low: Tensor, high: Tensor) -> tuple[Tensor | None, ...]:
    sigma_low, sigma_high, mask, sigma_data = ctx.saved_tensors
    compute = torch.float64 if low.dtype == torch.float64 else torch.float32
    one = torch.ones((), dtype=torch.float64)
    scales = (
        [one, one] if sigma_data is None else [_scale(sigma, sigma_data, compute) for sigma in (sigma_low, sigma_high)]
    )
    total = affine_gradient([low, high], scales)

    def without(rows: Tensor | None) -> Tensor:
        # Not a weight of 0, whose product with an infinite gradient is NaN.
        return total if rows is None else total.masked_fill(rows.reshape(-1, *[1] * (total.dim() - 1)), 0.0)

    x = without(mask) if ctx.needs_input_grad[0] else None
    x_hat = without(~mask) if ctx.needs_input_grad[1] else None
    return x, x_hat, *[None] * 7


def _scale(sigma: Tensor, sigma_data: Tensor, compute: torch.dtype) -> Tensor:
    """c_in as the forward pass formed it, 0-d or (B,); on the host where both numbers are, to avoid a device sync."""
    return reference.c_in(sigma.to(compute), sigma_data.to(compute))


NOISY_PAIR.differentiate(_pair_gradient, _save_levels)


def noisy_pair(
    x: Tensor,
    sigma_low: Number,
    sigma_high: Number,
    *,
    seed: Integer,
    step: Integer,
    sample_id: Integer = 0,
    x_hat: Tensor | None = None,
    mask: Tensor | None = None,
    sigma_data: Number | None = None,
    F: Tensor | None = None,
    parameterization: str = "bcm",
    sigma_min: Number = 0.002,
) -> tuple[Tensor, Tensor]:
    """One noise at two levels, (x + sigma_low n, x + sigma_high n): the pair that consistency training compares.

    Args:
        x: clean samples (B, ...), float16, bfloat16, float32 or float64, any strides.
        sigma_low, sigma_high: noise levels; float, 0-d or (B,) tensor. A level of exactly 0 adds nothing.
        seed, step, sample_id: the noise's key, see ``normal``. Pass a new step each time: otherwise training sees the
            same noise in every step.
        x_hat: generated samples like x that replace it where ``mask`` is true (GC eq. 21, Alg. 1).
        mask: (B,) bool tensor.
        sigma_data: standard deviation of the data. Where it is given, both are multiplied by c_in of their level, as
            networks take them (EDM; BCM eq. 20); ``denoise`` and ``consistency_loss`` go on from there with
            ``scaled=True``, and the samples that are not scaled need not exist.
        F: instead of x_hat, the network's output on x + sigma_low n, with the noise of this key: like x, of any
            floating dtype. x_hat = c_skip (x + sigma_low n) + c_out F, formed in the compute type and never stored
            (GC eq. 13-15); everywhere without a mask. Rows that the mask leaves out are not read. Where the network
            saw some samples only, F has their outputs, (N, ...), and mask their places: (B,) int64, negative for the
            others.
        parameterization, sigma_min: of the network that gave F, as for ``denoise``; its sigma_data is the one above,
            or 0.5.

    Returns:
        Two tensors in the dtype and layout of x. Differentiable in x and x_hat through the fused kernel; in the
        levels, in x and F where F is given, and twice, through the reference.

    Raises:
        TypeError, ValueError: an argument has another type, shape, device or range.

    >>> import torch, bicm_kernels as bk
    >>> low, high = bk.noisy_pair(torch.zeros(2, 3), 1.0, 2.0, seed=1, step=0); torch.equal(2 * low, high)
    True
    """
    if F is None:
        return NOISY_PAIR.call(x, x_hat, mask, sigma_low, sigma_high, sigma_data, seed, step, sample_id)
    if x_hat is not None:
        raise ValueError("x_hat and F exclude one another: x_hat is made of F, which is the network's output")
    end, data = target_level(parameterization, None, sigma_min), 0.5 if sigma_data is None else sigma_data
    flags = parameterization == "cm", sigma_data is not None
    return GENERATED_PAIR.call(x, F, mask, sigma_low, sigma_high, end, data, *flags, seed, step, sample_id)
