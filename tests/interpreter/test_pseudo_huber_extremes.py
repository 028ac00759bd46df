"""The losses' Triton kernels where squares overflow or underflow, and where residuals are infinite or NaN."""

from __future__ import annotations

import itertools

import pytest
import torch
from bits import random
from torch import Tensor

from tests.support.extremes import CASES, exactly, title

pytest.importorskip("triton")

from bicm_kernels.triton_kernels import OPS
from bicm_kernels.triton_kernels.pseudo_huber import CHUNK

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

F32, F64 = torch.float32, torch.float64
DTYPES = {"float32": F32, "float64": F64}
KINDS = ("vector", "elementwise", "squared")
#: What rounding allows of a result, relative.
ROUNDING = {F32: 1e-6, F64: 1e-14}


def check(actual: Tensor, expected: list[float], name: str) -> None:
    limits = torch.finfo(actual.dtype)
    torch.testing.assert_close(
        actual.double(),
        torch.tensor(expected, dtype=F64).to(actual.dtype).double(),
        rtol=ROUNDING[actual.dtype],
        atol=3 * limits.smallest_normal * limits.eps,
        equal_nan=True,
        msg=lambda message: f"{name}: {message}",
    )


def run(r: Tensor, c: Tensor | float, kind: str, upstream: float) -> tuple[Tensor, Tensor]:
    """Losses and gradients of residuals; value and gradient at once have the bits of two passes."""
    call = (r, torch.zeros_like(r), None, None if kind == "squared" else c, KINDS.index(kind), 2)
    loss, sums = OPS["pseudo_huber"](*call)
    (unscaled,) = OPS["pseudo_huber_backward"](torch.ones_like(loss), sums, 1, *call)
    found, (kept,) = OPS["pseudo_huber_with_gradients"](1, *call)
    for a, b in ((found, loss), (kept, unscaled)):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    (gradient,) = OPS["pseudo_huber_backward"](torch.full_like(loss, upstream), sums, 1, *call)
    return loss, gradient


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype: str, kind: str) -> None:
    named = sorted(CASES[dtype], key=lambda case: len(case[0]))
    for _, group in itertools.groupby(named, key=lambda case: len(case[0])):
        cases = list(group)
        r, c = (torch.tensor([case[i] for case in cases], dtype=F64) for i in range(2))
        r, c = r.to(DTYPES[dtype]), c if dtype == "float64" else c.float()
        losses, gradients = run(r, c, kind, 65536.0)
        for case, row, loss, gradient in zip(cases, r.tolist(), losses, gradients, strict=True):
            value, slopes = exactly(row, case[1], kind)
            check(loss.reshape(1), [float(value)], title(case))
            check(gradient, [float(slope) * 65536.0 for slope in slopes], title(case))


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize(("dtype", "scale"), [(F32, 1e37), (F32, 1e-43), (F64, 1e306), (F64, 1e-200)])
def test_many_elements(dtype: torch.dtype, scale: float, kind: str) -> None:
    """In one program's registers, and in several chunks."""
    power = 2.0**-1000 if scale > 1e100 else 2.0**600 if scale < 1e-100 else 1.0
    for size, c in ((300, 1.0), (CHUNK + 77, 0.0)):
        r = (scale * random((2, size), F64)).to(dtype)
        exact, shift = r.double() * power, torch.tensor(c * power, dtype=F64)
        norm = exact.norm(dim=1, keepdim=True) if kind == "vector" else exact.abs()
        length = torch.hypot(norm, shift)
        values = (norm * (norm / (length + shift).clamp(min=1e-300))).mean(1) / power
        slopes = exact / length.clamp(min=1e-300) / (size if kind == "elementwise" else 1)
        losses, gradients = run(r, c, kind, 1.0)
        accuracy = 2e-6 if dtype == F32 else 1e-12
        torch.testing.assert_close(losses, values.to(dtype), rtol=accuracy, atol=1e-323)
        torch.testing.assert_close(gradients, slopes.to(dtype), rtol=accuracy, atol=1e-40)


@pytest.mark.parametrize(("dtype", "scale"), [(F32, 1e17), (F32, 1e-21), (F64, 1e150), (F64, 1e-159)])
def test_squares_near_the_ends(dtype: torch.dtype, scale: float) -> None:
    """A sum of squares that a dtype just holds, or whose terms are subnormal, in one chunk and in several."""
    unit = 2.0**-500 if scale > 1 else 2.0**500
    for size in (300, CHUNK + 77):
        r = (scale * random((2, size), F64)).to(dtype)
        expected = ((r.double() * unit).square().sum(1) * (1.0 / unit)) * (1.0 / unit)
        losses, gradients = run(r, 0.0, "squared", 3.0)
        least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        accuracy = 2e-6 if dtype == F32 else 1e-12
        torch.testing.assert_close(losses, expected.to(dtype), rtol=accuracy, atol=2 * least)
        assert torch.equal(gradients, 6 * r)
