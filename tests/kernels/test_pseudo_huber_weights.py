"""Losses whose elements have weights: masks, formulas, shapes, derivatives, tracing, errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import bicm_kernels as bk
from tests.support.loss_calls import CODES, KINDS, Allocations, leaves, with_c
from tests.support.tensors import BF16, F16, F32, F64, LAYOUTS, Threads, random

SHAPES = [(3, 7), (2, 3, 5, 9), (4, 1025), (2, 70_001)]
ROUTES = ("backward", "forward")


def formula(pred: Tensor, target: Tensor, weight: Tensor, kind: str, c: float) -> Tensor:
    """(B,), in float64, as people write it."""
    r, w = (x.flatten(1) for x in (pred.double() - target.double(), weight.double().expand(pred.shape)))
    if kind == "elementwise":
        return (w * ((r.square() + c * c).sqrt() - c)).mean(1)
    s = (w * r.square()).sum(1)
    return s if kind == "squared" else (s + c * c).sqrt() - c


def run(loss: Callable[..., Tensor], inputs: list[Tensor], *rest: Any, **options: Any) -> list[Tensor]:
    """The value and the gradients."""
    given = [x.detach().requires_grad_() for x in inputs]
    value = loss(*given, *rest, **options)
    upstream = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).reshape(value.shape)
    return [value.detach(), *torch.autograd.grad(value, given, upstream)]


def close(actual: Tensor, expected: Tensor) -> None:
    rounding = {F16: 2e-3, BF16: 1e-2, F32: 2e-6, F64: 1e-12}[actual.dtype]
    atol = max(rounding * expected.abs().max().item() / 10, 6e-8 if actual.dtype == F16 else 0.0)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rounding, atol=atol)


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F32, F16), (F64, F64), (F16, F64)], ids=str)
def test_the_formula(each_backend: str, dtypes: tuple[torch.dtype, torch.dtype], kind: str) -> None:
    for shape, route in itertools.product(SHAPES, ROUTES):
        pred, target = random(*shape, dtype=dtypes[0]), random(*shape, dtype=dtypes[1], seed=1)
        weight = random(*shape, dtype=dtypes[0], seed=2).abs()
        options = {**with_c(kind, 0.3), "reduction": "none"}
        found = run(bk.pseudo_huber, [pred, target], weight=weight, gradient=route, **options)
        wide = [pred.double(), target.double()]
        wanted = run(lambda a, b, w=weight: formula(a, b, w, kind, 0.3), wide)
        for ours, theirs in zip(found, wanted, strict=True):
            close(ours, theirs)


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_mask_is_what_is_left(each_backend: str, dtype: torch.dtype, kind: str) -> None:
    """The loss of residuals that are 0 under the mask, of all elements; and gradients that are 0 there."""
    pred, target = random(3, 4, 200, dtype=dtype), random(3, 4, 200, dtype=dtype, seed=1)
    mask = random(3, 4, 200, seed=2) > 0
    left = torch.where(mask, pred, target)
    for c, reduction in ((None if kind != "elementwise" else 0.1, "mean"), (0.3, "sum")):
        options = {**with_c(kind, c), "reduction": reduction}
        value, gradient, other = run(bk.pseudo_huber, [left, target], **options)
        for weight in (mask, mask.to(dtype)):
            for found, wanted in zip(
                run(bk.pseudo_huber, [pred, target], weight=weight, **options), (value, gradient, other), strict=True
            ):
                close(found, wanted)
                assert found.dim() == 0 or not found[~mask].any()


@pytest.mark.parametrize("options", KINDS)
def test_the_consistency_loss(each_backend: str, options: dict[str, Any]) -> None:
    x, F, target, weight = (random(3, 2, 5, 40, dtype=F64, seed=k) for k in range(4))
    weight, t = weight.abs()[:, :1], torch.tensor([0.1, 2.0, 70.0], dtype=F64)
    for parameterization, scaled in itertools.product(("bcm", "cm", "edm"), (False, True)):
        form: dict[str, Any] = {"parameterization": parameterization, "scaled": scaled}

        def ours(x: Tensor, F: Tensor, target: Tensor, form: dict[str, Any] = form) -> Tensor:
            return bk.consistency_loss(x, F, t, None, target, weight=weight, **form, **options)

        def theirs(x: Tensor, F: Tensor, target: Tensor, form: dict[str, Any] = form) -> Tensor:
            return bk.pseudo_huber(bk.denoise(x, F, t, **form), target, weight=weight, **options)

        for a, b in zip(run(ours, [x, F, target]), run(theirs, [x, F, target]), strict=True):
            close(a, b)


@pytest.mark.parametrize("options", KINDS)
def test_shapes_and_layouts(each_backend: str, options: dict[str, Any]) -> None:
    """What broadcasts is not copied, and counts as what it stands for."""
    shape = (3, 5, 7, 4)
    for k, place in enumerate(LAYOUTS.values()):
        pred, target = place(random(*shape)), list(LAYOUTS.values())[k - 1](random(*shape, seed=1))
        for small in [(3, 1, 7, 4), (1, 5, 1, 1), (3, 1, 1, 1), (1, 1, 7, 1)]:
            weight = random(*small, seed=2).abs()
            whole = weight.expand(shape).contiguous()
            found = run(bk.pseudo_huber, [pred, target], weight=weight, **options)
            for a, b in zip(found, run(bk.pseudo_huber, [pred, target], weight=whole, **options), strict=True):
                close(a, b.double())
        weight = place(random(*shape, seed=2)).abs()
        found = run(bk.pseudo_huber, [pred, target], weight=weight.to(F16), **options)
        assert each_backend == "reference" or found[1].stride() == torch.empty_like(pred).stride()


@pytest.mark.parametrize("options", KINDS)
def test_nothing_of_the_size_of_a_sample_is_made(options: dict[str, Any]) -> None:
    pred, target = random(4, 3, 64, 64, dtype=F32).requires_grad_(), random(4, 3, 64, 64, seed=1)
    mask = (random(4, 1, 64, 64, seed=2) > 0).float()
    with Allocations() as allocated:
        bk.pseudo_huber(pred, target, weight=mask, **options).backward()
    sizes = [
        n
        for address, n in allocated.found.items()
        if address not in (pred.data_ptr(), target.data_ptr(), mask.data_ptr())
    ]
    assert sorted(sizes)[-1] == pred.numel() * 4
    assert sum(sizes) < pred.numel() * 4 + 1000


@pytest.mark.parametrize("kind", CODES)
def test_nothing_times_infinity(each_backend: str, kind: str) -> None:
    """NaN, as in the formula, in the loss and where it is; a finite residual under the mask is never seen."""
    for dtype, large in ((F32, 1e30), (F64, 1e100)):
        pred, weight = torch.ones(3, 50, dtype=dtype), torch.ones(3, 50, dtype=dtype)
        pred[0, 7], pred[1, 7], pred[2, 7] = large, math.inf, math.nan
        weight[:, 7] = 0.0
        value, gradient, _ = run(
            bk.pseudo_huber, [pred, 0 * torch.ones_like(pred)], weight=weight, reduction="none", **with_c(kind, 0.5)
        )
        assert value.isnan().tolist() == [False, True, True]
        assert gradient[:, 7].isnan().tolist() == [False, True, True]
        assert gradient[0, 7] == 0
        assert gradient[0].isfinite().all()


def test_weights_below_zero(each_backend: str) -> None:
    """A sum that is negative has no norm, whatever the kind."""
    for options, dtype in itertools.product(KINDS, (F32, F64)):
        pred = random(2, 40, dtype=dtype)
        value = bk.pseudo_huber(
            pred, torch.zeros_like(pred), weight=-torch.ones_like(pred), reduction="none", **options
        )
        assert value.isnan().all()


def test_threads_and_the_batch(threads: Threads) -> None:
    pred, target, weight = (random(5, 70_001, seed=k) for k in range(3))
    for options in KINDS:
        found = []
        for count in (1, 2):
            with threads(count):
                found.append(run(bk.pseudo_huber, [pred, target], weight=weight.abs(), reduction="none", **options))
        one = run(bk.pseudo_huber, [pred[3:4], target[3:4]], weight=weight.abs()[3:4], reduction="none", **options)
        assert all(map(torch.equal, *found))
        assert torch.equal(found[0][0][3:4], one[0])


# --- derivatives and traced graphs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("route", ROUTES)
def test_gradcheck(each_backend: str, options: dict[str, Any], route: str) -> None:
    pred, target, x = leaves(3, 3, 2, 4)
    weight = (random(3, 2, 4, dtype=F64, seed=7).abs() + 0.1).requires_grad_()
    fixed = weight.detach()
    more = {**options, "gradient": route}
    assert gradcheck(lambda a, b: bk.pseudo_huber(a, b, weight=fixed, **more), (pred, target))
    assert gradcheck(lambda a, b, w: bk.pseudo_huber(a, b, weight=w, **more), (pred, target, weight))
    assert gradcheck(
        lambda a, b: bk.consistency_loss(x.detach(), a, 2.0, None, b, weight=fixed, **more), (pred, target)
    )
    if route == "backward":
        assert gradgradcheck(lambda a, w: bk.pseudo_huber(a, target.detach(), weight=w, **more), (pred, weight))


@pytest.mark.parametrize("options", KINDS)
def test_opcheck_and_compile(options: dict[str, Any]) -> None:
    ops, kind = torch.ops.bicm_kernels, CODES[options.get("kind", "vector")]
    pred, target = leaves(2, 3, 2, 5, dtype=F32)
    weight = random(3, 1, 5, seed=7).abs()
    c = None if kind == 2 else torch.tensor(0.3)
    torch.library.opcheck(ops.pseudo_huber.tensor, (pred, target, weight.expand(3, 2, 5), c, kind, 0))
    torch.library.opcheck(ops.pseudo_huber_with_gradients.tensor, (3, pred, target, weight.expand(3, 2, 5), c, kind, 0))
    torch._dynamo.reset()

    def loss(pred: Tensor, weight: Tensor, route: str) -> Tensor:
        return bk.pseudo_huber(pred, target.detach(), weight=weight, gradient=route, **options)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for given, route in itertools.product((weight, weight > 0.5, weight.expand(3, 2, 5)), ROUTES):
        (ours,) = torch.autograd.grad(compiled(pred, given, route), pred)
        assert torch.equal(ours, torch.autograd.grad(loss(pred, given, route), pred)[0])


@pytest.mark.parametrize("kind", CODES)
def test_one_weight_of_samples_of_one_element(each_backend: str, kind: str) -> None:
    pred, target, options = random(5), random(5, seed=1), with_c(kind, 0.3)
    for one in (torch.tensor([0.3]), torch.tensor([True]), torch.tensor([False])):
        found = run(bk.pseudo_huber, [pred, target], weight=one, **options)
        for ours, theirs in zip(
            found, run(bk.pseudo_huber, [pred, target], weight=one.expand(5), **options), strict=True
        ):
            assert torch.equal(ours, theirs)


X = torch.ones(2, 3, 4)
WRONG: list[tuple[type[Exception], str, Tensor]] = [
    (ValueError, r"weight must be 0-d, \(2,\) or broadcast to the shape of pred, \(2, 3, 4\).*\(3, 4\)", X[0]),
    (ValueError, r"weight must be 0-d, \(2,\) or broadcast to the shape of pred.*\(2, 3, 2\)", X[..., :2]),
    (ValueError, r"weight must be 0-d, \(2,\) or broadcast to the shape of pred.*got shape \(3,\)", X[0, :, 0]),
    (ValueError, r"weight must be 0-d, \(2,\) or broadcast.*got shape \(1,\)", X[0, 0, :1]),
    (TypeError, "weight must be a floating tensor or a bool mask, got torch.int64", X.long()),
]


@pytest.mark.parametrize(("error", "message", "weight"), WRONG)
def test_errors(each_backend: str, error: type[Exception], message: str, weight: Tensor) -> None:
    with pytest.raises(error, match=message):
        bk.pseudo_huber(X, X, weight=weight)
