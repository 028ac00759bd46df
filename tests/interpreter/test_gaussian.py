"""Gaussian policies from the Triton kernels: states to the bit, densities and derivatives near the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bits import assert_same, random
from torch import Tensor

from bicm_kernels import reference

pytest.importorskip("triton")

from bicm_kernels.triton_kernels import OPS
from bicm_kernels.triton_kernels.pseudo_huber import CHUNK

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
PAIRS = [(F32, F32), (F64, F64), (F16, F16), (BF16, BF16), (F32, BF16), (F16, F64)]
SHAPES = [(3, 7), (2, 3, 5, 8), (2, 1025)]
KEY = (5, 2, 3)
WEIGHTS = [0.93, -0.21, 0.4]
# What rounding of a gradient to its dtype allows, relative; the interpreter truncates to bfloat16.
ROUNDING = {F16: 2.0**-11, BF16: 2.0**-7, F32: 0.0, F64: 0.0}


def near(actual: Tensor, expected: Tensor, rounding: float = 0.0) -> None:
    error = (actual.double() - expected.double()).abs()
    allowed = rounding * expected.double().abs() + 2e-6 * (1e-7 + expected.double().abs().max())
    assert bool((error <= allowed).all()), float(error.max())


@pytest.mark.parametrize("adds_up", [False, True])
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_steps(dtypes: tuple[torch.dtype, torch.dtype], adds_up: bool) -> None:
    for shape in SHAPES:
        x, v, other = random(shape, dtypes[0]), random(shape, dtypes[1], 1), random(shape, dtypes[1], 2)
        std = torch.linspace(0.0, 1.0, shape[0])
        for tensors, guidance in (([x, v], 0.0), ([x, v, other], 2.5)):
            named: Any = {"guidance_scale": guidance} if guidance else {}
            operands = [x, (v, other)] if guidance else [x, v]
            keyed = dict(zip(("seed", "step", "sample_id"), KEY, strict=True))
            reduction = "sum" if adds_up else "mean"
            wanted, _ = reference.gaussian_step(operands, WEIGHTS[:2], std=std, reduction=reduction, **keyed, **named)
            after, log_prob = OPS["gaussian_step"](tensors, WEIGHTS[:2], guidance, std, adds_up, *KEY)
            assert_same(after, wanted)
            density = reference.gaussian_log_prob(after, operands, WEIGHTS[:2], std=std, reduction=reduction, **named)
            near(log_prob, density)
            assert log_prob.dtype == (F64 if F64 in dtypes else F32)
            if BF16 in dtypes:
                continue  # the interpreter truncates what a step rounds to, and what it stores, alike
            again = OPS["gaussian_log_prob"]([after, *tensors], WEIGHTS[:2], guidance, std, adds_up)
            assert torch.equal(again, log_prob)


@pytest.mark.parametrize("dtype", [F16, BF16, F32])
def test_chunks_and_the_ratio(dtype: torch.dtype) -> None:
    """A sample of several chunks, alone and in a batch: the ratio is exactly 1."""
    x, v = random((3, CHUNK + 9), dtype), random((3, CHUNK + 9), dtype, 1)
    after, old = OPS["gaussian_step"]([x, v], WEIGHTS[:2], 0.0, 0.3, False, *KEY)
    near(old, reference.gaussian_log_prob(after, [x, v], WEIGHTS[:2], std=0.3))
    new = OPS["gaussian_log_prob"]([after, x, v], WEIGHTS[:2], 0.0, 0.3, False)
    alone = OPS["gaussian_log_prob"]([y[1:2] for y in (after, x, v)], WEIGHTS[:2], 0.0, 0.3, False)
    assert torch.equal(new, old)
    assert torch.equal(alone, old[1:2])


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_densities_and_their_derivatives(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    for shape in SHAPES:
        after, x = random(shape, dtypes[0], 3), random(shape, dtypes[0])
        v, other = random(shape, dtypes[1], 1), random(shape, dtypes[1], 2)
        std, upstream = torch.linspace(0.2, 1.0, shape[0]), torch.linspace(-2.0, 1.0, shape[0])
        wide = [y.double().requires_grad_() for y in (after, x, v, other)]
        n, a, b, c = wide
        cases: list[tuple[str, list[Tensor], float, Tensor, list[Tensor]]] = [
            (
                "gaussian_log_prob",
                [after, x, v],
                0.0,
                reference.gaussian_log_prob(n, [a, b], WEIGHTS[:2], std=std),
                [n, a, b],
            ),
            (
                "gaussian_log_prob",
                [after, x, v, other],
                2.5,
                reference.gaussian_log_prob(n, [a, (b, c)], WEIGHTS[:2], std=std, guidance_scale=2.5),
                [n, a, b, c],
            ),
            (
                "gaussian_kl",
                [x, other, after, v],
                0.0,
                reference.gaussian_kl([n, b], [a, c], WEIGHTS[:2], std=std),
                [a, c, n, b],
            ),
        ]
        for name, tensors, guidance, expected, leaves in cases:
            call = (tensors, WEIGHTS[:2], guidance, std, False)
            near(OPS[name](*call), expected.detach())
            gradients = torch.autograd.grad(expected, leaves, upstream.double())
            for needs in (1, 2 ** len(tensors) - 1):
                found = OPS[f"{name}_backward"](upstream.to(F64 if F64 in dtypes else F32), needs, *call)
                assert len(found) == needs.bit_count()
                for ours, wanted, y in zip(found, gradients, tensors, strict=False):
                    assert ours.dtype == y.dtype
                    near(ours, wanted, ROUNDING[y.dtype])
                value, kept = OPS[f"{name}_with_gradients"](needs, *call)
                assert torch.equal(value, OPS[name](*call))
                assert len(kept) == needs.bit_count()


@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
def test_layouts(layout: str) -> None:
    x, v = random((2, 4, 5, 6)), random((2, 4, 5, 6), seed=1)
    lay = (
        (lambda y: y.to(memory_format=torch.channels_last))
        if layout == "channels_last"
        else (lambda y: torch.stack([y, -y], -1)[..., 0])
    )
    after, old = OPS["gaussian_step"]([lay(x), lay(v)], WEIGHTS[:2], 0.0, 0.3, False, *KEY)
    plain, density = OPS["gaussian_step"]([x, v], WEIGHTS[:2], 0.0, 0.3, False, *KEY)
    assert torch.equal(after, plain)
    assert torch.equal(old, density)
    assert torch.equal(OPS["gaussian_log_prob"]([after, lay(x), v], WEIGHTS[:2], 0.0, 0.3, False), density)


def test_small_deviations() -> None:
    """The gradient's factor leaves float32's range; the gradient does not."""
    after, x = 1e-25 * random((2, 50), seed=1), torch.zeros(2, 50)
    (ours,) = OPS["gaussian_log_prob_backward"](torch.ones(2), 2, [after, x], [1.0], 0.0, 1e-22, False)
    wide = torch.tensor(1e-22).double()
    near(ours, after.double() / (wide**2 * 50))


def test_nothing_to_sum() -> None:
    for shape in ((0, 5), (2, 0)):
        x = torch.empty(shape)
        after, log_prob = OPS["gaussian_step"]([x], [1.0], 0.0, 1.0, True, *KEY)
        assert after.shape == shape
        assert torch.equal(log_prob, torch.zeros(shape[0]))
        assert (
            OPS["gaussian_log_prob_backward"](torch.ones(shape[0]), 3, [x, x], [1.0], 0.0, 1.0, True)[0].shape == shape
        )
