"""Calls of the exact steps: schemas, tracing, outputs that the caller gives, errors, derivatives that do not exist."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import bicm_kernels as bk
from bicm_kernels import reference
from tests.support.exact_calls import EPS, INFO, NEXT, Q, states
from tests.support.tensors import random

Bits = Callable[[Tensor, Tensor], None]
BDIA: dict[str, Any] = {"a": 0.9, "b": 0.3, "a_last": 1.1, "b_last": -0.2}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def bdia(q_last: Any = Q, q: Any = NEXT, eps: Any = EPS, info: Any = INFO, **changes: Any) -> Any:
    return bk.bdia_exact_step(q_last, q, eps, info, **{**BDIA, **changes})


def affine(q_last: Any = Q, tensors: Any = (EPS,), weights: Any = (1.0,), info: Any = INFO, **changes: Any) -> Any:
    return bk.exact_affine_step(q_last, tensors, weights, info, **changes)


# --- schemas ----------------------------------------------------------------------------------------------------------


# --- tracing ----------------------------------------------------------------------------------------------------------

RATIOS = [(1, 1), (9, 10), (24, 25), (1, 2), (93, 100), (3, 2)]


def noted(v: float, n: Any, m: Any, k: int, op: Callable[..., Any] = bk.bdia_exact_step) -> tuple[Tensor, ...]:
    overflow = torch.zeros(3, dtype=torch.int64)
    numbers = {"a": 1 + v, "b": v, "a_last": 1.1, "b_last": -v}
    q, info = op(
        Q, NEXT, (EPS, -EPS * 1e12), INFO, **numbers, gamma=(n, m), guidance_scale=v, overflow=overflow, mark=k
    )
    return q, info, overflow


BODIES: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "bdia": noted,
    "bdia inverse": lambda *args: noted(*args, op=bk.bdia_exact_inverse_step),
    "affine": lambda v, n, m, k: bk.exact_affine_step(Q, [EPS, NEXT], [v, 1 - v], INFO, ratio=(n, m)),
    "affine out": lambda v, n, m, k: bk.exact_affine_inverse_step(
        Q, [EPS], [v], INFO, ratio=(n, m), out=(torch.empty_like(Q), torch.empty_like(INFO))
    ),
    "code": lambda v, n, m, k: (bk.fixed_point_decode(bk.fixed_point_encode(EPS * v)),),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("tensors", [False, True])
def test_twelve_values_compile_at_most_three_times(name: str, tensors: bool, same_bits: Bits) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(BODIES[name], fullgraph=True, backend=counter)
    for k in range(12):
        ratio = [torch.tensor(x) for x in RATIOS[k % 6]] if tensors else RATIOS[k % 6]
        for actual, expected in zip(fast(0.07 * k, *ratio, k + 1), BODIES[name](0.07 * k, *ratio, k + 1), strict=True):
            same_bits(actual, expected)
    assert counter.frame_count <= 3


@pytest.mark.parametrize("name", BODIES)
def test_export(name: str, same_bits: Bits) -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Any:
            return BODIES[name](0.3, 9, 10, 4)

    program = torch.export.export(Module(), (EPS,))
    assert any(str(node.target).startswith("bicm_kernels") for node in program.graph.nodes)
    for actual, expected in zip(program.module()(EPS), BODIES[name](0.3, 9, 10, 4), strict=True):
        same_bits(actual, expected)


# --- outputs that the caller gives ------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [(1, 1), (9, 10), (torch.tensor([1, 2, 3]), torch.tensor(3))])
def test_outputs(gamma: Any, each_backend: str, same_bits: Bits) -> None:
    expected = bdia(gamma=gamma)
    fresh = torch.empty_like(Q), torch.empty_like(INFO)
    q_last, q, info = Q.clone(), NEXT.clone(), INFO.clone()
    for first, buffer, out in (
        (Q, INFO, fresh),
        (q_last, INFO, (q_last, fresh[1])),
        (Q, info, (q, info)),
    ):
        results = bdia(first, q, info=buffer, gamma=gamma, out=out)
        for actual, given, x in zip(results, out, expected, strict=True):
            assert actual is given
            same_bits(actual, x)


def test_a_ratio_of_one_hands_the_buffer_back(each_backend: str) -> None:
    assert bdia(gamma=(1, 1))[1] is INFO
    assert bdia(gamma=(2, 2), overflow=torch.zeros(3, dtype=torch.int64))[1] is INFO
    assert bdia(gamma=(1, 2))[1] is not INFO


# --- errors -----------------------------------------------------------------------------------------------------------

Wrong = tuple[Callable[[], Any], type[Exception], tuple[str, ...]]
GRID = torch.zeros(8, 4, dtype=torch.int64)
WRONG: dict[str, Wrong] = {
    "float state": (
        lambda: bdia(q_last=EPS),
        TypeError,
        ("q_last must be an int64 or int32 fixed-point state", "float32"),
    ),
    "float q": (lambda: bdia(q=EPS), TypeError, ("q must be an int64", "float32")),
    "no state": (lambda: bdia(q_last=1), TypeError, ("q_last must be a tensor", "1 (int)")),
    "integer eps": (lambda: bdia(eps=Q), TypeError, ("eps must be float16", "int64")),
    "mixed states": (
        lambda: affine(tensors=[Q.int()]),
        TypeError,
        ("tensors[0] must have the dtype of q_last", "int32"),
    ),
    "shape": (lambda: bdia(eps=EPS[:2]), ValueError, ("eps must have the shape of q_last, (3, 4)", "(2, 4)")),
    "float info": (lambda: bdia(info=EPS), TypeError, ("info must be an int64 tensor", "float32")),
    "info's shape": (lambda: bdia(info=INFO[:2]), ValueError, ("info must have the shape of q_last", "(2, 4)")),
    "gamma is a float": (lambda: bdia(gamma=0.5), TypeError, ("gamma must be a pair (n, m)", "0.5 (float)")),
    "gamma of floats": (lambda: bdia(gamma=(0.5, 1)), TypeError, ("n of gamma must be an int", "0.5")),
    "gamma of zero": (lambda: bdia(gamma=(0, 1)), ValueError, ("n of gamma must be in [1, 1048577)", "0")),
    "large ratio": (lambda: affine(ratio=(1, 2**20 + 1)), ValueError, ("m of ratio must be in", "1048577")),
    "ratio's dtype": (lambda: affine(ratio=(EPS[:, 0], 2)), TypeError, ("n of ratio", "int64", "float32")),
    "ratio's shape": (lambda: affine(ratio=(1, Q[0])), ValueError, ("m of ratio", "(3,)", "(4,)")),
    "narrow with a ratio": (
        lambda: bk.exact_affine_step(Q.int(), [EPS], [1.0], INFO, ratio=(1, 2), fraction_bits=20),
        ValueError,
        ("ratio must be (1, 1) for int32 states", "(1, 2)"),
    ),
    "narrow with bits": (
        lambda: bk.exact_affine_step(Q.int(), [EPS], [1.0], INFO),
        ValueError,
        ("fraction_bits must be in [0, 30] for torch.int32 states", "32"),
    ),
    "bits": (lambda: affine(fraction_bits=63), ValueError, ("fraction_bits must be in [0, 62]", "63")),
    "float bits": (lambda: affine(fraction_bits=2.0), TypeError, ("fraction_bits must be an int", "2.0")),
    "weights": (lambda: affine(weights=[1.0, 2.0]), ValueError, ("weights must be as many as the tensors, 1", "2")),
    "no tensors": (lambda: affine(tensors=[], weights=[]), ValueError, ("tensors must hold 1 to 5", "0")),
    "coefficient": (lambda: bdia(a="1"), TypeError, ("a must be a float", "'1'")),
    "pair": (lambda: bdia(eps=(EPS, EPS)), ValueError, ("guidance_scale goes with a pair",)),
    "no pair": (lambda: bdia(guidance_scale=2.0), ValueError, ("guidance_scale goes with a pair", "2.0")),
    "overflow's dtype": (lambda: bdia(overflow=torch.zeros(3)), TypeError, ("overflow must be int64", "float32")),
    "overflow's shape": (lambda: bdia(overflow=Q[0]), ValueError, ("overflow must be a (3,) tensor", "(4,)")),
    "one overflow": (
        lambda: bdia(overflow=Q[0, 0].expand(3)),
        ValueError,
        ("overflow must not overlap itself", "(0,)"),
    ),
    "mark": (lambda: bdia(overflow=Q[:, 0].clone(), mark=0), ValueError, ("mark must be in [1, 2**63)", "0")),
    "out is one": (
        lambda: bdia(out=Q.clone()),
        TypeError,
        ("out: expected a sequence of tensors, got one tensor", "(q, info)"),
    ),
    "out's dtype": (
        lambda: bdia(out=(Q.int(), INFO.clone())),
        TypeError,
        ("out[0] must have the dtype of q_last", "int32"),
    ),
    "out in part": (
        lambda: bdia(q_last=GRID[:3], out=(GRID[1:4], INFO.clone()), gamma=(1, 2)),
        ValueError,
        ("out[0] must be exactly q_last or disjoint",),
    ),
    "out twice": (
        lambda: bdia(out=(GRID[:3], GRID[:3]), gamma=(1, 2)),
        ValueError,
        ("out[0] and out[1] must not share",),
    ),
    "encode integers": (lambda: bk.fixed_point_encode(Q), TypeError, ("x must be float16", "int64")),
    "encode to floats": (
        lambda: bk.fixed_point_encode(EPS, dtype=torch.float32),
        ValueError,
        ("dtype must be torch.int64",),
    ),
    "encode bits": (
        lambda: bk.fixed_point_encode(EPS, dtype=torch.int32),
        ValueError,
        ("fraction_bits must be in [0, 30]", "32"),
    ),
    "decode floats": (lambda: bk.fixed_point_decode(EPS), TypeError, ("q must be an int64 or int32", "float32")),
    "decode to integers": (
        lambda: bk.fixed_point_decode(Q, dtype=torch.int64),
        ValueError,
        ("dtype must be torch.float16",),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name: str, each_backend: str) -> None:
    call, kind, words = WRONG[name]
    with pytest.raises(kind) as raised:
        call()
    assert all(word in str(raised.value) for word in words), raised.value


# --- derivatives ------------------------------------------------------------------------------------------------------


def test_a_derivative_is_refused(each_backend: str) -> None:
    x = EPS.clone().requires_grad_()
    a = torch.tensor(1.0, requires_grad=True)
    calls: list[Callable[[Tensor], Any]] = [
        lambda y: bdia(eps=y),
        lambda y: affine(tensors=[y]),
        lambda y: bk.fixed_point_encode(y).double(),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="no derivative"):
            call(x)
        with pytest.raises(ValueError, match="no derivative"):
            torch.func.jvp(call, (EPS,), (EPS,))
        with pytest.raises(ValueError, match="no derivative"):
            torch.func.grad(lambda y, call=call: call(y)[0].sum())(EPS)
        with torch.no_grad():
            call(x)
    with pytest.raises(ValueError, match="no derivative"):
        bdia(a=a)


def test_vmap_takes_the_reference(same_bits: Bits) -> None:
    q, eps, info = states(2, 3, 4), random(2, 3, 4), states(2, 3, 4, seed=1)
    mapped = torch.vmap(lambda *x: bk.exact_affine_step(x[0], [x[1]], [0.5], x[2], ratio=(9, 10)))(q, eps, info)
    for k in range(2):
        for every, one in zip(
            mapped, reference.exact_affine_step(q[k], [eps[k]], [0.5], info[k], ratio=(9, 10)), strict=True
        ):
            same_bits(every[k], one)
    with pytest.raises(ValueError, match=r"overflow must not be given under a torch\.func transform"):
        torch.vmap(lambda x: bdia(eps=x, overflow=torch.zeros(3, dtype=torch.int64)))(random(2, 3, 4))
