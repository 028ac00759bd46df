"""Sampler updates: the NumPy model's bits from every target, one property at a time."""

from __future__ import annotations

import numpy as np
import pytest

from .checks import check_step
from .problems import NOISE, PAIRS, affine, denoised, values
from .tensors import DTYPES, Tensor

SIZES = [1, 3, 5, 63, 64, 65, 1023, 1025, 4099]


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("size", SIZES)
def test_affine(target: str, size: int, terms: int) -> None:
    for state, network in PAIRS:
        problem = affine((2, size), state, network, terms)
        check_step(lambda p: p.run(target), problem)
        problem.noise_weight, problem.key = 0.3, NOISE
        check_step(lambda p: p.run(target), problem)


@pytest.mark.parametrize("form", ["bdia", "bdia_inverse"])
@pytest.mark.parametrize(("state", "network"), PAIRS)
def test_bdia(target: str, state: str, network: str, form: str) -> None:
    for size in SIZES:
        check_step(lambda p: p.run(target), affine((2, size), state, network, 3, form))


@pytest.mark.parametrize(("state", "network"), PAIRS)
def test_guided(target: str, state: str, network: str) -> None:
    for size in SIZES:
        problem = affine((2, size), state, network, 3, "bdia")
        problem.conditional = Tensor.of(values(9, (2, size)), network)
        problem.guidance_scale = 7.5
        check_step(lambda p: p.run(target), problem)


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("state", "network"), PAIRS)
def test_denoised(target: str, state: str, network: str, terms: int) -> None:
    for size in (1, 5, 64, 1025):
        problem = denoised((2, size), state, network, terms)
        check_step(lambda p: p.run(target), problem)
        problem.conditional = Tensor.of(values(9, (2, size)), network)
        problem.guidance_scale = 1.5
        problem.clip, problem.noise_weight, problem.next = None, None, None
        check_step(lambda p: p.run(target), problem)


def per_sample(offset: float, dtype: str = "float32", layout: str = "contiguous") -> Tensor:
    return Tensor.of(offset + np.linspace(0.1, 0.9, 4), dtype, layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "every second", "one sample"])
@pytest.mark.parametrize("compute", ["float32", "float64"])
def test_numbers_from_memory(target: str, compute: str, layout: str, dtype: str) -> None:
    """Every number may be one value, 0-d or per sample, in any dtype: it is rounded to the compute type."""
    shape = (4, 37)

    def numbers(count: int) -> list[Tensor]:
        return [per_sample(0.1 * k, dtype, layout) for k in range(count)]

    problem = denoised(shape, compute, compute)
    problem.coefficients, problem.x0_coefficients = numbers(2), numbers(2)
    problem.x0_weight, problem.clip, problem.next_scale, problem.noise_weight = numbers(4)
    problem.conditional, problem.guidance_scale = Tensor.of(values(9, shape), compute), numbers(1)[0]
    check_step(lambda p: p.run(target), problem)
    for form in ("bdia", "bdia_inverse"):
        problem = affine(shape, compute, compute, 3, form)
        problem.coefficients = numbers(5)
        check_step(lambda p: p.run(target), problem)
        problem.coefficients = [1.25, Tensor.of(np.array(0.3), dtype), *numbers(3)]
        check_step(lambda p: p.run(target), problem)


def test_noise_of_weight_zero_is_not_added(target: str) -> None:
    """Not even as zero: -0 stays -0, and the other samples of the batch draw theirs."""
    shape = (4, 100)
    problem = affine(shape, terms=1)
    problem.inputs = [Tensor.of(np.full(shape, -0.0), "float32")]
    problem.noise_weight = Tensor.of(np.array([0.0, 0.5, -0.0, 2.0]), "float32")
    problem.key = NOISE
    check_step(lambda p: p.run(target), problem)
    assert np.all(np.signbit(problem.out.values[[0, 2]]))
    assert np.all(problem.out.values[[1, 3]] != 0)


def test_seeds_and_steps_per_sample(target: str) -> None:
    problem = affine((3, 70))
    problem.noise_weight = 1.5
    problem.key = {
        "seed": np.array([3, 2**50, -7], np.int64),
        "step": np.array([4, 5, 6], np.int64),
        "counts": False,
    }
    check_step(lambda p: p.run(target), problem)


SPECIAL = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, 65504.0, 70000.0, 3e38, 1e-7, 2.0, -2.0])


@pytest.mark.parametrize(("state", "network"), PAIRS)
def test_special_values(target: str, state: str, network: str) -> None:
    pairs = np.array(np.meshgrid(SPECIAL, SPECIAL)).reshape(2, 1, -1)
    problem = denoised(pairs.shape[1:], state, network)
    with np.errstate(all="ignore"):
        problem.inputs = [Tensor.of(x, dtype) for x, dtype in zip(pairs, (state, network), strict=True)]
    check_step(lambda p: p.run(target), problem)


def test_a_sample_does_not_know_its_batch(target: str) -> None:
    shape = (9, 333)
    whole = denoised(shape)
    whole.run(target)
    for b in (0, 4, 8):
        one = denoised((1, shape[1]))
        one.inputs = [Tensor.of(x.values[b : b + 1], x.dtype) for x in whole.inputs]
        one.key = {**NOISE, "sample": NOISE["sample"] + b}
        one.run(target)
        for single, batch in zip(one.outputs, whole.outputs, strict=True):
            assert np.array_equal(single.bits[0], batch.bits[b])
