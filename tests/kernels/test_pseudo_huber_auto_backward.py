"""Losses by default where gradients cannot be kept: hooks, checkpoints, traced graphs, transforms and threads."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import bicm_kernels as bk
from bicm_kernels.ops.reduction_functions import KeptBeside, Tracked
from tests.support.loss_calls import keeps, leaves
from tests.support.tensors import F32, Bits, random


@pytest.mark.parametrize("c", [0.2, torch.tensor(0.2)])  # the ways of numbers and of tensors
def test_hooks_for_saved_tensors(c: float | Tensor, same_bits: Bits) -> None:
    """What they pack is the inputs, and no gradient."""
    F, target = random(4, 300, dtype=F32).requires_grad_(), random(4, 300, dtype=F32, seed=1)
    expected = torch.autograd.grad(bk.pseudo_huber(F, target, c=c), F)[0]
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: (packed.append(y), y)[1], lambda y: y):
        loss = bk.pseudo_huber(F, target, c=c)
    assert not keeps(loss)
    large = [y for y in packed if y.numel() > 4]
    assert [y.data_ptr() for y in large] == [F.data_ptr(), target.data_ptr()]
    same_bits(torch.autograd.grad(loss, F)[0], expected)
    with torch.autograd.graph.save_on_cpu():
        loss = bk.pseudo_huber(F, target, c=c)
    assert not keeps(loss)
    same_bits(torch.autograd.grad(loss, F)[0], expected)
    assert keeps(bk.pseudo_huber(F, target, c=c))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool, same_bits: Bits) -> None:
    F, target = random(4, 300, dtype=F32).requires_grad_(), random(4, 300, dtype=F32, seed=1)

    def loss(y: Tensor, **options: Any) -> Tensor:
        return bk.pseudo_huber(2.0 * y, target, **options)

    expected = torch.autograd.grad(loss(F), F)[0]
    for way in ("auto", "backward"):
        F.grad = None
        checkpoint(partial(loss, gradient=way), F, use_reentrant=reentrant).backward()
        assert F.grad is not None
        same_bits(F.grad, expected)


def test_traced_graphs_take_two_ops() -> None:
    F, target = random(3, 40, dtype=F32).requires_grad_(), random(3, 40, dtype=F32, seed=1)

    def gradient(F: Tensor, target: Tensor) -> Tensor:
        return torch.autograd.grad(0.3 * bk.pseudo_huber(F, target), F)[0]

    graph = make_fx(gradient)(F, target)
    assert "pseudo_huber_backward" in graph.code and "with_gradients" not in graph.code
    other = random(3, 40, dtype=F32, seed=2)
    torch.testing.assert_close(graph(F, other), gradient(F, other))
    traced = torch.jit.trace(lambda F: bk.pseudo_huber(F, target), (F,), check_trace=False)
    assert "Tracked" in str(traced.graph)

    from torch._dynamo.backends.common import aot_autograd

    graphs: list[list[str]] = []

    def collect(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes if "bicm" in str(node.target)])
        return graph

    torch._dynamo.reset()
    engine = aot_autograd(fw_compiler=collect, bw_compiler=collect)
    compiled = torch.compile(lambda F: bk.pseudo_huber(F, target), fullgraph=True, backend=engine)
    torch.testing.assert_close(torch.autograd.grad(compiled(F), F), torch.autograd.grad(bk.pseudo_huber(F, target), F))
    assert graphs == [["bicm_kernels.pseudo_huber.tensor"], ["bicm_kernels.pseudo_huber_backward.tensor"]]


@pytest.mark.parametrize(("way", "whole"), [("auto", True), ("backward", False)])
def test_compiled_autograd(way: str, whole: bool) -> None:
    F, target = leaves(2, 3, 40, dtype=F32)
    expected = torch.autograd.grad(3.0 * bk.pseudo_huber(F, target.detach()), F)[0]
    torch._dynamo.reset()
    loss = 3.0 * bk.pseudo_huber(F, target.detach(), gradient=way)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=whole)):
        loss.backward()
    torch.testing.assert_close(F.grad, expected)


def test_transforms_and_batched_gradients() -> None:
    pred, target, tangent = (random(3, 4, seed=k) for k in range(3))

    def loss(x: Tensor, **options: Any) -> Tensor:
        return bk.pseudo_huber(x, target, c=0.3, **options)

    leaf = pred.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), [leaf])
    torch.testing.assert_close(torch.func.grad(loss)(pred), expected)
    torch.testing.assert_close(torch.func.jvp(loss, (pred,), (tangent,))[1], (expected * tangent).sum())
    values = loss(leaf, reduction="none")
    assert keeps(values)
    eye = torch.eye(3, dtype=torch.float64)
    batched = torch.autograd.grad(values, [leaf], eye, is_grads_batched=True, retain_graph=True)[0]
    one_by_one = [torch.autograd.grad(values, [leaf], row, retain_graph=True)[0] for row in eye]
    torch.testing.assert_close(batched, torch.stack(one_by_one))
    recorded = torch.autograd.grad(values, [leaf], eye, is_grads_batched=True, create_graph=True)[0]
    torch.testing.assert_close(recorded.detach(), batched)
    plain = torch.autograd.functional.hessian(lambda x: loss(x, gradient="backward"), pred)
    torch.testing.assert_close(torch.autograd.functional.hessian(loss, pred), plain)


def test_anomaly_mode() -> None:
    F, target = leaves(2, 3, 40, dtype=F32)
    expected = torch.autograd.grad(bk.pseudo_huber(F, target), [F, target])
    with torch.autograd.detect_anomaly():
        found = torch.autograd.grad(bk.pseudo_huber(F, target), [F, target])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        with torch.no_grad():
            F[0, 0] = float("nan")
        with pytest.raises(RuntimeError, match="returned nan values"):
            torch.autograd.grad(bk.pseudo_huber(F, target), [F, target])


def test_threads_that_share_a_graph() -> None:
    """Backward passes of one retained graph at once, each with its upstream."""
    F, target = leaves(2, 4, 5000, dtype=F32)
    loss = bk.pseudo_huber(F, target.detach())
    expected = torch.autograd.grad(loss, F, retain_graph=True)[0]
    wrong: list[float] = []

    def work(upstream: float) -> None:
        for _ in range(20):
            (found,) = torch.autograd.grad(loss, F, torch.tensor(upstream), retain_graph=True)
            if not torch.equal(found, torch.tensor(upstream) * expected):
                wrong.append(upstream)

    threads = [threading.Thread(target=work, args=(upstream,)) for upstream in (1.0, 0.3, -7.0, 1.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_names_of_the_functions() -> None:
    """The tests above tell the ways apart by them."""
    assert (Tracked.__name__, KeptBeside.__name__) == ("Tracked", "KeptBeside")


def test_numbers_that_are_tensors(same_bits: Bits) -> None:
    numbers = {"c": torch.tensor(0.2), "weight": torch.tensor([0.5, 1.0, 2.0])}
    F, target = leaves(2, 3, 40, dtype=F32)
    loss = bk.pseudo_huber(F, target, **numbers)
    assert keeps(loss)
    numbers["c"].fill_(9.0)  # read already
    same_bits(
        torch.autograd.grad(loss, F)[0],
        torch.autograd.grad(bk.pseudo_huber(F, target, c=0.2, weight=numbers["weight"], gradient="backward"), F)[0],
    )
