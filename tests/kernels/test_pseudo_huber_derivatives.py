"""Derivatives of the losses: every argument, twice, forward and mapped; what is saved and allocated; traced graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import bicm_kernels as bk
from bicm_kernels import reference
from tests.support.loss_calls import KINDS, Allocations, code_of, leaves, step
from tests.support.tensors import BF16, F16, F32, F64, Bits, random

# --- every argument ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(each_backend: str, options: dict[str, Any], reduction: str) -> None:
    pred, target, x = leaves(3, 3, 4)
    t, weight = torch.tensor([0.3, 2.0, 5.0], dtype=F64), torch.tensor([0.5, 1.0, 2.0], dtype=F64)
    more = {**options, "reduction": reduction, "weight": weight}
    assert gradcheck(lambda a, b: bk.pseudo_huber(a, b, **more), (pred, target))
    assert gradcheck(lambda a: bk.pseudo_huber(a, target.detach(), **more), (pred,))
    assert gradcheck(lambda b: bk.pseudo_huber(pred.detach(), b, **more), (target,))
    for parameterization, u in (("bcm", t / 2), ("bcm", None), ("cm", None), ("edm", None)):
        form = {**more, "parameterization": parameterization, "scaled": u is not None}
        assert gradcheck(lambda a, b, c, u=u, form=form: bk.consistency_loss(a, b, t, u, c, **form), (x, pred, target))
        assert gradcheck(
            lambda b, u=u, form=form: bk.consistency_loss(x.detach(), b, t, u, target.detach(), **form), (pred,)
        )


@pytest.mark.parametrize("options", KINDS[:2])
def test_gradcheck_of_numbers(each_backend: str, options: dict[str, Any]) -> None:
    pred, target, x = leaves(3, 3, 4)
    t, u, weight, c = (
        torch.tensor(v, dtype=F64, requires_grad=True) for v in ([0.3, 2.0, 5.0], [0.2, 1.0, 1.5], [0.5, 1.0, 2.0], 0.4)
    )
    kind = options.get("kind", "vector")

    def loss(*args: Tensor) -> Tensor:
        x, pred, t, u, target, c, weight = args
        return bk.consistency_loss(x, pred, t, u, target, c=c, weight=weight, kind=kind)

    assert gradcheck(loss, (x, pred, t, u, target, c, weight))
    assert gradcheck(lambda a, b, c, w: bk.pseudo_huber(a, b, c=c, weight=w, kind=kind), (pred, target, c, weight))


@pytest.mark.parametrize("options", KINDS)
def test_twice(each_backend: str, options: dict[str, Any]) -> None:
    pred, target, x = leaves(3, 2, 3)
    assert gradgradcheck(lambda a, b: bk.pseudo_huber(a, b, **options), (pred, target))
    assert gradgradcheck(lambda a, b, c: bk.consistency_loss(a, b, 2.0, 0.5, c, **options), (x, pred, target))


@pytest.mark.parametrize("gradient", ["auto", "forward", "backward"])
@pytest.mark.parametrize("tracked", range(1, 8))
def test_a_graph_gives_the_gradients_that_are_asked_for(each_backend: str, gradient: str, tracked: int) -> None:
    """Of some of the tensors that are tracked, once and twice."""
    inputs = [y.detach().requires_grad_(bool(tracked >> k & 1)) for k, y in enumerate(leaves(3, 3, 4))]
    wanted = [y for y in inputs if y.requires_grad]

    def loss() -> Tensor:
        return bk.consistency_loss(*inputs[:2], 1.3, 0.4, inputs[2], c=0.5, gradient=gradient)

    plain = reference.consistency_loss(*inputs[:2], 1.3, 0.4, inputs[2], c=0.5)
    expected = torch.autograd.grad(plain, wanted, create_graph=True)
    for y, gradient_of_y in zip(wanted, expected, strict=True):
        torch.testing.assert_close(torch.autograd.grad(loss(), [y])[0], gradient_of_y)
        if gradient == "forward":
            continue
        (ours,) = torch.autograd.grad(loss(), [y], create_graph=True)
        torch.testing.assert_close(ours, gradient_of_y)
        second = torch.autograd.grad(ours.pow(3).sum(), wanted)
        torch.testing.assert_close(
            second, torch.autograd.grad(gradient_of_y.pow(3).sum(), wanted, retain_graph=True), rtol=1e-7, atol=1e-12
        )


def test_one_tensor_in_two_places(each_backend: str) -> None:
    (x,) = leaves(1, 2, 3)
    (gradient,) = torch.autograd.grad(bk.pseudo_huber(x, x), [x], create_graph=True)
    assert not gradient.any()
    value = bk.consistency_loss(x, x, 2.0, 0.5, x, c=0.1)
    plain = reference.consistency_loss(x, x, 2.0, 0.5, x, c=0.1)
    for graph in (False, True):
        torch.testing.assert_close(
            *(torch.autograd.grad(loss, [x], create_graph=graph, retain_graph=True)[0] for loss in (value, plain))
        )


@pytest.mark.parametrize("options", KINDS)
def test_forward_and_mapped(each_backend: str, options: dict[str, Any]) -> None:
    pred, target = (random(3, 4, seed=k) for k in range(2))
    tangent = random(3, 4, seed=5)

    def loss(x: Tensor) -> Tensor:
        return bk.pseudo_huber(x, target, **options)

    gradient = torch.func.grad(loss)(pred)
    leaf = pred.clone().requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(loss(leaf), [leaf])[0])
    torch.testing.assert_close(torch.func.jvp(loss, (pred,), (tangent,))[1], (gradient * tangent).sum())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(pred, tangent)
        found = torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent
    torch.testing.assert_close(found, (gradient * tangent).sum())
    each = torch.func.vmap(lambda a, b: bk.pseudo_huber(a[None], b[None], **options))(pred, target)
    torch.testing.assert_close(each, bk.pseudo_huber(pred, target, reduction="none", **options))
    values = bk.pseudo_huber(leaf, target, reduction="none", **options)
    jacobian = torch.autograd.grad(values, [leaf], torch.eye(3, dtype=F64), retain_graph=True, is_grads_batched=True)[0]
    torch.testing.assert_close(jacobian.sum(0), torch.autograd.grad(values.sum(), [leaf])[0])


def test_only_what_is_needed() -> None:
    x, F, target = leaves(3, 2, 8, dtype=F32)
    plain = torch.autograd.grad(bk.consistency_loss(x, F, 2.0, 1.0, target), [x, F, target])
    for mask in range(1, 8):
        inputs = [y.detach().requires_grad_(bool(mask >> k & 1)) for k, y in enumerate((x, F, target))]
        loss = bk.consistency_loss(inputs[0], inputs[1], 2.0, 1.0, inputs[2])
        loss.backward()
        for y, expected in zip(inputs, plain, strict=True):
            assert (y.grad is not None) == y.requires_grad
            assert y.grad is None or torch.equal(y.grad, expected)
    with torch.no_grad():
        assert not bk.consistency_loss(x, F, 2.0, 1.0, target).requires_grad
    assert bk.pseudo_huber(F, target.detach(), c=torch.tensor(0.1)).requires_grad


def test_an_input_that_was_overwritten_is_an_error() -> None:
    pred, target = leaves(1, 2, 8, dtype=F32)[0], random(2, 8, dtype=F32)
    loss = bk.pseudo_huber(pred, target)
    target.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- precision --------------------------------------------------------------------------------------------------------


def test_gradients_of_scaled_half_losses() -> None:
    """Under GradScaler the loss is scaled first: digits that float16 would lose are kept."""
    pred, target = random(32, 3072, dtype=F16), random(32, 3072, dtype=F16, seed=1)
    weight, scale = torch.linspace(1e-4, 1e-2, 32), 65536.0
    exact = pred.double().requires_grad_()
    (truth,) = torch.autograd.grad(scale * reference.pseudo_huber(exact, target.double(), weight=weight), [exact])

    def error(loss: Callable[..., Tensor]) -> float:
        leaf = pred.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(scale * loss(leaf, target), [leaf])
        assert gradient.dtype == F16
        return ((gradient.double() - truth).norm() / truth.norm()).item()

    def eager(a: Tensor, b: Tensor) -> Tensor:
        s = (a.float() - b.float()).square().sum(1)
        c = 0.00054 * 3072**0.5
        return (weight * ((s + c * c).sqrt() - c)).mean()

    ours = error(lambda a, b: bk.pseudo_huber(a, b, weight=weight))
    assert ours <= 1.01 * error(eager)
    assert ours < 5e-4


def test_a_training_step_under_grad_scaler() -> None:
    torch.manual_seed(0)
    x, target = random(8, 64, dtype=F32), random(8, 64, dtype=F32, seed=1)
    found = {}
    for name, loss in (("ours", bk.consistency_loss), ("plain", reference.consistency_loss)):
        network = torch.nn.Linear(64, 64)
        torch.nn.init.eye_(network.weight)
        torch.nn.init.zeros_(network.bias)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        with torch.autocast("cpu", dtype=BF16):
            F = network(x)
            assert F.dtype == BF16
            value = loss(x, F, torch.full((8,), 2.0), None, target)
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        found[name] = network.weight.detach()
    torch.testing.assert_close(found["ours"], found["plain"], rtol=1e-5, atol=1e-7)
    assert not torch.equal(found["ours"], torch.eye(64))


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", KINDS)
def test_training_allocates_one_gradient(options: dict[str, Any]) -> None:
    batch, d = 16, 20_000
    x, F, target = (random(batch, d, dtype=F32, seed=k) for k in range(3))
    t, F = torch.linspace(1, 2, batch), F.requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: (saved.append(y), y)[1], lambda y: y):
        with Allocations() as forward:
            loss = bk.consistency_loss(x, F, t, t / 2, target, weight=t, **options)
        with Allocations() as backward:
            loss.backward()
    given = {y.data_ptr() for y in (x, F, target)}
    for mode in (forward, backward):
        mode.found = {place: size for place, size in mode.found.items() if place not in given}
    assert sum(y.numel() for y in saved if y.data_ptr() not in given) <= 4 * batch
    assert all(size <= 8 * batch for size in forward.found.values())
    assert [size for size in backward.found.values() if size > 8 * batch] == [4 * batch * d]


@pytest.mark.parametrize("options", KINDS)
def test_memory_as_the_profiler_sees_it(options: dict[str, Any]) -> None:
    batch, d = 16, 1000  # what is larger lies in memory of our own, of which the profiler knows nothing
    x, F, target = (random(batch, d, dtype=F32, seed=k) for k in range(3))
    F.requires_grad_()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        bk.consistency_loss(x, F, 2.0, 1.0, target, **options).backward()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profiler.events())
    assert 4 * batch * d <= allocated <= 4 * batch * d + 100 * batch + 4096


# --- traced graphs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", KINDS)
def test_opcheck(options: dict[str, Any]) -> None:
    ops, kind = torch.ops.bicm_kernels, code_of(options)
    pred, target, x = leaves(3, 3, 5, dtype=F32)
    t, one = torch.linspace(1, 2, 3), torch.ones(())
    number = None if kind == 2 else 0.3
    c = None if number is None else torch.tensor(number)
    for reduction in (0, 2):
        call = (pred, target, t, c, kind, reduction)
        torch.library.opcheck(ops.pseudo_huber.tensor, call)
        plain = [y.detach() if isinstance(y, Tensor) else y for y in call]
        value, sums = ops.pseudo_huber.tensor(*plain)
        torch.library.opcheck(ops.pseudo_huber_backward.tensor, (torch.ones_like(value), sums, 3, *plain))
        torch.library.opcheck(ops.pseudo_huber.default, (*plain[:3], number, kind, reduction))
        call = (pred, target, x, t, t / 2, None, c, 0.5 * one, 0.002 * one, 0, 1, kind, reduction)
        torch.library.opcheck(ops.consistency_loss.tensor, call)
        plain = [y.detach() if isinstance(y, Tensor) else y for y in call]
        torch.library.opcheck(ops.consistency_loss_backward.tensor, (torch.ones_like(value), sums, 5, *plain))
        torch.library.opcheck(ops.consistency_loss.default, (*plain[:6], number, 0.5, 0.002, 0, 1, kind, reduction))


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("engine", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_changing_floats_compile_three_times_at_most(options: dict[str, Any], engine: str, same_bits: Bits) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(engine)
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    x, F, target = (random(3, 40, dtype=F32, seed=k) for k in range(3))
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


def test_export() -> None:
    class Loss(torch.nn.Module):
        def forward(self, x: Tensor, F: Tensor, t: Tensor, target: Tensor) -> Tensor:
            return bk.consistency_loss(x, F, t, t / 2, target, weight=t, reduction="none")

    x, F, target = (random(3, 40, dtype=F32, seed=k) for k in range(3))
    t = torch.linspace(1, 2, 3)
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = ({0: batch},) * 4
    program = torch.export.export(Loss(), (x, F, t, target), dynamic_shapes=shapes, strict=True)
    assert "consistency_loss" in str(program.graph)
    inputs = (*(random(5, 40, dtype=F32, seed=k) for k in range(2)), torch.linspace(1, 3, 5), random(5, 40, dtype=F32))
    torch.testing.assert_close(program.module()(*inputs), Loss()(*inputs), rtol=0, atol=0)


def test_compiled_numbers_with_derivatives() -> None:
    torch._dynamo.reset()
    x, F, target, t = (*leaves(3, 2, 6), torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True))

    def loss(t: Tensor) -> Tensor:
        return bk.consistency_loss(x, F, t, None, target)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(t), [t, F]), torch.autograd.grad(loss(t), [t, F]))
