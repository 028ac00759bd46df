"""The losses where squares of residuals or of c overflow or underflow, and where residuals are infinite or NaN."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import pytest
import torch
from torch import Tensor

import bicm_kernels as bk
from bicm_kernels import reference
from bicm_kernels.reference.preconditioning import c_skip_c_out
from tests.support.extremes import CASES, Case, exactly, title
from tests.support.loss_calls import with_c
from tests.support.tensors import BF16, F16, F32, F64, random

DTYPES = {"float16": F16, "bfloat16": BF16, "float32": F32, "float64": F64}
#: What rounding allows of a result, relative.
ROUNDING = {F16: 2.0**-11, BF16: 2.0**-8, F32: 1e-6, F64: 1e-14}
KINDS, ROUTES = ("vector", "elementwise"), ("backward", "forward")
EVERY_KIND = (*KINDS, "squared")
Bits = Callable[[Tensor, Tensor], None]


def batches(dtype: str) -> Iterator[tuple[list[Case], Tensor, Tensor]]:
    """A dtype's cases, those with samples of one length at once; their residuals, and c of each."""
    named = sorted(CASES[dtype], key=lambda case: len(case[0]))
    for _, group in itertools.groupby(named, key=lambda case: len(case[0])):
        cases = list(group)
        r, c = (torch.tensor([case[i] for case in cases], dtype=F64) for i in range(2))
        yield cases, r.to(DTYPES[dtype]), c.to(compute_type(DTYPES[dtype]))


def check(actual: Tensor, expected: list[float], name: str = "") -> None:
    """Numbers of a dtype, from exact ones."""
    wanted = torch.tensor(expected, dtype=F64).to(actual.dtype)
    limits = torch.finfo(actual.dtype)
    torch.testing.assert_close(
        actual.double(),
        wanted.double(),
        rtol=ROUNDING[actual.dtype],
        atol=3 * limits.smallest_normal * limits.eps,
        equal_nan=True,
        msg=lambda message: f"{name}: {message}",
    )


def compute_type(dtype: torch.dtype) -> torch.dtype:
    return F64 if dtype == F64 else F32


def check_samples(
    cases: list[Case], r: Tensor, kind: str, losses: Tensor, gradients: Tensor, weight: float, upstream: float
) -> None:
    """Each sample's loss and gradient, from its residual as it was rounded."""
    for case, row, loss, gradient in zip(cases, r.tolist(), losses.detach(), gradients, strict=True):
        value, slopes = exactly(row, case[1], kind)
        check(loss.reshape(1), [float(value) * weight], title(case))
        check(gradient, [float(slope * Decimal(weight * upstream)) for slope in slopes], title(case))


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(each_backend: str, dtype: str, kind: str) -> None:
    """Under a loss scale, and with a weight; prediction and target may take each other's place."""
    for cases, r, c in batches(dtype):
        for route, upstream, turned in itertools.product(ROUTES, (1.0, 65536.0), (False, True)):
            leaf = r.clone().requires_grad_()
            inputs = [torch.zeros_like(leaf), leaf] if turned else [leaf, torch.zeros_like(leaf)]
            losses = bk.pseudo_huber(*inputs, gradient=route, weight=0.5, reduction="none", **with_c(kind, c))
            (gradients,) = torch.autograd.grad((upstream * losses).sum(), leaf)
            check_samples(cases, r, kind, losses, gradients, 0.5, upstream)


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_consistency_loss(each_backend: str, dtype: str, kind: str) -> None:
    """At t = u the denoised sample is x; at another t the network's part of it has the same derivatives times c_out."""
    for cases, r, c in batches(dtype):
        x, F, target = (y.requires_grad_() for y in (r.clone(), torch.zeros_like(r), torch.zeros_like(r)))
        options: dict[str, Any] = {**with_c(kind, c), "reduction": "none"}
        for route in ROUTES:
            losses = bk.consistency_loss(x, F, 2.0, 2.0, target, gradient=route, **options)
            of_x, of_target = torch.autograd.grad((65536.0 * losses).sum(), [x, target])
            check_samples(cases, r, kind, losses, of_x, 1.0, 65536.0)
            check_samples(cases, r, kind, losses, -of_target, 1.0, 65536.0)
        compute = compute_type(r.dtype)
        times = (torch.tensor(t, dtype=compute) for t in (2.0, 0.5, 0.5, 0.0))
        c_out = c_skip_c_out(*times, "bcm")[1]
        losses = bk.consistency_loss(torch.zeros_like(F), x, 2.0, 0.5, target, **options)
        (of_F,) = torch.autograd.grad(losses.sum(), x)
        for case, row, loss, gradient in zip(cases, c_out * r.to(compute), losses.detach(), of_F, strict=True):
            value, slopes = exactly(row.tolist(), case[1], kind)
            check(loss.reshape(1), [float(value)], title(case))
            check(gradient, [float(slope) * c_out.item() for slope in slopes], title(case))


def test_what_the_issue_names(each_backend: str) -> None:
    def of(r: list[float], **options: Any) -> tuple[float, list[float]]:
        leaf = torch.tensor([r], requires_grad=True)
        loss = bk.pseudo_huber(leaf, torch.zeros_like(leaf), **options)
        return loss.item(), torch.autograd.grad(loss, leaf)[0][0].tolist()

    value, gradient = of([1e30, 1e30], kind="elementwise", c=0.1)
    assert value == pytest.approx(1e30)
    assert gradient == [0.5, 0.5]
    assert of([math.inf, 1.0], c=0.1)[0] == math.inf
    assert of([-math.inf, 1.0], kind="elementwise", c=0.1)[0] == math.inf
    value, gradient = of([1e-42], c=0.0)
    assert value == pytest.approx(1e-42)
    assert gradient == [1.0]


# --- many elements, many samples --------------------------------------------------------------------------------------

MANY = [7, 1500, 70_001]  # within a unit, a few units, two parts that are summed by themselves


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", MANY)
@pytest.mark.parametrize(
    ("dtype", "scale"), [(F32, 1e37), (F32, 1e-43), (F64, 1e306), (F64, 1e200), (F64, 1e-200), (F64, 1e-320)]
)
@pytest.mark.parametrize("c", [0.0, 1.0])
def test_any_number_of_elements(
    each_backend: str, dtype: torch.dtype, scale: float, size: int, kind: str, c: float
) -> None:
    """A sum of distances may overflow where their mean does not; a norm may be too large for its own dtype."""
    r = (scale * random(2, size, dtype=F64)).to(dtype).requires_grad_()
    power = 2.0**-1000 if scale > 1e100 else 2.0**600 if scale < 1e-100 else 1.0
    exact, shift = r.detach().double() * power, torch.tensor(c * power, dtype=F64)
    norm = exact.norm(dim=1, keepdim=True) if kind == "vector" else exact.abs()
    length = torch.hypot(norm, shift)
    expected = (norm * (norm / (length + shift).clamp(min=1e-300))).mean(1) / power
    slopes = exact / length.clamp(min=1e-300) / (size if kind == "elementwise" else 1)
    accuracy = 2e-6 if dtype == F32 else 1e-12
    for route in ROUTES:
        loss = bk.pseudo_huber(r, torch.zeros_like(r), c=c, kind=kind, reduction="none", gradient=route)
        (gradient,) = torch.autograd.grad(loss.sum(), r)
        torch.testing.assert_close(loss.detach(), expected.to(dtype), rtol=accuracy, atol=1e-323)
        torch.testing.assert_close(gradient, slopes.to(dtype), rtol=accuracy, atol=1e-40)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", [0, 1400, 69_000])
@pytest.mark.parametrize(("dtype", "value"), [(F32, 1e30), (F32, 1e-42), (F64, 1e200), (F64, 1e-200), (BF16, 1e30)])
def test_one_among_many(each_backend: str, dtype: torch.dtype, value: float, place: int, kind: str) -> None:
    """A residual of another size beside those of size 1, or alone beside zeros."""
    for others in (0.0, 1.0):
        pred = others * random(1, 70_001, dtype=F64)
        pred[0, place] = 0.0
        rest, value = pred.norm().item(), torch.tensor(value, dtype=dtype).item()
        pred[0, place] = value
        leaf = pred.to(dtype).requires_grad_()
        loss = bk.pseudo_huber(leaf, torch.zeros_like(leaf), c=0.0, kind=kind, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, leaf)
        slope = value / math.hypot(value, rest) if kind == "vector" else 1 / pred.numel()
        check(gradient[0, place : place + 1], [slope])
        if not others:
            check(loss.detach().reshape(1), [value * (1.0 if kind == "vector" else 1 / pred.numel())])


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_other_samples_keep_their_bits(each_backend: str, kind: str, dtype: torch.dtype, same_bits: Bits) -> None:
    name = "float32" if dtype == F32 else "float64"
    cases = [r for r, c in CASES[name] if c == 0.0 and len(r) <= 4]
    extreme = torch.tensor([r + [0.0] * (4 - len(r)) for r in cases], dtype=dtype)
    usual = random(len(cases), 4, dtype=dtype)
    mixed = torch.stack([usual, extreme], 1).flatten(0, 1).requires_grad_()
    for route, c in itertools.product(ROUTES, (0.0, 0.3)):

        def run(x: Tensor, route: str = route, c: float = c) -> list[Tensor]:
            options = {**with_c(kind, c), "reduction": "none", "gradient": route}
            loss = bk.pseudo_huber(x, torch.zeros_like(x), **options)
            return [loss.detach(), *torch.autograd.grad(loss, x, torch.ones_like(loss))]

        whole = run(mixed)
        for actual, expected in zip(whole, run(usual.clone().requires_grad_()), strict=True):
            same_bits(actual[::2], expected)
        for i in range(len(mixed)):
            for actual, expected in zip(whole, run(mixed.detach()[i : i + 1].requires_grad_()), strict=True):
                same_bits(actual[i : i + 1], expected)


@pytest.mark.parametrize("size", MANY)
@pytest.mark.parametrize(("dtype", "scale"), [(F32, 1e17), (F32, 1e-21), (F64, 1e150), (F64, 1e-159)])
def test_squares_near_the_ends(each_backend: str, dtype: torch.dtype, scale: float, size: int) -> None:
    """A sum of squares that a dtype just holds, or whose terms are subnormal; gradients never notice."""
    r = (scale * random(2, size, dtype=F64)).to(dtype).requires_grad_()
    unit = 2.0**-500 if scale > 1 else 2.0**500
    inverse = 1.0 / unit
    expected = ((r.detach().double() * unit).square().sum(1) * inverse) * inverse
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    terms = size if each_backend == "reference" else 2  # which rounds every square by itself
    accuracy = 2e-6 if dtype == F32 else 1e-12
    for route in ROUTES:
        loss = bk.pseudo_huber(r, torch.zeros_like(r), kind="squared", reduction="none", gradient=route)
        (gradient,) = torch.autograd.grad(loss.sum(), r)
        torch.testing.assert_close(loss.detach(), expected.to(dtype), rtol=accuracy, atol=terms * least)
        assert torch.equal(gradient, 2 * r.detach())


@pytest.mark.parametrize(("dtype", "value"), [(F32, 1e30), (F64, 1e200)])
def test_squares_that_overflow(each_backend: str, dtype: torch.dtype, value: float) -> None:
    """An infinite loss whose gradient is finite, in one part of a sample or in several."""
    for size in MANY:
        pred = torch.ones(2, size, dtype=dtype)
        pred[1, 3] = value
        pred.requires_grad_()
        for route in ROUTES:
            loss = bk.pseudo_huber(pred, torch.zeros_like(pred), kind="squared", reduction="none", gradient=route)
            assert loss.tolist() == [size, math.inf]
            assert torch.equal(torch.autograd.grad(loss.sum(), pred)[0], 2 * pred.detach())


def test_reductions(each_backend: str) -> None:
    """The mean of float64 values whose sum overflows; a sum that does is infinite; weights that are large or small."""
    pred = torch.full((4, 2), 1e308, dtype=F64, requires_grad=True)
    zero = torch.zeros_like(pred)
    for kind in KINDS:
        loss = bk.pseudo_huber(pred, zero, c=0.0, kind=kind)
        norm = 1e308 * (2**0.5 if kind == "vector" else 1.0)
        check(loss.detach().reshape(1), [norm])
        slope = (0.5**0.5 if kind == "vector" else 0.5) / 4
        check(torch.autograd.grad(loss, pred)[0].flatten(), [slope] * 8)
        assert bk.pseudo_huber(pred, zero, c=0.0, kind=kind, reduction="sum") == math.inf
        weight = torch.tensor([1e-100, 1e-140, 0.0, 2.0], dtype=F64)
        loss = bk.pseudo_huber(pred, zero, c=0.0, kind=kind, weight=weight, reduction="none")
        check(loss.detach(), [1e-100 * norm, 1e-140 * norm, 0.0, math.inf])
        gradient = torch.autograd.grad(loss.sum(), pred)[0]
        check(gradient[:, 0], [1e-100 * 4 * slope, 1e-140 * 4 * slope, 0.0, 8 * slope])
    single = torch.tensor([[3e38, -3e38], [3e38, 3e38]], requires_grad=True)
    loss = bk.pseudo_huber(single, torch.zeros_like(single), c=0.0, kind="elementwise")
    check(loss.detach().reshape(1), [3e38])


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("wanted", [0, 1])
def test_a_factor_that_float32_does_not_hold_of_a_gradient_beside_the_cache(wanted: int, route: str) -> None:
    """Gradients of 8 MiB and more leave for memory in another way."""
    inputs = [(1e36 * random(1, 2**21)).requires_grad_(), torch.zeros(1, 2**21)]
    loss = bk.pseudo_huber(*(inputs if wanted == 0 else inputs[::-1]), c=0.0, gradient=route)
    (gradient,) = torch.autograd.grad(loss, inputs[0])
    wide = inputs[0].detach().double()
    torch.testing.assert_close(gradient, (wide / wide.norm()).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [1e5, 1e20, 1e34])
def test_a_small_weight_does_not_cost_digits(value: float) -> None:
    """A factor of the gradient that float32 holds with few digits, though the gradient itself has all."""
    for weight in (1e-30, 1e-38):
        pred = (value * random(1, 100)).requires_grad_()
        found = torch.autograd.grad(bk.pseudo_huber(pred, torch.zeros_like(pred), c=0.0, weight=weight), pred)[0]
        wide = pred.detach().double()
        expected = (weight * wide / wide.norm()).float()
        torch.testing.assert_close(found, expected, rtol=3e-7, atol=3e-45)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", KINDS)
def test_grad_scaler(each_backend: str, kind: str, route: str) -> None:
    """Large residuals give a step of the right size; an infinite one none, and a smaller scale."""
    for value, steps in ((1e30, True), (3e38, True), (math.inf, False), (math.nan, False)):
        weight = torch.nn.Parameter(torch.zeros(1, 2))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
        target = torch.tensor([[value, value if steps else 1.0]])
        loss = bk.pseudo_huber(weight, target, c=0.1, kind=kind, gradient=route)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = (0.5**0.5 if kind == "vector" else 0.5) if steps else 0.0
        torch.testing.assert_close(weight.detach(), torch.full((1, 2), moved))
        assert scaler.get_scale() == (65536.0 if steps else 32768.0)


# --- other derivatives ------------------------------------------------------------------------------------------------

SCALES = [(F32, 1e30), (F32, 1e-40), (F64, 1e200), (F64, 1e-200), (F64, 1e-310)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "scale"), SCALES)
@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_second_derivatives(each_backend: str, dtype: torch.dtype, scale: float, kind: str, ratio: float) -> None:
    """(1 - u u^T) / h with h = sqrt(|r|^2 + c^2) and u = r / h; elementwise, c^2 / h^3. Those above 1 / h overflow."""
    if scale < 1e-300 or (dtype == F32 and scale < 1):
        ratio, scale = 1.0, scale * (1e6 if dtype == F64 else 1e4)
    unit = torch.tensor([[3.0, -4.0, 0.5]], dtype=F64)
    r, c = (scale * unit).to(dtype).requires_grad_(), ratio * scale
    (gradient,) = torch.autograd.grad(bk.pseudo_huber(r, torch.zeros_like(r), c=c, kind=kind), r, create_graph=True)
    hessian = torch.stack([torch.autograd.grad(x, r, retain_graph=True)[0][0] for x in gradient[0]])
    if kind == "vector":
        h = (unit.square().sum() + ratio**2).sqrt()
        expected = (torch.eye(3, dtype=F64) - unit.T @ unit / h**2) / h
    else:
        expected = torch.diag((ratio**2 / (unit.square() + ratio**2).sqrt() ** 3)[0] / 3)
    scaled = hessian.double() * scale
    torch.testing.assert_close(scaled, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_in_c_and_transforms(kind: str) -> None:
    for dtype, scale in SCALES[:4:2]:
        r = torch.tensor([[3.0, -4.0]], dtype=F64).mul(scale).to(dtype)
        c = torch.tensor(12.0 * scale, dtype=dtype, requires_grad=True)
        loss = bk.pseudo_huber(r, torch.zeros_like(r), c=c, kind=kind)
        (found,) = torch.autograd.grad(loss, c)
        each = [12 / 13 - 1] if kind == "vector" else [12 / (144 + x * x) ** 0.5 - 1 for x in (3, 4)]
        torch.testing.assert_close(found.item(), sum(each) / len(each), rtol=1e-5, atol=0)
        one = torch.func.grad(lambda x, c=c: bk.pseudo_huber(x, torch.zeros_like(x), c=c.detach(), kind=kind))(r)
        leaf = r.clone().requires_grad_()
        plain = bk.pseudo_huber(leaf, torch.zeros_like(leaf), c=c.detach(), kind=kind)
        torch.testing.assert_close(one, torch.autograd.grad(plain, leaf)[0])
        tangent = torch.func.jvp(
            lambda x, c=c: bk.pseudo_huber(x, torch.zeros_like(x), c=c.detach(), kind=kind), (r,), (r,)
        )[1]
        torch.testing.assert_close(tangent, (one * r).sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_the_reference_agrees(kind: str) -> None:
    """On residuals of sizes from one end of float32 to the other, in one sample and each in its own."""
    sizes = 10.0 ** torch.linspace(-44, 38, 200, dtype=F64)
    for c in (0.0, 1e-30, 1e-6, 1.0, 1e15, 1e25):
        for shape in ((1, 200), (200, 1)):
            results = []
            for module in (bk, reference):
                leaf = (sizes * random(200, dtype=F64).sign()).float().reshape(shape).requires_grad_()
                loss = module.pseudo_huber(leaf, torch.zeros_like(leaf), reduction="none", **with_c(kind, c))
                results.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaf)))
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=3e-45)
