"""Losses whose gradients are formed with the value, on emulated CUDA and on CPUs: the bits of the two passes."""

from __future__ import annotations

import bicm_emulator
import numpy as np
import pytest

from .losses import CHUNK, KINDS, MAKERS, SIZES, Loss
from .problems import PAIRS, values
from .tensors import INPUT_LAYOUTS, Tensor, same_bits

UNIT = 1024 * 64  # what the CPU sums by itself
WIDE = [("float32", "float32"), ("float64", "float64"), ("bfloat16", "float32")]


def check(problem: Loss, target: str = "cuda") -> None:
    """Loss, sums and gradients as from a pass forward and one backward."""
    loss, sums = problem.run(target)
    count = len(problem.inputs)
    upstream = np.ones(problem.batch) if problem.reduction == "none" else 1.0
    for wanted in ([True] + [False] * (count - 1), [True] * count):
        got, got_sums, gradients = problem.run_with_gradients(target, wanted)
        assert np.array_equal(got, loss, equal_nan=True)
        assert np.array_equal(got_sums, sums, equal_nan=True)
        for a, b in zip(gradients, problem.differentiate(target, sums, upstream, wanted), strict=True):
            assert same_bits(a.bits, b.bits, a.dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("size", SIZES)
def test_sizes(size: int, make: str, kind: str) -> None:
    for dtypes in WIDE if size < CHUNK else WIDE[:1]:
        check(MAKERS[make]((2, size), *dtypes, kind=kind, c=KINDS[kind]))


@pytest.mark.parametrize("dtypes", PAIRS)
@pytest.mark.parametrize("layout", INPUT_LAYOUTS)
def test_layouts_and_dtypes(layout: str, dtypes: tuple[str, str]) -> None:
    """Halves and strides take two launches."""
    for offset in (0, 1):
        problem = MAKERS["consistency"]((3, 5, 7, 2), *dtypes)
        problem.x = Tensor.of(values(5, (3, 5, 7, 2)), dtypes[0], layout, offset)
        check(problem)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [7, 1025, 5000, UNIT + 1030])
@pytest.mark.parametrize("make", MAKERS)
def test_every_instruction_set(make: str, size: int, kind: str) -> None:
    for dtypes in (*WIDE, ("float16", "float16")):
        problem = MAKERS[make]((2, size), *dtypes, kind=kind, c=KINDS[kind])
        for target in bicm_emulator.instruction_sets():
            check(problem, target)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_and_grids(device: bicm_emulator.Device, reduction: str) -> None:
    numbers = Tensor.of(np.linspace(0.1, 2.0, 70), "float32")
    problem = MAKERS["consistency"]((70, 900), reduction=reduction, weight=numbers, c=numbers)
    check(problem)
    loss, _, (gradient,) = problem.run_with_gradients("cuda", [True, False, False])
    for processors, backwards in ((1, False), (132, True)):
        device.processors, device.backwards = processors, backwards
        other, _, (again,) = problem.run_with_gradients("cuda", [True, False, False])
        assert np.array_equal(other, loss)
        assert np.array_equal(again.bits, gradient.bits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [("float32", x) for x in (1e-44, 1e-36, 1e20, 1e38)]
    + [("float64", 1e-310), ("float64", 1e200), ("float64", 3e307)],
)
def test_squares_that_overflow_or_underflow(dtype: str, scale: float, kind: str) -> None:
    """In one chunk, in a cluster, and by two launches, on every instruction set."""
    for size in (300, 2 * CHUNK + 7):
        for c in (0.0, 0.1):
            problem = MAKERS["pseudo_huber"]((2, size), dtype, dtype, c=c, kind=kind)
            for x in problem.inputs:
                x.bits.view(dtype)[:, ::2] *= np.dtype(dtype).type(scale)
            for target in ("cuda", *bicm_emulator.instruction_sets()):
                check(problem, target)


@pytest.mark.parametrize("scale", [1e-36, 1e-20, 0.0, 1e20, 1e35])
def test_squares_beyond_float32(scale: float) -> None:
    """They are taken again, of residuals that are still there."""
    problem = MAKERS["pseudo_huber"]((2, 3000), c=0.1)
    for x in problem.inputs:
        x.bits.view("float32")[...] *= np.float32(scale)
    check(problem)
    bicm_emulator.traffic.read = 0
    problem.run_with_gradients("cuda", [True, False])
    assert 48_000 <= bicm_emulator.traffic.read < 48_100


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_sum(kind: str) -> None:
    for shape in ((0, 5), (2, 0)):
        for reduction in ("mean", "none"):
            check(MAKERS["pseudo_huber"](shape, kind=kind, c=0.1, reduction=reduction))


@pytest.mark.parametrize("chunks", [2, 3, 5, 8, 9])
@pytest.mark.parametrize("make", MAKERS)
def test_clusters(device: bicm_emulator.Device, make: str, chunks: int) -> None:
    """One launch and one reading up to eight chunks, on GPUs that have clusters; the same bits everywhere."""
    problem, traffic = MAKERS[make]((2, chunks * CHUNK - 77)), bicm_emulator.traffic
    wanted = [True] + [False] * (len(problem.inputs) - 1)
    tensor, results = 4 * 2 * (chunks * CHUNK - 77), []
    for has_clusters in (True, False):
        device.has_clusters = has_clusters
        at_once = has_clusters and chunks <= 8
        launches, traffic.read, traffic.written = device.launches, 0, 0
        results.append(problem.run_with_gradients("cuda", wanted))
        assert device.launches == launches + (1 if at_once else 2)
        passes = (1 if at_once else 2) * len(problem.inputs)
        assert passes * tensor <= traffic.read < passes * tensor + 400
        assert tensor <= traffic.written < tensor + 400
    (loss, sums, (gradient,)), (other, other_sums, (again,)) = results
    assert np.array_equal(loss, other)
    assert np.array_equal(sums, other_sums)
    assert np.array_equal(gradient.bits, again.bits)


@pytest.mark.parametrize("backwards", [False, True])
def test_clusters_on_any_grid(device: bicm_emulator.Device, backwards: bool) -> None:
    problem = MAKERS["consistency"]((5, 3 * CHUNK), "float32", "float32", reduction="none")
    device.processors, device.backwards = 1, backwards
    check(problem)


@pytest.mark.parametrize("kind", ["elementwise", "squared"])
def test_a_sample_of_any_size_whose_gradient_needs_no_sum_is_read_once(device: bicm_emulator.Device, kind: str) -> None:
    problem, traffic = MAKERS["pseudo_huber"]((1, 10 * CHUNK), kind=kind, c=0.1), bicm_emulator.traffic
    device.has_clusters = False
    launches, traffic.read = device.launches, 0
    problem.run_with_gradients("cuda", [True, False])
    assert device.launches == launches + 1
    assert 8 * 10 * CHUNK <= traffic.read < 8 * 10 * CHUNK + 200


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("make", MAKERS)
def test_one_launch_reads_each_input_once(device: bicm_emulator.Device, make: str, dtype: str) -> None:
    """Beside the tensors, what a sample has one of."""
    wide = dtype == "float64"
    problem, traffic = MAKERS[make]((3, CHUNK // (1 + wide)), dtype, dtype), bicm_emulator.traffic
    launches, traffic.read, traffic.written = device.launches, 0, 0
    problem.run_with_gradients("cuda", [True] + [False] * (len(problem.inputs) - 1))
    assert device.launches == launches + 1
    tensor = 4 * 3 * CHUNK
    assert len(problem.inputs) * tensor <= traffic.read < len(problem.inputs) * tensor + 200
    assert tensor <= traffic.written < tensor + 100


def test_an_error_of_the_runtime_comes_back(device: bicm_emulator.Device) -> None:
    device.fails = True
    for size in (4, CHUNK + 1):
        with pytest.raises(RuntimeError, match="returned an error"):
            MAKERS["pseudo_huber"]((2, size)).run_with_gradients("cuda", [True, False])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("layout", ["contiguous", "padded", "every second"])
@pytest.mark.parametrize("size", [5, 1000, 5000])
def test_scaling(target: str, size: int, layout: str, dtype: str) -> None:
    """A product each; where upstream is 1 nothing is read."""
    upstream = np.array([1.0, 0.3, -4.0], np.float32)
    for given in (upstream, 3.0, np.array(0.7)):
        gradient = Tensor.of(values(3, (3, size)), dtype, layout)
        compute = np.float64 if dtype == "float64" else np.float32
        factor = np.broadcast_to(np.asarray(given, compute), (3,))[:, None]
        expected = Tensor.of(gradient.values.astype(compute) * factor, dtype)
        before = gradient.fresh()
        bicm_emulator.scale_gradient(target, gradient.argument, given)
        assert same_bits(gradient.bits, expected.bits, dtype)
        assert gradient.guards_intact(before)


def test_an_upstream_of_one_moves_nothing() -> None:
    gradient, traffic = Tensor.of(values(3, (3, 5000)), "float32"), bicm_emulator.traffic
    for upstream, moved in ((1.0, 0), (np.ones(3), 0), (2.0, 60_000), (np.array([1.0, 2.0, 1.0]), 20_000)):
        traffic.read = traffic.written = 0
        bicm_emulator.scale_gradient("cuda", gradient.argument, upstream)
        assert traffic.read == traffic.written == moved
