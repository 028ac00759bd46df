"""Losses with gradient="forward": the bits of the other way, what is kept, and what a retained graph still needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import bicm_kernels as bk
from bicm_kernels import backend
from tests.support.loss_calls import KINDS, Allocations, code_of, leaves, step
from tests.support.tensors import random

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
Bits = Callable[[Tensor, Tensor], None]
ROUTES = ("backward", "forward")
REDUCTIONS = ("mean", "sum", "none")
UNIT = 65536  # elements that the CPU sums by themselves


def loss_of(inputs: list[Tensor], **options: Any) -> Tensor:
    """A consistency loss where there are three inputs, a distance where there are two."""
    if len(inputs) == 2:
        return bk.pseudo_huber(*inputs, **options)
    t = torch.linspace(0.5, 2.0, len(inputs[0]))
    return bk.consistency_loss(inputs[0], inputs[1], t, None, inputs[2], **options)


def both(inputs: list[Tensor], upstream: float | Tensor, **options: Any) -> list[list[Tensor]]:
    """The loss and its gradients on either route."""
    results = []
    for route in ROUTES:
        given = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
        loss = loss_of(given, gradient=route, **options)
        wanted = [x for x in given if x.requires_grad]
        weight = upstream if isinstance(upstream, Tensor) else torch.full_like(loss, upstream)
        results.append([loss.detach(), *torch.autograd.grad(loss, wanted, weight)])
    return results


@pytest.fixture(params=["native", "reference"])
def any_backend(request: pytest.FixtureRequest) -> Any:
    with backend.use(request.param):
        yield


# --- bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("count", [2, 3])
def test_powers_of_two_keep_every_bit(
    any_backend: None, count: int, reduction: str, options: dict[str, Any], same_bits: Bits
) -> None:
    weight = torch.linspace(0.3, 1.7, 3)
    for shape in ((3, 1), (3, 4, 5), (3, 2049), (3, UNIT + 1030)):
        for dtype in (F32, F64) if shape[1] < UNIT else (F32,):
            inputs = leaves(count, *shape, dtype=dtype)
            for upstream in (1.0, 1024.0, 2.0**-7, -1.0):
                for a, b in zip(*both(inputs, upstream, weight=weight, reduction=reduction, **options), strict=True):
                    same_bits(a, b)


@pytest.mark.parametrize("options", KINDS)
def test_other_upstreams_round_once_more(options: dict[str, Any]) -> None:
    for reduction, upstream in (("mean", 0.3), ("none", torch.tensor([0.3, 1.0, -7.1]))):
        inputs = leaves(3, 3, 500, dtype=F32)
        (loss, *plain), (other, *kept) = both(inputs, upstream, reduction=reduction, **options)
        assert torch.equal(loss, other)
        for a, b in zip(plain, kept, strict=True):
            torch.testing.assert_close(b, a, rtol=2.0**-22, atol=0)


def test_layouts_and_batches(same_bits: Bits) -> None:
    x, target = (random(4, 6, 8, 10, dtype=F32, seed=k) for k in range(2))
    last = x.to(memory_format=torch.channels_last)
    repeated = [x[:1].expand(4, -1, -1, -1), target], [x, x[:, :, :1].expand_as(x)]
    for inputs in ([last, target], [x[..., ::2], target[..., 1::2]], *repeated):
        for a, b in zip(*both([y.detach().requires_grad_() for y in inputs], 1.0), strict=True):
            same_bits(a, b)
            assert a.stride() == b.stride()
    inputs = [last.detach().requires_grad_(), target]
    whole = both(inputs, 1.0, reduction="none")[1]
    for place in (0, 3):
        alone = [y[place : place + 1].detach().requires_grad_(y.requires_grad) for y in inputs]
        for a, b in zip(whole, both(alone, 1.0, reduction="none")[1], strict=True):
            same_bits(a[place : place + 1], b)


def test_only_what_is_needed() -> None:
    x, F, target = leaves(3, 2, 8, dtype=F32)
    everything = both([x, F, target], 1.0)[0][1:]
    for mask in range(1, 8):
        inputs = [y.detach().requires_grad_(bool(mask >> k & 1)) for k, y in enumerate((x, F, target))]
        loss = loss_of(inputs, gradient="forward")
        assert len(loss.grad_fn.saved_tensors) == mask.bit_count()
        loss.backward()
        for y, expected in zip(inputs, everything, strict=True):
            assert (y.grad is not None) == y.requires_grad
            assert y.grad is None or torch.equal(y.grad, expected)
    with torch.no_grad():
        assert not loss_of([x, F, target], gradient="forward").requires_grad


@pytest.mark.parametrize("half", [F16, BF16])
def test_a_half_takes_the_other_way(half: torch.dtype, same_bits: Bits) -> None:
    """The gradient of a scaled loss is scaled before it is rounded; where no half needs one, it is kept."""
    pred, target = random(8, 300, dtype=half).requires_grad_(), random(8, 300, dtype=F32, seed=1)
    weight = torch.linspace(1e-6, 1e-5, 8)
    for a, b in zip(*both([pred, target], 65536.0, weight=weight), strict=True):
        same_bits(a, b)
    loss = bk.pseudo_huber(pred, target, weight=weight, gradient="forward")
    assert type(loss.grad_fn).__name__ == "TrackedBackward"
    kept = bk.pseudo_huber(target.requires_grad_(), pred.detach(), gradient="forward")
    assert type(kept.grad_fn).__name__ == "KeptBackward"


def test_numbers_that_are_tensors(same_bits: Bits) -> None:
    numbers = {"c": torch.tensor(0.2), "weight": torch.tensor([0.5, 1.0, 2.0])}
    for a, b in zip(*both(leaves(3, 3, 40, dtype=F32), 1.0, **numbers), strict=True):
        same_bits(a, b)
    c = torch.tensor(0.2, requires_grad=True)
    pair = leaves(2, 3, 4, dtype=F32)
    (ours,) = torch.autograd.grad(bk.pseudo_huber(*pair, c=c, gradient="forward"), c)
    (expected,) = torch.autograd.grad(bk.reference.pseudo_huber(*pair, c=c), c)
    same_bits(ours, expected)


def test_nothing() -> None:
    for shape in ((0, 5), (2, 0)):
        for reduction in REDUCTIONS:
            plain, kept = both(leaves(2, *shape, dtype=F32), 1.0, reduction=reduction)
            for a, b in zip(plain, kept, strict=True):
                assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@pytest.mark.parametrize("value", ["Forward", "", None, True, ["forward"]])
def test_another_name_is_an_error(any_backend: None, value: Any) -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="gradient must be one of auto, backward, forward, got"):
        bk.pseudo_huber(x, x, gradient=value)
    with pytest.raises(ValueError, match="gradient must be one of auto, backward, forward, got"):
        bk.consistency_loss(x, x, 1.0, None, x, gradient=value)


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", KINDS)
def test_the_gradient_is_all_that_is_kept(options: dict[str, Any]) -> None:
    """It is allocated once, and becomes the leaf's own without a copy; the inputs may go."""
    batch, d = 16, 20_000
    x, F, target = (random(batch, d, dtype=F32, seed=k) for k in range(3))
    F.requires_grad_()
    with Allocations() as forward:
        loss = loss_of([x, F, target], gradient="forward", **options)
    (kept,) = [place for place, size in forward.found.items() if size == 4 * batch * d]
    assert [y.shape for y in loss.grad_fn.saved_tensors] == [F.shape]
    x.zero_()
    target.zero_()
    with Allocations() as backward:
        loss.backward()
    assert all(size <= 8 * batch for place, size in backward.found.items() if place != kept)
    assert F.grad.data_ptr() == kept


def test_a_loss_that_is_scaled_needs_no_more_memory() -> None:
    F, target = random(16, 20_000, dtype=F32).requires_grad_(), random(16, 20_000, dtype=F32, seed=1)
    loss = bk.pseudo_huber(F, target, gradient="forward")
    kept = loss.grad_fn.saved_tensors[0].data_ptr()
    with Allocations() as backward:
        (loss * 0.7).backward()
    assert all(size <= 8 for place, size in backward.found.items() if place != kept)
    assert F.grad.data_ptr() == kept


@pytest.mark.parametrize("upstream", [1.0, 0.7])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_retained_graph_gives_the_same_again(reduction: str, upstream: float) -> None:
    """Whatever became of the gradient that was given out first."""
    (F, target) = leaves(2, 4, 300, dtype=F32)
    loss = bk.pseudo_huber(F, target.detach(), reduction=reduction, gradient="forward")
    weight = torch.full_like(loss, upstream)
    (first,) = torch.autograd.grad(loss, F, weight, retain_graph=True)
    copy = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss, F, weight, retain_graph=True)
    assert torch.equal(second, copy)
    (doubled,) = torch.autograd.grad(loss, F, 2 * weight)
    assert torch.equal(doubled, 2 * copy)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, F, weight)


def test_gradients_of_one_leaf_add_up() -> None:
    """Two losses of one tensor, and two backward passes into one leaf."""
    F, target = random(4, 300, dtype=F32).requires_grad_(), random(4, 300, dtype=F32, seed=1)
    found = []
    for route in ROUTES:
        F.grad = None
        for _ in range(2):
            total = bk.pseudo_huber(F, target, gradient=route) + bk.pseudo_huber(F, 2 * target, gradient=route)
            total.backward()
        found.append(F.grad)
    assert torch.equal(*found)


def test_one_tensor_in_two_places() -> None:
    (x,) = leaves(1, 2, 3)
    found = [
        torch.autograd.grad(bk.consistency_loss(x, x, 2.0, 0.5, x, c=0.1, gradient=route), [x])[0] for route in ROUTES
    ]
    assert torch.equal(*found)


# --- other derivatives ------------------------------------------------------------------------------------------------


def test_second_derivatives_are_refused() -> None:
    pred, target = leaves(2, 2, 3)
    loss = bk.pseudo_huber(pred, target, c=0.3, gradient="forward")
    (gradient,) = torch.autograd.grad(loss, [pred], create_graph=True)
    assert torch.equal(gradient, torch.autograd.grad(bk.pseudo_huber(pred, target, c=0.3), [pred])[0])
    with pytest.raises(RuntimeError, match='needs gradient="backward"'):
        gradient.sum().backward()


@pytest.mark.parametrize("options", KINDS)
def test_transforms_and_batched_gradients(any_backend: None, options: dict[str, Any]) -> None:
    pred, target, tangent = (random(3, 4, seed=k) for k in range(3))

    def loss(x: Tensor, **more: Any) -> Tensor:
        return bk.pseudo_huber(x, target, **more, **options)

    def kept(x: Tensor) -> Tensor:
        return loss(x, gradient="forward")

    leaf = pred.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), [leaf])
    torch.testing.assert_close(torch.func.grad(kept)(pred), expected)
    torch.testing.assert_close(torch.func.jvp(kept, (pred,), (tangent,))[1], (expected * tangent).sum())
    torch.testing.assert_close(torch.func.hessian(kept)(pred), torch.func.hessian(loss)(pred))
    values = loss(leaf, reduction="none", gradient="forward")
    jacobian = torch.autograd.grad(values, [leaf], torch.eye(3, dtype=F64), is_grads_batched=True)[0]
    torch.testing.assert_close(jacobian.sum(0), torch.autograd.grad(loss(leaf, reduction="sum"), [leaf])[0])


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(options: dict[str, Any], reduction: str) -> None:
    pred, target, x = leaves(3, 3, 4)
    more = {**options, "reduction": reduction, "gradient": "forward"}
    assert torch.autograd.gradcheck(lambda a, b: bk.pseudo_huber(a, b, **more), (pred, target))
    assert torch.autograd.gradcheck(lambda *y: loss_of(list(y), **more), (x, pred, target))


def test_autocast_and_grad_scaler() -> None:
    x, target = random(8, 64, dtype=F32), random(8, 64, dtype=F32, seed=1)
    found = []
    for route in ROUTES:
        weight = torch.eye(64).requires_grad_()
        with torch.autocast("cpu", dtype=BF16):
            value = bk.consistency_loss(x, (x @ weight).float(), 2.0, None, target, gradient=route)
        torch.amp.GradScaler("cpu", init_scale=2.0**16).scale(value).backward()
        found.append(weight.grad)
    assert torch.equal(*found)


# --- traced graphs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", KINDS)
def test_opcheck(options: dict[str, Any]) -> None:
    ops, kind = torch.ops.bicm_kernels, code_of(options)
    pred, target, x = leaves(3, 3, 5, dtype=F32)
    t, one = torch.linspace(1, 2, 3), torch.ones(())
    number = None if kind == 2 else 0.3
    c = None if number is None else torch.tensor(number)
    for reduction in (0, 2):
        for needs in (0, 1, 3):
            states = [y.detach().requires_grad_(bool(needs >> k & 1)) for k, y in enumerate((pred, target))]
            torch.library.opcheck(ops.pseudo_huber_with_gradients.tensor, (needs, *states, t, c, kind, reduction))
        call = (pred, target, x, t, t / 2, None, c, 0.5 * one, 0.002 * one, 0, 1, kind, reduction)
        torch.library.opcheck(ops.consistency_loss_with_gradients.tensor, (7, *call))
        plain = [y.detach() if isinstance(y, Tensor) else y for y in call]
        torch.library.opcheck(
            ops.consistency_loss_with_gradients.default, (5, *plain[:6], number, 0.5, 0.002, *call[9:])
        )
        torch.library.opcheck(ops.pseudo_huber_with_gradients.default, (1, *plain[:2], t, number, kind, reduction))
    for upstream in (torch.tensor(2.0), t):
        torch.library.opcheck(ops.scale_gradients_.default, (upstream, [random(3, 5, dtype=F32), random(3, 5)]))


@pytest.mark.parametrize("options", KINDS)
def test_changing_floats_compile_three_times_at_most(options: dict[str, Any], same_bits: Bits) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    x, F, target = (random(3, 40, dtype=F32, seed=k) for k in range(3))
    options = {**options, "gradient": "forward"}
    for i in range(12):
        found = []
        for function in (compiled, step):
            leaf = F.clone().requires_grad_()
            value = function(x, leaf, target, 1.0 + 0.37 * i, 0.1 + 0.05 * i, options)
            value.backward()
            found.append((value.detach(), leaf.grad))
        same_bits(found[0][0], found[1][0])
        torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-6, atol=1e-9)
    assert counter.frame_count <= 3


def test_a_compiled_graph_keeps_the_gradient() -> None:
    """Forward one op of ours, backward none, and the gradients of eager code."""
    torch._dynamo.reset()
    graphs: list[list[str]] = []

    def collect(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes if "bicm" in str(node.target)])
        return graph

    from torch._dynamo.backends.common import aot_autograd

    engine = aot_autograd(fw_compiler=collect, bw_compiler=collect)
    x, F, target = leaves(3, 3, 40, dtype=F32)

    def loss(F: Tensor) -> Tensor:
        return 3.0 * bk.consistency_loss(x.detach(), F, 2.0, None, target.detach(), gradient="forward")

    (found,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=engine)(F), F)
    assert graphs == [["bicm_kernels.consistency_loss_with_gradients.tensor"], []]
    assert torch.equal(found, torch.autograd.grad(loss(F), F)[0])


def test_export() -> None:
    class Loss(torch.nn.Module):
        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            return bk.pseudo_huber(x, target, gradient="forward")

    inputs = (random(3, 40, dtype=F32), random(3, 40, dtype=F32, seed=1))
    program = torch.export.export(Loss(), inputs, strict=True)
    assert "pseudo_huber" in str(program.graph)
    assert torch.equal(program.module()(*inputs), Loss()(*inputs))


def test_compiled_autograd() -> None:
    F, target = leaves(2, 3, 40, dtype=F32)
    expected = torch.autograd.grad(3.0 * bk.pseudo_huber(F, target.detach()), F)[0]
    torch._dynamo.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        (3.0 * bk.pseudo_huber(F, target.detach(), gradient="forward")).backward()
    torch.testing.assert_close(F.grad, expected)
