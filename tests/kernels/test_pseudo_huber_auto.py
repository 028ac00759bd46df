"""Losses by default: one reading where gradients can be kept, second derivatives everywhere, and no more memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import bicm_kernels as bk
from tests.support.loss_calls import KINDS, keeps, leaves
from tests.support.tensors import BF16, F16, F32, Bits, random

LOSSES = ("pseudo_huber", "consistency_loss")
REDUCTIONS = ("mean", "sum", "none")


def loss_of(name: str, inputs: list[Tensor], **options: Any) -> Tensor:
    """One of the losses; the inputs that it differentiates are the first two, or all three."""
    if name == "pseudo_huber":
        return bk.pseudo_huber(*inputs[:2], **options)
    F, target, x = inputs
    return bk.consistency_loss(x, F, torch.linspace(0.5, 2.0, len(x)), None, target, **options)


def inputs_of(name: str, *shape: int, dtype: torch.dtype = F32) -> list[Tensor]:
    return leaves(2 if name == "pseudo_huber" else 3, *shape, dtype=dtype)


def calls(function: Callable[[], Any]) -> list[str]:
    """The ops of this package that a function calls."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    names = [event.name for event in profile.events() if event.name.startswith("bicm_kernels::")]
    return [name.removeprefix("bicm_kernels::") for name in names]


# --- one reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_one_call_of_a_kernel(name: str) -> None:
    inputs = inputs_of(name, 3, 40)
    assert calls(lambda: loss_of(name, inputs).backward()) == [f"{name}_with_gradients"]
    assert calls(lambda: (0.3 * loss_of(name, inputs)).backward()) == [f"{name}_with_gradients", "scale_gradients_"]
    with torch.no_grad():
        assert calls(lambda: loss_of(name, inputs)) == [name]
    assert calls(lambda: loss_of(name, [x.detach() for x in inputs])) == [name]


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_the_bits_of_the_other_ways(name: str, reduction: str, options: dict[str, Any], same_bits: Bits) -> None:
    weight = torch.linspace(0.3, 1.7, 3)
    for shape in ((3, 1), (3, 4, 5), (3, 2049)):
        inputs = inputs_of(name, *shape)
        for upstream in (1.0, -0.25, 0.3):
            found: dict[str, list[Tensor]] = {}
            for way in ("auto", "forward", "backward"):
                loss = loss_of(name, inputs, reduction=reduction, weight=weight, gradient=way, **options)
                gradients = torch.autograd.grad(loss, inputs, torch.full_like(loss, upstream))
                found[way] = [loss.detach(), *gradients]
            for a, b, c in zip(*found.values(), strict=True):
                same_bits(a, b)
                if upstream == 0.3:
                    torch.testing.assert_close(a, c, rtol=2.0**-22, atol=0)
                else:
                    same_bits(a, c)


@pytest.mark.parametrize("half", [F16, BF16])
def test_halves_that_need_a_gradient_are_read_twice(half: torch.dtype, same_bits: Bits) -> None:
    pred, target = random(3, 300, dtype=half).requires_grad_(), random(3, 300, dtype=F32, seed=1)
    loss = bk.pseudo_huber(pred, target)
    assert not keeps(loss)
    other = bk.pseudo_huber(pred, target, gradient="backward")
    same_bits(*(torch.autograd.grad(0.3 * value, pred)[0] for value in (loss, other)))
    assert keeps(bk.pseudo_huber(pred.detach(), target.requires_grad_()))


# --- memory -----------------------------------------------------------------------------------------------------------


def test_what_is_saved() -> None:
    """The inputs themselves, and the needed gradient, which is scaled in place and becomes the leaf's own."""
    F, target, x = (random(16, 20_000, dtype=F32, seed=k) for k in range(3))
    F.requires_grad_()
    for factor in (1.0, 0.7):
        F.grad = None
        loss = loss_of("consistency_loss", [F, target, x])
        saved = [y for y in loss.grad_fn.saved_tensors if y is not None and y.numel() > 16]  # type: ignore[union-attr]
        kept, *inputs = [y.data_ptr() for y in saved]
        assert inputs == [y.data_ptr() for y in (F, target, x)]
        del saved
        (factor * loss).backward()
        assert F.grad is not None and F.grad.data_ptr() == kept


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("factor", [1.0, 0.7])
def test_no_more_memory_than_from_two_readings(name: str, factor: float) -> None:
    batch, d = 16, 1000  # what is larger lies in memory of our own, of which the profiler knows nothing
    inputs = [y.detach().requires_grad_(k == 0) for k, y in enumerate(inputs_of(name, batch, d))]
    peaks = {}
    for way in ("backward", "auto"):
        inputs[0].grad = None
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            (factor * loss_of(name, inputs, gradient=way)).backward()
        now, peaks[way] = 0, 0
        for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
            if event.name() == "[memory]":
                now += event.nbytes()
                peaks[way] = max(peaks[way], now)
    assert 4 * batch * d <= peaks["auto"] <= peaks["backward"] + 64


# --- second derivatives -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("name", LOSSES)
def test_twice(name: str, options: dict[str, Any]) -> None:
    inputs = inputs_of(name, 2, 3, dtype=torch.float64)
    assert keeps(loss_of(name, inputs, **options))
    for reduction in REDUCTIONS:
        assert gradcheck(lambda *y, r=reduction: loss_of(name, [*y], reduction=r, **options), inputs)
        assert gradgradcheck(lambda *y, r=reduction: loss_of(name, [*y], reduction=r, **options), inputs)


def test_a_gradient_that_records_its_own() -> None:
    """With the values of the other way, and of a graph that is not kept."""
    pred, target = leaves(2, 3, 40)
    found = []
    for way in ("auto", "backward"):
        loss = bk.pseudo_huber(pred, target, c=0.3, gradient=way)
        (first,) = torch.autograd.grad(loss, pred, create_graph=True, retain_graph=False)
        assert first.requires_grad
        found.append([first.detach(), *torch.autograd.grad(first.square().sum(), [pred, target])])
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, pred)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_plain_and_recorded_passes_of_one_graph() -> None:
    pred, target = leaves(2, 3, 40)
    loss = bk.pseudo_huber(pred, target, c=0.3)
    plain = torch.autograd.grad(3.0 * loss, [pred, target], retain_graph=True)
    recorded = torch.autograd.grad(3.0 * loss, [pred, target], create_graph=True)
    again = torch.autograd.grad(3.0 * loss, [pred, target])
    for a, b, c in zip(plain, recorded, again, strict=True):
        assert torch.equal(a, c)
        torch.testing.assert_close(a, b.detach())


# --- graphs that are used in other ways -------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("upstream", [1.0, 0.7])
def test_a_retained_graph_gives_the_same_again(reduction: str, upstream: float) -> None:
    F, target = leaves(2, 4, 300, dtype=F32)
    loss = bk.pseudo_huber(F, target, reduction=reduction)
    assert keeps(loss)
    weight = torch.full_like(loss, upstream)
    first = torch.autograd.grad(loss, [F, target], weight, retain_graph=True)
    copies = [x.clone() for x in first]
    for x in first:
        x.zero_()
    for retain in (True, False):
        found = torch.autograd.grad(loss, [F, target], weight, retain_graph=retain)
        assert all(torch.equal(a, b) for a, b in zip(found, copies, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, F, weight)


def test_gradients_of_some_inputs() -> None:
    F, target, x = leaves(3, 3, 40, dtype=F32)
    everything = torch.autograd.grad(loss_of("consistency_loss", [F, target, x]), [F, target, x], torch.tensor(0.3))
    for mask in range(1, 8):
        chosen = [k for k in range(3) if mask >> k & 1]
        loss = loss_of("consistency_loss", [F, target, x])
        found = torch.autograd.grad(loss, [(F, target, x)[k] for k in chosen], torch.tensor(0.3), retain_graph=True)
        rest = [k for k in range(3) if k not in chosen]
        found += torch.autograd.grad(loss, [(F, target, x)[k] for k in rest], torch.tensor(0.3)) if rest else ()
        for k, gradient in zip([*chosen, *rest], found, strict=True):
            assert torch.equal(gradient, everything[k])
        needing = [y.detach().requires_grad_(k in chosen) for k, y in enumerate((F, target, x))]
        loss = loss_of("consistency_loss", needing)
        assert len([y for y in loss.grad_fn.saved_tensors if y is not None]) == 4 + len(chosen)  # type: ignore[union-attr]
        loss.backward(torch.tensor(0.3))
        for k, y in enumerate(needing):
            assert y.grad is None if k in rest else torch.equal(y.grad, everything[k])  # type: ignore[arg-type]


@pytest.mark.parametrize("factor", [1.0, 0.7])
def test_one_tensor_in_two_places(factor: float) -> None:
    (x,) = leaves(1, 2, 3)
    found = [
        torch.autograd.grad(factor * bk.consistency_loss(x, x, 2.0, 0.5, x, c=0.1, gradient=way), [x])[0]
        for way in ("auto", "backward")
    ]
    torch.testing.assert_close(*found, rtol=1e-14, atol=1e-16)
    loss = bk.pseudo_huber(x, x)
    assert keeps(loss)
    assert not torch.autograd.grad(factor * loss, x, create_graph=True)[0].any()


def test_expanded_inputs(same_bits: Bits) -> None:
    row, target = random(1, 6, 8, dtype=F32), random(4, 6, 8, dtype=F32, seed=1)
    found = []
    for way in ("auto", "backward"):
        leaf = row.clone().requires_grad_()
        loss = bk.pseudo_huber(leaf.expand(4, -1, -1), target, gradient=way)
        (0.5 * loss).backward()
        whole = row.expand(4, -1, -1).detach().requires_grad_()  # overlaps itself, and is a leaf
        found.append([leaf.grad, torch.autograd.grad(bk.pseudo_huber(whole, target, gradient=way), whole)[0]])
    for a, b in zip(*found, strict=True):
        same_bits(a, b)  # type: ignore[arg-type]


def test_nothing() -> None:
    for shape in ((0, 5), (2, 0)):
        for reduction in REDUCTIONS:
            F, target = leaves(2, *shape, dtype=F32)
            loss = bk.pseudo_huber(F, target, reduction=reduction)
            found = torch.autograd.grad(loss, [F, target], torch.full_like(loss, 0.3), retain_graph=True)
            assert [x.shape for x in found] == [torch.Size(shape)] * 2
            (again,) = torch.autograd.grad(loss.sum(), F, create_graph=True)
            assert again.shape == shape


def test_an_input_that_was_overwritten_is_an_error() -> None:
    for place in range(2):
        pred, target = 2.0 * random(2, 8, dtype=F32).requires_grad_(), random(2, 8, dtype=F32, seed=1)
        loss = bk.pseudo_huber(pred, target)
        (pred, target)[place].add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
