"""Gaussian policies: CPU kernels of every instruction set and emulated CUDA kernels, for any memory, grid and size."""

from __future__ import annotations

import bicm_emulator
import numpy as np
import pytest

from .gaussian import CHUNK, SIZES, Policy, density, divergence, step
from .model import Problem
from .problems import NOISE, PAIRS, values
from .tensors import INPUT_LAYOUTS, Tensor, same_bits

MAKERS = {"step": step, "density": density, "divergence": divergence}


def check(problem: Policy, target: str) -> np.ndarray:
    """The numbers of samples as in float64; a step's state has the bits of the sampler update."""
    results, _ = problem.run(target)
    if problem.steps:
        out = Tensor.empty(problem.next.bits.shape, problem.next.dtype)
        update = Problem(problem.inputs, problem.weights or [0.9, -0.3][: len(problem.inputs)], out)
        update.noise_weight, update.key = problem.std, NOISE
        update.conditional, update.guidance_scale = problem.conditional, problem.guidance_scale
        update.run("scalar")
        assert problem.next.guards_intact()
        assert same_bits(problem.next.bits, out.bits, out.dtype)
    scale = 1 if problem.compute == np.float32 else 1e-9
    expected = problem.expected()
    size = np.abs(expected) + (problem.next.bits[0].size if problem.adds_up and problem.next is not None else 1)
    assert np.all(np.abs(results - expected) <= 1e-6 * scale * size)
    return results


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("size", SIZES)
def test_sizes(size: int, make: str, target: str) -> None:
    for dtypes in PAIRS if size < CHUNK else PAIRS[1:5:2]:
        for adds_up in (False, True):
            check(MAKERS[make]((2, size), *dtypes, adds_up=adds_up), target)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("state", "network"), PAIRS)
def test_a_step_and_the_density_of_its_result_agree(state: str, network: str, size: int, target: str) -> None:
    """To the bit, wherever the state lies when it is read again."""
    std = Tensor.of(np.array([0.3, 0.0, 1.5]), "float32")
    shape = (3, size) if size > 1025 else (3, size, 2)
    taken = step(shape, state, network, std=std)
    old, _ = taken.run(target)
    assert old[1] == 0
    for layout in INPUT_LAYOUTS:
        if layout in ("expanded", "one sample"):
            continue
        for merge in (True, False):
            again = density(shape, state, network, std=std, merge=merge)
            again.next = Tensor.of(taken.next.values, state, layout, 1)
            again.inputs[1] = Tensor.of(again.inputs[1].values, network, layout)
            new, _ = again.run(target)
            assert np.array_equal(new, old)


@pytest.mark.parametrize("make", ["density", "divergence"])
@pytest.mark.parametrize("size", SIZES)
def test_gradients(size: int, make: str) -> None:
    """The scalar kernel's bits from every other, backward and with the value; and what the formula says."""
    for dtypes in PAIRS if size < CHUNK else PAIRS[1:5:2]:
        problem = MAKERS[make]((2, size), *dtypes, std=Tensor.of(np.array([0.3, 2.0]), "float32"))
        if make == "density":
            problem.conditional, problem.guidance_scale = Tensor.of(values(5, (2, size)), dtypes[1]), 2.5
        problem.upstream = Tensor.of(np.array([1.0, -3.0]), "float32").argument
        count = len(problem.operands)
        for wanted in ([True] * count, [False] * (count - 1) + [True]):
            expected = problem.differentiate("scalar", wanted)
            for target in (*bicm_emulator.instruction_sets(), "cuda"):
                plain, _ = problem.run(target)
                both, at_once = problem.run(target, wanted)
                assert np.array_equal(plain, both)
                for ours in (problem.differentiate(target, wanted), at_once):
                    for a, b in zip(ours, expected, strict=True):
                        assert same_bits(a.bits, b.bits, a.dtype)
        s = problem.number(problem.std)
        other = problem.mean(problem.references) if problem.references else problem.next.values.astype(np.float64)
        pull = np.array([[1.0], [-3.0]]) * (other - problem.mean(problem.inputs)) / (s * s * size)
        sign = 1.0 if problem.references else -1.0
        first = expected_first(problem)
        wanted_values = sign * (0.9 if problem.references else 1.0) * pull
        rounding = {"float16": 2.0**-10, "bfloat16": 2.0**-7}.get(first.dtype, 0.0)
        allowed = rounding * np.abs(wanted_values) + 2e-6 * np.abs(pull).max() + 1e-7
        assert np.all(np.abs(first.values - wanted_values) <= allowed)


def expected_first(problem: Policy) -> Tensor:
    """The gradient of the first operand."""
    wanted = [True] + [False] * (len(problem.operands) - 1)
    return problem.differentiate("cuda", wanted)[0]


@pytest.mark.parametrize("terms", [1, 2, 5])
def test_terms_and_guidance(terms: int, target: str) -> None:
    shape = (2, 77)
    for guided in (False, True):
        inputs = [Tensor.of(values(k, shape), "bfloat16" if k % 2 else "float32") for k in range(terms)]
        problem = Policy(
            inputs, Tensor.empty(shape, "float32"), steps=True, weights=[0.9, -0.3, 1.7, 0.01, -2.5][:terms]
        )
        if guided:
            problem.conditional, problem.guidance_scale = Tensor.of(values(9, shape), "float16"), 3.0
        check(problem, target)


def test_grids_do_not_matter(device: bicm_emulator.Device) -> None:
    problems = [step((3, 2 * CHUNK + 9)), density((3, 2 * CHUNK + 9)), divergence((40, 20))]
    plain = [problem.run("cuda")[0] for problem in problems]
    for x, backwards in ((1, False), (3, True), (7, False)):
        device.x, device.backwards = x, backwards
        for problem, expected in zip(problems, plain, strict=True):
            assert np.array_equal(problem.run("cuda")[0], expected)


def test_a_sample_does_not_depend_on_its_batch(target: str) -> None:
    for size in (33, CHUNK + 1):
        whole = density((5, size), "bfloat16", "bfloat16")
        results, _ = whole.run(target)
        for k in range(5):
            alone = density((5, size), "bfloat16", "bfloat16")
            alone.inputs = [Tensor.of(x.values[k : k + 1], x.dtype) for x in whole.inputs]
            alone.next = Tensor.of(whole.next.values[k : k + 1], "bfloat16")
            assert alone.run(target)[0] == results[k]


def test_nothing_to_sum(target: str) -> None:
    for make in MAKERS.values():
        results, _ = make((0, 5)).run(target)
        assert results.shape == (0,)
        empty = make((2, 0), adds_up=True)
        assert np.all(empty.run(target)[0] == 0)
