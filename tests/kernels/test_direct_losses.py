"""The losses beside the dispatcher: the bits of the other way, and no call that is watched, replaced or transformed."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import bicm_kernels as bk
from bicm_kernels import backend
from tests.support.ways import CONTEXTS, COUNTED, LAYOUTS, SWITCHED, TENSORS, Counter, Taken, agree, long_way

Bits = Callable[[Tensor, Tensor], None]
T, U = torch.tensor([0.7, 2.0], dtype=torch.float64), torch.tensor(0.3)
WAYS = ("auto", "forward", "backward")
#: Every loss, called with three states and options.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "pseudo_huber": lambda F, y, x, **more: bk.pseudo_huber(F, y, **more),
    "pseudo_huber of a number": lambda F, y, x, **more: bk.pseudo_huber(F, y, c=0.3, weight=U, reduction="sum", **more),
    "pseudo_huber elementwise": lambda F, y, x, **more: bk.pseudo_huber(
        F, y, kind="elementwise", c=0.1, weight=T, reduction="none", **more
    ),
    "pseudo_huber of elements": lambda F, y, x, **more: bk.pseudo_huber(
        F, y, kind="squared", weight=x.detach().abs(), **more
    ),
    "consistency_loss": lambda F, y, x, **more: bk.consistency_loss(x, F, T, U, y, **more),
    "consistency_loss scaled": lambda F, y, x, **more: bk.consistency_loss(
        x, F, T, None, y, weight=T, scaled=True, parameterization="edm", sigma_data=0.4, reduction="none", **more
    ),
}
#: The same with arguments that are laid out first.
LAID_OUT: dict[str, Callable[..., Tensor]] = {
    "consistency_loss of floats": lambda F, y, x, **more: bk.consistency_loss(x, F, 2.0, 0.4, y, weight=0.3, **more),
    "pseudo_huber masked": lambda F, y, x, **more: bk.pseudo_huber(F, y, weight=x.detach() > 0, **more),
    "pseudo_huber of pixels": lambda F, y, x, **more: bk.pseudo_huber(F, y, weight=x.detach()[:, :1].abs(), **more),
}
DTYPES = ((torch.float32,) * 3, (torch.float64, torch.float32, torch.bfloat16), (torch.float16,) * 3)


@pytest.fixture
def states() -> list[Tensor]:
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    return [x, x.flip(0).sin(), x.cos()]


def op_of(name: str) -> str:
    return name.split()[0]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("grad", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_plain_calls_take_it(
    name: str, grad: Callable[[], Any], states: list[Tensor], taken: Taken, same_bits: Bits
) -> None:
    with grad():
        for layout in LAYOUTS.values():
            for dtypes in DTYPES:
                given = [layout(x.to(dtype)) for x, dtype in zip(states, dtypes, strict=True)]
                ours = LOSSES[name](*given)
                assert taken == [(op_of(name), True)]
                taken.clear()
                agree(ours, long_way(LOSSES[name], *given), same_bits)


def scaled_gradients(value: Tensor, wanted: list[Tensor]) -> tuple[Tensor, ...]:
    upstream = torch.linspace(0.3, 1.7, value.numel()).to(value.dtype).reshape(value.shape)
    return torch.autograd.grad(value, wanted, upstream)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LOSSES)
def test_recorded_calls_take_it(name: str, way: str, states: list[Tensor], taken: Taken, same_bits: Bits) -> None:
    """With the same gradients, in the same layout, and the same function in the graph."""
    count = 2 if name.startswith("pseudo") else 3
    for layout in LAYOUTS.values():
        for dtypes in DTYPES:
            for needs in (1, 2, 2**count - 1):
                given = [layout(x.to(dtype)).detach() for x, dtype in zip(states, dtypes, strict=True)]
                given = [x.requires_grad_(bool(needs >> k & 1)) for k, x in enumerate(given)]
                found = []
                for on_long_way in (False, True):
                    go = long_way if on_long_way else lambda op, *args: op(*args)
                    taken.clear()
                    value = go(partial(LOSSES[name], gradient=way), *given)
                    gradients = go(scaled_gradients, value, [x for x in given if x.requires_grad])
                    assert all(took for _, took in taken) and len(taken) == (0 if on_long_way else 2)
                    found.append((type(value.grad_fn), value.detach(), *gradients))
                assert found[0][0] is found[1][0]
                for ours, theirs in zip(found[0][1:], found[1][1:], strict=True):
                    same_bits(ours, theirs)
                    assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("place", [0, 1])
def test_tensors_that_are_not_plain(
    name: str, kind: str, place: int, states: list[Tensor], taken: Taken, same_bits: Bits
) -> None:
    given = [*states]
    given[place] = TENSORS[kind](given[place])
    ours = LOSSES[name](*given)
    assert taken == [(op_of(name), kind in ("requires grad", "in a graph"))]
    theirs = long_way(LOSSES[name], *given)
    assert type(ours) is type(theirs)
    same_bits(ours.detach(), theirs.detach())
    assert ours.requires_grad == theirs.requires_grad


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LAID_OUT)
def test_arguments_that_are_laid_out(name: str, way: str, states: list[Tensor], taken: Taken, same_bits: Bits) -> None:
    given = [x.clone().requires_grad_(k == 0) for k, x in enumerate(states)]
    found = []
    for go in (lambda op, *args: op(*args), long_way):
        value = go(partial(LAID_OUT[name], gradient=way), *given)
        found.append((type(value.grad_fn), value.detach(), *go(scaled_gradients, value, given[:1])))
    assert [took for _, took in taken] == [False, True, True]
    assert found[0][0] is found[1][0]
    for ours, theirs in zip(found[0][1:], found[1][1:], strict=True):
        same_bits(ours, theirs)
    taken.clear()
    agree(LAID_OUT[name](*states), long_way(LAID_OUT[name], *states), same_bits)
    assert [took for _, took in taken] == [False, True]


def test_numbers_that_have_derivatives(states: list[Tensor], taken: Taken) -> None:
    x = states[0]
    for number in ({"weight": U.clone().requires_grad_()}, {"c": U.clone().requires_grad_()}):
        assert bk.pseudo_huber(x, x.cos(), **number).requires_grad
    t = T.clone().requires_grad_()
    assert bk.consistency_loss(x, x, t, None, x.cos()).requires_grad
    assert not any(took for _, took in taken)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kind", CONTEXTS)
def test_contexts_that_are_not_plain(name: str, kind: str, states: list[Tensor], taken: Taken, same_bits: Bits) -> None:
    given = [x.clone().requires_grad_(k == 0) for k, x in enumerate(states)]
    with CONTEXTS[kind]():
        value = LOSSES[name](*given)
        assert taken == [(op_of(name), False)]
        value.sum().backward()
    assert given[0].grad is not None
    plain = LOSSES[name](*given)
    same_bits(value.detach(), plain.detach())
    assert taken[-1][1]
    expected = torch.autograd.grad(plain.sum(), given[0])[0]
    if kind == "forward mode":  # the reference
        torch.testing.assert_close(given[0].grad, expected)
    else:
        same_bits(given[0].grad, expected)


def test_who_watches_sees_the_ops(states: list[Tensor]) -> None:
    def run(way: str) -> None:
        F = states[0].clone().requires_grad_()
        (0.3 * bk.pseudo_huber(F, states[1], gradient=way)).backward()

    expected = {
        "auto": {"pseudo_huber_with_gradients", "scale_gradients_"},
        "forward": {"pseudo_huber_with_gradients", "scale_gradients_"},
        "backward": {"pseudo_huber", "pseudo_huber_backward"},
    }
    for way, names in expected.items():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run(way)
        keys = {event.key for event in profile.key_averages()}
        assert {key for key in keys if key.startswith("bicm")} == {f"bicm_kernels::{name}" for name in names}
    with Counter() as counter:
        run("forward")
    assert [name for name in counter.seen if name.startswith("bicm")] == [
        "bicm_kernels::pseudo_huber_with_gradients",
        "bicm_kernels::scale_gradients_",
    ]


@pytest.mark.parametrize("op", ["pseudo_huber", "pseudo_huber_with_gradients", "pseudo_huber_backward"])
def test_an_implementation_from_python_replaces_ours(op: str, states: list[Tensor]) -> None:
    F, target = states[0].clone().requires_grad_(), states[1]
    way = "auto" if op == "pseudo_huber_with_gradients" else "backward"

    def run() -> tuple[Tensor, Tensor]:
        loss = bk.pseudo_huber(F, target, gradient=way)
        return loss.detach(), torch.autograd.grad(loss, F)[0]

    value, gradient = run()
    sevens = {
        "pseudo_huber": lambda pred, *rest: (torch.tensor(7.0), torch.ones(2, dtype=torch.float64)),
        "pseudo_huber_with_gradients": lambda needs, pred, *rest: (torch.tensor(7.0), [torch.full_like(pred, 7.0)]),
        "pseudo_huber_backward": lambda upstream, sums, needs, pred, *rest: [torch.full_like(pred, 7.0)],
    }
    with torch.library._scoped_library("bicm_kernels", "IMPL") as library, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that another one is replaced
        library.impl(op, sevens[op], "CPU")
        found = run()
        assert (found[0] == 7.0) == (op != "pseudo_huber_backward")
        assert bool((found[1] == 7.0).all()) == (op != "pseudo_huber")
    assert torch.equal(run()[0], value) and torch.equal(run()[1], gradient)


@pytest.mark.slow
@pytest.mark.parametrize(("value", "off"), [("0", True), (None, False)])
def test_it_can_be_switched_off(value: str | None, off: bool, python: Callable[..., Any]) -> None:
    loss = """
y = x.clone().requires_grad_()
(0.3 * bk.pseudo_huber(y, 0 * x, c=0.0)).backward()
torch.testing.assert_close(y.grad, 0.3 * x / 3**0.5)
"""
    python(SWITCHED.format(off=off) + loss, BICM_KERNELS_DIRECT=value, BICM_KERNELS_BACKEND="native")


def test_without_handles_the_dispatcher_is_called(python: Callable[..., Any]) -> None:
    program = """
import torch, bicm_kernels as bk
x, y = torch.ones(2, 3, requires_grad=True), torch.zeros(2, 3)
def run():
    return [torch.autograd.grad(0.3 * bk.pseudo_huber(x, y, gradient=way), x)[0] for way in ("auto", "backward")]
before = run()
bk.backend.library.forget_handles()
assert bk.backend.direct.pseudo_huber(2, x, y, None, None, 0, 0) is None
assert all(torch.equal(a, b) for a, b in zip(run(), before))
"""
    python(program, BICM_KERNELS_BACKEND="native")


def test_transforms_and_batched_gradients(states: list[Tensor], taken: Taken) -> None:
    F, target = states[0].double(), states[1].double()
    expected = torch.autograd.grad(bk.pseudo_huber(leaf := F.clone().requires_grad_(), target), leaf)[0]
    taken.clear()
    torch.testing.assert_close(torch.func.grad(lambda y: bk.pseudo_huber(y, target))(F), expected)
    torch.testing.assert_close(
        torch.func.jvp(lambda y: bk.pseudo_huber(y, target), (F,), (F,))[1], (expected * F).sum()
    )
    assert not any(took for _, took in taken)
    for way in WAYS:
        values = bk.pseudo_huber(leaf, target, reduction="none", gradient=way)
        assert taken.pop() == ("pseudo_huber", True)
        taken.clear()
        eye = torch.eye(2, dtype=torch.float64)
        batched = torch.autograd.grad(values, leaf, eye, is_grads_batched=True)[0]
        assert not any(took for _, took in taken)
        torch.testing.assert_close(batched.sum(0) / 2, expected)


def test_compiled_code_takes_the_dispatcher(states: list[Tensor], taken: Taken) -> None:
    def op(x: Tensor, y: Tensor) -> Tensor:
        return bk.pseudo_huber(x, y) + bk.consistency_loss(x, y, T, None, y)

    F = states[0].clone().requires_grad_()
    expected = torch.autograd.grad(op(F, states[1]), F)[0]
    taken.clear()
    torch._dynamo.reset()
    found = torch.autograd.grad(torch.compile(op, backend="aot_eager", fullgraph=True)(F, states[1]), F)[0]
    torch.testing.assert_close(found, expected)
    assert not any(took for _, took in taken)  # derivatives ask while they are traced


def test_inference_tensors(states: list[Tensor], taken: Taken, same_bits: Bits) -> None:
    """They cannot be saved; kept gradients need none of them, and the backward pass reads copies."""
    with torch.inference_mode():
        target = states[1].clone()
    F = states[0].clone().requires_grad_()
    expected = torch.autograd.grad(bk.pseudo_huber(F, states[1]), F)[0]
    for way in ("auto", "forward", "backward"):
        same_bits(torch.autograd.grad(bk.pseudo_huber(F, target, gradient=way), F)[0], expected)
        weight = torch.ones(2)
        same_bits(torch.autograd.grad(bk.pseudo_huber(F, target, weight=weight, gradient=way), F)[0], expected)
    (gradient,) = torch.autograd.grad(bk.pseudo_huber(F, target), F, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.sum().backward()


WRONG: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "shape": lambda x, y: bk.pseudo_huber(x, y[:1]),
    "dim": lambda x, y: bk.pseudo_huber(torch.tensor(1.0), torch.tensor(1.0)),
    "dtype": lambda x, y: bk.pseudo_huber(x, y.int()),
    "no tensor": lambda x, y: bk.pseudo_huber(x, 3.0),  # type: ignore[arg-type]
    "weight": lambda x, y: bk.pseudo_huber(x, y, weight=torch.ones(3)),
    "c": lambda x, y: bk.pseudo_huber(x, y, c=-1.0),
    "kind": lambda x, y: bk.pseudo_huber(x, y, kind="other"),
    "no c": lambda x, y: bk.pseudo_huber(x, y, kind="elementwise"),
    "too much c": lambda x, y: bk.pseudo_huber(x, y, kind="squared", c=1.0),
    "reduction": lambda x, y: bk.pseudo_huber(x, y, reduction="max"),
    "gradient": lambda x, y: bk.pseudo_huber(x, y, gradient="both"),
    "no target": lambda x, y: bk.consistency_loss(x, y, T),
    "u of edm": lambda x, y: bk.consistency_loss(x, y, T, U, x, parameterization="edm"),
    "sigma_data": lambda x, y: bk.consistency_loss(x, y, T, U, x, sigma_data=None),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("name", WRONG)
def test_errors_are_those_of_the_long_way(name: str, tracked: bool, states: list[Tensor], taken: Taken) -> None:
    x = states[0].requires_grad_(tracked)
    raised: list[Exception] = []
    for way in (WRONG[name], lambda *args: long_way(WRONG[name], *args)):
        with pytest.raises((TypeError, ValueError)) as caught:
            way(x, states[1])
        raised.append(caught.value)
    assert {took for _, took in taken} <= {False}
    assert (type(raised[0]), str(raised[0])) == (type(raised[1]), str(raised[1]))


def test_nothing_is_kept(states: list[Tensor]) -> None:
    """Neither by a call nor by a graph that is gone, and no graph waits for the collector of cycles."""
    F = states[0].clone().requires_grad_()
    kept = [F, states[1], T, U, *COUNTED]

    def run() -> None:
        for way in WAYS:
            (0.3 * bk.pseudo_huber(F, states[1], weight=T, gradient=way)).backward()
            bk.consistency_loss(states[1], F, T, U, states[2], gradient=way)
            bk.pseudo_huber(states[1], states[2], weight=T)

    run()
    before = [sys.getrefcount(one) for one in kept], [x._use_count() for x in (F, states[1], T, U)]
    for _ in range(100):
        run()
    after = [sys.getrefcount(one) for one in kept], [x._use_count() for x in (F, states[1], T, U)]
    assert after[1] == before[1]
    assert all(b < a + 20 for a, b in zip(before[0], after[0], strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_large_tensors(way: str, threads: Callable[[int], Any], taken: Taken, same_bits: Bits) -> None:
    F, target = (torch.randn(3, 2**19 + 7, generator=torch.Generator().manual_seed(k)) for k in range(2))
    F.requires_grad_()

    def run() -> tuple[Tensor, ...]:
        loss = bk.pseudo_huber(F, target, gradient=way)
        return (loss.detach(), *torch.autograd.grad(0.3 * loss, F))

    with threads(2):
        ours = run()
    assert len(taken) == 2 and all(took for _, took in taken)
    for a, b in zip(ours, long_way(run), strict=True):
        same_bits(a, b)


def test_other_backends_have_none() -> None:
    F = torch.ones(2, 3, requires_grad=True)
    with backend.use("reference"):
        assert type(bk.pseudo_huber(F, 0 * F.detach()).grad_fn).__name__ not in (
            "TrackedBackward",
            "KeptBesideBackward",
        )
