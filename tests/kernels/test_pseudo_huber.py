"""The losses: the reference's values for every dtype and layout, closed forms, accuracy, edges."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import bicm_kernels as bk
from bicm_kernels import reference
from tests.support.loss_calls import CODES, EVERY_KIND, with_c
from tests.support.tensors import BF16, F16, F32, F64, LAYOUTS, Bits, Threads, random

REDUCTIONS = ("mean", "sum", "none")
DTYPES = [(F32, F32), (F32, BF16), (F16, F32), (BF16, BF16), (F16, F16), (F64, F64), (F64, F32), (BF16, F64)]
SIZES = [
    (1,),
    (7,),
    (1, 1),
    (5, 3),
    (2, 31),
    (2, 33),
    (2, 1023),
    (3, 1025),
    (2, 3, 17, 31),
    (1, 2, 3, 2, 3, 2),
    (130, 257),
    (2, 70_001),
]


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-6) -> None:
    assert actual.dtype == expected.dtype
    atol = 1e-30 if expected.numel() == 0 else 1e-7 * expected.abs().max().item() + 1e-30
    half = {F16: 1e-3, BF16: 8e-3}.get(actual.dtype, 0.0)
    torch.testing.assert_close(
        actual, expected, rtol=max(rtol, half), atol=max(atol, 6e-8 if half else 0.0), equal_nan=True
    )


def value_and_gradients(loss: Callable[..., Tensor], inputs: list[Tensor], *rest: Any, **options: Any) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = loss(*leaves, *rest, **options)
    upstream = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).reshape(value.shape)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream)]


def denoising(module: Any, t: Any, u: Any, **fixed: Any) -> Callable[..., Tensor]:
    def loss(x: Tensor, F: Tensor, target: Tensor, **options: Any) -> Tensor:
        return module.consistency_loss(x, F, t, u, target, **fixed, **options)

    return loss


# --- the same values as the reference ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", EVERY_KIND)
@pytest.mark.parametrize(("first", "second"), DTYPES)
def test_dtypes_and_sizes(options: dict[str, Any], first: torch.dtype, second: torch.dtype) -> None:
    for (shape, scaled), reduction in zip(
        itertools.product(SIZES, (False, True)), itertools.cycle(REDUCTIONS), strict=False
    ):
        pred, target, x = random(*shape, dtype=first), random(*shape, dtype=second, seed=1), random(*shape, seed=2)
        t = torch.linspace(0.1, 80, shape[0])
        more = {**options, "reduction": reduction, "weight": torch.linspace(0.5, 2, shape[0])}
        for ours, plain in zip(
            value_and_gradients(bk.pseudo_huber, [pred, target], **more),
            value_and_gradients(reference.pseudo_huber, [pred, target], **more),
            strict=True,
        ):
            close(ours, plain)
        for ours, plain in zip(
            value_and_gradients(denoising(bk, t, t / 3, scaled=scaled), [x.to(second), pred, target], **more),
            value_and_gradients(denoising(reference, t, t / 3, scaled=scaled), [x.to(second), pred, target], **more),
            strict=True,
        ):
            close(ours, plain)


@pytest.mark.parametrize("options", [EVERY_KIND[k] for k in (0, 3, 5)])
@pytest.mark.parametrize("dtype", [F32, BF16, F64])
def test_layouts(options: dict[str, Any], dtype: torch.dtype) -> None:
    places = list(LAYOUTS.values())
    for shape, turn in itertools.product([(3, 5, 7, 4), (2, 1, 33, 65)], (0, 1, 3)):
        for i, place in enumerate(places):
            pred, target = place(random(*shape, dtype=dtype)), places[(i + turn) % len(places)](random(*shape, seed=1))
            x = places[(i + 2 * turn) % len(places)](random(*shape, dtype=dtype, seed=2))
            inputs = [x, pred, target]
            ours = value_and_gradients(denoising(bk, 2.0, 0.5), inputs, **options)
            plain = value_and_gradients(denoising(reference, 2.0, 0.5), inputs, **options)
            for mine, theirs, like in zip(ours, plain, [None, *inputs], strict=True):
                close(mine, theirs)
                assert like is None or mine.stride() == torch.empty_like(like).stride()
            for mine, theirs in zip(
                value_and_gradients(bk.pseudo_huber, inputs[1:], **options),
                value_and_gradients(reference.pseudo_huber, inputs[1:], **options),
                strict=True,
            ):
                close(mine, theirs)


NUMBERS: dict[str, Callable[[float], Any]] = {
    "float": lambda x: x,
    "int": lambda x: round(x) + 1,
    "0-d": torch.tensor,
    "0-d float64": lambda x: torch.tensor(x, dtype=F64),
    "per sample": lambda x: x * torch.linspace(0.9, 1.1, 4),
    "per sample, half, strided": lambda x: (x * torch.linspace(0.9, 1.1, 8)).to(F16)[::2],
    "expanded": lambda x: torch.tensor(x).expand(4),
}


@pytest.mark.parametrize("form", NUMBERS)
@pytest.mark.parametrize("parameterization", ["bcm", "cm", "edm"])
def test_forms_of_numbers(form: str, parameterization: str) -> None:
    number = NUMBERS[form]
    x, F, target = (random(4, 3, 20, seed=k) for k in range(3))
    u = number(0.7) if parameterization == "bcm" else None
    for reduction, dtype in itertools.product(REDUCTIONS, (F32, F64)):
        options = {
            "c": number(0.2),
            "weight": number(1.5),
            "reduction": reduction,
            "parameterization": parameterization,
        }
        options |= {"sigma_data": number(0.6), "sigma_min": number(0.01)}
        inputs = [x.to(dtype), F, target]
        ours = value_and_gradients(denoising(bk, number(3.0), u), inputs, **options)
        plain = value_and_gradients(denoising(reference, number(3.0), u), inputs, **options)
        for mine, theirs in zip(ours, plain, strict=True):
            close(mine, theirs)


def test_defaults() -> None:
    x, F, target = (random(3, 2, 50, seed=k) for k in range(3))
    close(
        bk.pseudo_huber(F, target), bk.pseudo_huber(F, target, c=0.00054 * 10, weight=torch.ones(3), reduction="mean")
    )
    close(bk.consistency_loss(x, F, 2.0, None, target), bk.consistency_loss(x, F, 2.0, 0.002, target))
    edm = bk.consistency_loss(x, F, 2.0, None, target, parameterization="edm")
    close(edm, bk.consistency_loss(x, F, 2.0, 0.0, target))


def test_the_denoised_sample_is_not_rounded() -> None:
    x, F, target = random(2, 64, dtype=BF16), random(2, 64, dtype=BF16, seed=1), random(2, 64, seed=2)
    s = torch.tensor(0.25) + torch.tensor(2.0) * torch.tensor(2.0)
    y = ((0.25 + 2.0 * 0.5) / s) * x.float() + ((0.5 * 1.5) / s.double().sqrt().float()) * F.float()
    close(bk.consistency_loss(x, F, 2.0, 0.5, target), bk.pseudo_huber(y, target))


# --- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64])
def test_small_residuals(each_backend: str, dtype: torch.dtype) -> None:
    c = 0.5
    for size in (1e-4, 1e-8, 1e-12):
        r = size * random(4, 100, dtype=dtype)
        value = bk.pseudo_huber(r, torch.zeros_like(r), c=c, reduction="none")
        torch.testing.assert_close(value.double(), r.double().square().sum(1) / (2 * c), rtol=1e-5, atol=0)
        value = bk.pseudo_huber(r, torch.zeros_like(r), c=c, kind="elementwise", reduction="none")
        torch.testing.assert_close(value.double(), r.double().square().mean(1) / (2 * c), rtol=1e-5, atol=0)


def test_large_residuals(each_backend: str) -> None:
    r = 1e6 * random(4, 100)
    norm = r.double().square().sum(1).sqrt()
    for kind, expected in (("vector", norm - 0.5), ("elementwise", r.double().abs().mean(1) - 0.5)):
        value = bk.pseudo_huber(r, torch.zeros_like(r), c=0.5, kind=kind, reduction="none")
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["vector", "elementwise"])
def test_without_c(each_backend: str, kind: str) -> None:
    pred = random(3, 100)
    pred[1] = 0
    target = torch.zeros(3, 100)
    target[1] = pred[1]
    value, gradient, _ = value_and_gradients(bk.pseudo_huber, [pred, target], c=0.0, kind=kind, reduction="none")
    norm = pred.square().sum(1).sqrt() if kind == "vector" else pred.abs().mean(1)
    torch.testing.assert_close(value, norm, rtol=1e-6, atol=0)
    assert value[1] == 0
    assert not gradient[1].any()
    assert gradient.isfinite().all()


@given(
    scale=st.floats(-12, 6), c=st.floats(0, 10), kind=st.sampled_from(["vector", "elementwise"]), d=st.integers(1, 200)
)
def test_any_scale(scale: float, c: float, kind: str, d: int) -> None:
    r = 10**scale * random(2, d)
    s = r.double().square()
    if kind == "vector":
        s = s.sum(1, keepdim=True)
    exactly = (s / ((s + c * c).sqrt() + c)).mean(1)
    value = bk.pseudo_huber(r, torch.zeros_like(r), c=c, kind=kind, reduction="none")
    torch.testing.assert_close(value.double(), exactly, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
def test_squared(each_backend: str, dtype: torch.dtype) -> None:
    """The sum of the squares of a sample, not their mean, and twice the residual."""
    pred, target = random(3, 4, 50, dtype=dtype), random(3, 4, 50, dtype=dtype, seed=1)
    r = pred.double() - target.double()
    value, gradient, other = value_and_gradients(bk.pseudo_huber, [pred, target], kind="squared", reduction="none")
    assert value.dtype == (F64 if dtype == F64 else F32)
    torch.testing.assert_close(value.double(), r.square().flatten(1).sum(1), rtol=1e-6, atol=0)
    upstream = torch.linspace(0.5, 1.5, 3, dtype=F64).reshape(3, 1, 1)
    torch.testing.assert_close(gradient, (2 * upstream * r).to(dtype), rtol=1e-6 if dtype != BF16 else 4e-3, atol=1e-6)
    assert torch.equal(other, -gradient)
    x = torch.tensor([[3.0, 4.0]])
    assert bk.pseudo_huber(x, 0 * x, kind="squared") == 25
    assert bk.consistency_loss(x, x, 2.0, 2.0, 0 * x, kind="squared") == 25


# --- accuracy ---------------------------------------------------------------------------------------------------------


def eager(pred: Tensor, target: Tensor, c: float, kind: str) -> Tensor:
    square = (pred - target).square()
    if kind == "squared":
        return square.flatten(1).sum(1).mean()
    s = square.flatten(1).sum(1) if kind == "vector" else square.flatten(1)
    distances = (s + c * c).sqrt() - c
    return (distances if kind == "vector" else distances.mean(1)).mean()


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_no_less_accurate_than_eager(kind: str, dtype: torch.dtype) -> None:
    c = 0.03
    pred, target = random(64, 3072, dtype=dtype), random(64, 3072, dtype=dtype, seed=1)
    exactly = value_and_gradients(eager, [pred.double(), target.double()], c, kind)
    theirs = value_and_gradients(eager, [pred, target], c, kind)
    ours = value_and_gradients(bk.pseudo_huber, [pred, target], **with_c(kind, c))
    for x, y, z in zip(ours, theirs, exactly, strict=True):
        error, other = ((a.double() - z).abs().max().item() for a in (x, y))
        assert error <= 2 * other + 6e-8 * z.abs().max().item()


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("kind", CODES)
def test_large_samples(dtype: torch.dtype, kind: str, threads: Threads) -> None:
    pred, target = random(1, 10_000_003, dtype=dtype), random(1, 10_000_003, dtype=dtype, seed=1)
    square = (pred.double() - target.double()).square()
    s = square if kind == "elementwise" else square.sum()
    exactly = s.item() if kind == "squared" else ((s + 0.01).sqrt() - 0.1).mean().item()
    values = []
    for count in (1, 2):
        with threads(count):
            values.append(bk.pseudo_huber(pred, target, **with_c(kind, 0.1)).item())
    assert values[0] == values[1] == pytest.approx(exactly, rel=1e-6)


# --- edges ------------------------------------------------------------------------------------------------------------


def test_empty(each_backend: str) -> None:
    for options in (with_c(kind, 0.1) for kind in CODES):
        x = torch.zeros(0, 3)
        assert bk.pseudo_huber(x, x, **options).isnan()
        assert bk.pseudo_huber(x, x, reduction="sum", **options) == 0
        assert bk.pseudo_huber(x, x, reduction="none", **options).shape == (0,)
        for shape in ((0, 3), (2, 0), (2, 0, 4)):
            x = torch.zeros(shape, requires_grad=True)
            bk.pseudo_huber(x, x.detach(), reduction="sum", **options).backward()
            assert x.grad is not None
            assert x.grad.shape == shape
    x = torch.zeros(2, 0)
    assert torch.equal(bk.pseudo_huber(x, x, reduction="none"), torch.zeros(2))
    assert bk.pseudo_huber(x, x, c=0.1, kind="elementwise").isnan()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", EVERY_KIND)
def test_special_values(each_backend: str, value: float, options: dict[str, Any], same_bits: Bits) -> None:
    """An infinite residual gives an infinite loss and a derivative of NaN, or a square's, which is infinite.

    A NaN spoils all that it is part of.
    """
    pred = random(3, 100)
    pred[1, 7] = 0.0
    clean = value_and_gradients(bk.pseudo_huber, [pred, torch.zeros(3, 100)], reduction="none", **options)
    pred[1, 7] = value
    found = value_and_gradients(bk.pseudo_huber, [pred, torch.zeros(3, 100)], reduction="none", **options)
    for mine, theirs in zip(found, clean, strict=True):
        same_bits(mine[::2], theirs[::2])
    vector, squared, loss = "kind" not in options, options.get("kind") == "squared", found[0][1].item()
    assert math.isnan(loss) if math.isnan(value) else loss == math.inf
    spoiled = torch.arange(100) == 7
    for mine, theirs in zip(found[1:], clean[1:], strict=True):
        if vector and math.isnan(value):
            assert mine[1].isnan().all()
        else:
            assert torch.equal(~mine[1].isfinite(), spoiled)
            assert mine[1, 7].isinf() if squared and math.isinf(value) else mine[1, 7].isnan()
            torch.testing.assert_close(mine[1][~spoiled], theirs[1][~spoiled] * (0 if vector else 1), rtol=0, atol=0)


def test_autocast_leaves_dtypes_alone(each_backend: str) -> None:
    x, F = random(2, 50), random(2, 50, dtype=BF16, seed=1).requires_grad_()
    plain = bk.consistency_loss(x, F, 2.0, 1.0, x)
    with torch.autocast("cpu", dtype=BF16):
        inside = bk.consistency_loss(x, F, 2.0, 1.0, x)
    assert inside.dtype == F32
    assert torch.equal(inside, plain)
