"""Pseudo-Huber losses on emulated CUDA: value, sums and derivatives, for any memory, grid and size of a sample."""

from __future__ import annotations

import bicm_emulator
import numpy as np
import pytest

from tests.support.extremes import NAMED, Case, exactly, title

from .losses import CHUNK, KINDS, MAKERS, SIZES, TIMES, Loss, consistency, pseudo_huber
from .problems import PAIRS, values
from .tensors import DTYPES, INPUT_LAYOUTS, Tensor, far, same_bits


def accuracy(compute: np.dtype) -> float:
    return 1e-6 if compute == np.float32 else 1e-13


def check_value(problem: Loss) -> np.ndarray:
    """Loss and sums as in float64; the sums come back."""
    loss, sums = problem.run("cuda")
    expected, expected_sums = problem.expected()
    tolerance = accuracy(problem.compute)
    smallest = float(np.finfo(problem.compute).smallest_subnormal)
    # A vector's sum is needed for gradients, too; an elementwise one for the loss alone, which does not hold less.
    least = smallest if problem.kind == "elementwise" else 0
    assert np.allclose(problem.kept(sums), expected_sums, rtol=tolerance, atol=least, equal_nan=True)
    assert np.allclose(loss, expected.astype(problem.compute), rtol=tolerance, atol=smallest, equal_nan=True)
    return sums


def check_gradients(problem: Loss, sums: np.ndarray) -> None:
    """The CPU's bits, from the same sums."""
    upstream = Tensor.of(np.linspace(1.0, 9.0, problem.batch), "float32").argument
    upstream = upstream if problem.reduction == "none" else np.float32(1024.0).reshape(())
    count = len(problem.inputs)
    for wanted in ([True] + [False] * (count - 1), [True] * count, [False] * (count - 1) + [True]):
        ours = problem.differentiate("cuda", sums, upstream, wanted)
        for target in ("scalar", bicm_emulator.instruction_sets()[-1]):
            for a, b in zip(ours, problem.differentiate(target, sums, upstream, wanted), strict=True):
                assert same_bits(a.bits, b.bits, a.dtype)


def check(problem: Loss) -> None:
    check_gradients(problem, check_value(problem))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("size", SIZES)
def test_sizes(size: int, make: str, kind: str) -> None:
    for dtypes in PAIRS if size < CHUNK else PAIRS[1:5:2]:
        check(MAKERS[make]((2, size), *dtypes, kind=kind, c=KINDS[kind]))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MAKERS)
def test_reductions_and_weights(make: str, kind: str, reduction: str) -> None:
    for batch, size in ((1, 5), (1, CHUNK + 3), (3, 100), (70, 3)):
        for dtype in ("float32", "float64"):
            numbers = Tensor.of(np.linspace(0.0, 2.0, batch), "float32")
            for weight, c in ((None, KINDS[kind]), (0.5, 0.0), (numbers, numbers)):
                check(MAKERS[make]((batch, size), dtype, dtype, kind=kind, c=c, weight=weight, reduction=reduction))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(("state", "network"), PAIRS)
def test_weights_of_elements(make: str, kind: str, state: str, network: str) -> None:
    """Of any dtype and layout, masks among them; value and gradient at once have the bits of two passes."""
    for size in (1, 33, CHUNK + 5):
        weight = np.abs(values(8, (2, size))) * (values(9, (2, size)) > 0)
        for k, layout in enumerate(("contiguous", "every second")):
            problem = MAKERS[make]((2, size), state, network, kind=kind, c=KINDS[kind], weighs=True)
            problem.weight = Tensor.of(weight, ("float32", state, network)[(k + size) % 3], layout)
            sums = check_value(problem)
            check_gradients(problem, sums)
            wanted = [True] * len(problem.inputs)
            for target in ("cuda", *bicm_emulator.instruction_sets()):
                loss, own = problem.run(target)
                other, other_sums, gradients = problem.run_with_gradients(target, wanted)
                assert np.array_equal(loss, other)
                assert np.array_equal(own, other_sums)
                for a, b in zip(gradients, problem.differentiate(target, own, 1.0, wanted), strict=True):
                    assert same_bits(a.bits, b.bits, a.dtype)


@pytest.mark.parametrize("parameterization", ["bcm", "cm", "edm"])
@pytest.mark.parametrize(("state", "network"), PAIRS)
def test_parameterizations(state: str, network: str, parameterization: str) -> None:
    problem = consistency((4, 333), state, network, parameterization=parameterization)
    check(problem)
    levels = {name: Tensor.of(np.array([0.0, 0.5, 3.0, 80.0]), "float32").argument for name in ("t", "u")}
    problem.times = TIMES | levels
    check(problem)


@pytest.mark.parametrize("layout", INPUT_LAYOUTS)
@pytest.mark.parametrize(("state", "network"), PAIRS)
def test_layouts(state: str, network: str, layout: str) -> None:
    for merge in (True, False):
        for offset in (0, 1):
            problem = consistency((3, 5, 7, 2), state, network, merge=merge)
            problem.x = Tensor.of(values(5, (3, 5, 7, 2)), state, layout, offset)
            problem.prediction = Tensor.of(values(6, (3, 5, 7, 2)), network, layout, offset)
            check(problem)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_tensors(dtype: str, kind: str) -> None:
    """Loss and gradient are exactly 0, at c = 0 too."""
    problem = pseudo_huber((2, 50), dtype, dtype, kind=kind, c=0.0)
    problem.target = problem.prediction
    loss, sums = problem.run("cuda")
    assert loss == 0
    for gradient in problem.differentiate("cuda", sums, 1.0, [True, True]):
        assert np.all(gradient.values == 0)


@pytest.mark.parametrize("kind", KINDS)
def test_special_values(kind: str) -> None:
    """The loss is infinite where a residual is, and the gradient NaN there, or a square's infinite."""
    for dtype, specials in (
        ("float64", (np.nan, np.inf, -np.inf, 1e150, 1e300)),
        ("float32", (np.nan, np.inf, -np.inf, 1e38)),
    ):
        for special in specials:
            problem = pseudo_huber((2, 300), dtype, dtype, reduction="none", kind=kind, c=KINDS[kind])
            problem.prediction.bits.view(dtype)[0, 17] = special
            sums = check_value(problem)
            check_gradients(problem, sums)
            if not np.isfinite(special):
                gradient = problem.differentiate("cuda", sums, np.ones(2), [True, False])[0].values
                infinite = kind == "squared" and np.isinf(special)
                assert np.isinf(gradient[0, 17]) if infinite else np.isnan(gradient[0, 17])
                assert np.all(np.isfinite(gradient[1]))


SCALES = [("float32", scale) for scale in (1e-44, 1e-36, 1e-25, 1e-17, 1e17, 1e25, 1e35, 1e38)]
SCALES += [("float64", scale) for scale in (5e-324, 1e-310, 1e-200, 1e-150, 1e150, 1e200, 1e305, 3e307)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "scale"), SCALES)
@pytest.mark.parametrize("make", MAKERS)
def test_squares_that_overflow_or_underflow(make: str, dtype: str, scale: float, kind: str) -> None:
    """Residuals of any size, all of them or beside others of size 1, in one chunk and in several."""
    for size in (7, CHUNK + 5):
        for mixed in (False, True):
            for c in (0.0, 0.3):
                problem = MAKERS[make]((2, size), dtype, dtype, c=c, kind=kind, reduction="none")
                for x in problem.inputs:
                    x.bits.view(dtype)[:, :: 3 if mixed else 1] *= np.dtype(dtype).type(scale)
                check(problem)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "case"), NAMED, ids=[f"{name} {title(case)}" for name, case in NAMED])
def test_extremes(dtype: str, case: Case, kind: str) -> None:
    """The exact value and derivatives, under a loss scale, on every way and instruction set."""
    r, c = case
    prediction = Tensor.of(np.array([r]), dtype)
    problem = Loss(prediction, Tensor.of(np.zeros((1, len(r))), dtype), c=c, kind=kind)
    value, slopes = exactly(prediction.values[0].tolist(), c, kind)
    rounding = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 1e-6, "float64": 1e-14}[dtype]
    smallest = 3 * {"float16": 6e-8, "bfloat16": 1e-40, "float32": 1.5e-45, "float64": 5e-324}[dtype]

    def close(actual: np.ndarray, expected: list[float], scale: float) -> None:
        wanted = Tensor.of(np.array(expected) * scale, dtype).values
        assert np.allclose(actual, wanted, rtol=rounding, atol=smallest, equal_nan=True), (actual, wanted)

    loss, sums, (kept,) = problem.run_with_gradients("cuda", [True, False])
    wanted = np.array(float(value)).astype(problem.compute)
    least = float(np.finfo(problem.compute).smallest_subnormal)
    assert np.allclose(loss, wanted, rtol=accuracy(problem.compute), atol=3 * least, equal_nan=True)
    close(kept.values[0], [float(slope) for slope in slopes], 1.0)
    (gradient,) = problem.differentiate("cuda", sums, 65536.0, [True, False])
    close(gradient.values[0], [float(slope) for slope in slopes], 65536.0)
    for target in bicm_emulator.instruction_sets():
        _, own_sums, (own,) = problem.run_with_gradients(target, [True, False])
        close(own.values[0], [float(slope) for slope in slopes], 1.0)
        (gradient,) = problem.differentiate(target, own_sums, 65536.0, [True, False])
        close(gradient.values[0], [float(slope) for slope in slopes], 65536.0)
    check_gradients(problem, sums)


def test_a_mean_of_float64_whose_sum_overflows() -> None:
    for kind in KINDS:
        for batch in (4, 300):
            ends = [Tensor.of(np.full((batch, 2), x), "float64") for x in (1e308, 0.0)]
            loss, _ = Loss(*ends, c=0.0, kind=kind).run("cuda")
            wanted = {"vector": 1e308 * 2**0.5, "elementwise": 1e308, "squared": np.inf}[kind]
            assert np.allclose(loss, wanted, rtol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_sum(device: bicm_emulator.Device, kind: str) -> None:
    launches = device.launches
    assert pseudo_huber((0, 5), kind=kind, c=0.1, reduction="none").run("cuda")[0].shape == (0,)
    assert device.launches == launches
    assert np.isnan(pseudo_huber((0, 5), kind=kind, c=0.1).run("cuda")[0])
    assert pseudo_huber((0, 5), kind=kind, c=0.1, reduction="sum").run("cuda")[0] == 0
    loss, sums = pseudo_huber((2, 0), kind=kind, c=0.1, reduction="none").run("cuda")
    assert sums.tolist() == [0, 0]
    assert np.all(np.isnan(loss) if kind == "elementwise" else loss == 0)


@pytest.mark.parametrize("size", [3000, 2 * CHUNK + 5])
@pytest.mark.parametrize("make", MAKERS)
def test_the_grid_and_the_batch_do_not_matter(device: bicm_emulator.Device, make: str, size: int) -> None:
    problem = MAKERS[make]((5, size), weight=Tensor.of(np.linspace(0.1, 1.0, 5), "float32"))
    loss, sums = problem.run("cuda")
    gradients = problem.differentiate("cuda", sums, 3.0, [True] * len(problem.inputs))
    for processors, x, y, backwards in ((1, 1, 1, False), (132, 0, 0, True), (2, 3, 2, True), (2, 64, 7, False)):
        device.processors, device.x, device.y, device.backwards = processors, x, y, backwards
        other, other_sums = problem.run("cuda")
        assert np.array_equal(other_sums, sums)
        assert np.array_equal(other, loss)
        for a, b in zip(gradients, problem.differentiate("cuda", sums, 3.0, [True] * len(gradients)), strict=True):
            assert np.array_equal(a.bits, b.bits)
    for b in (0, 4):
        inputs = [Tensor.of(x.values[b : b + 1], x.dtype) for x in problem.inputs]
        assert Loss(*inputs).run("cuda")[1] == sums[b : b + 1]


def test_only_a_sum_out_of_range_is_taken_again() -> None:
    traffic, read = bicm_emulator.traffic, []
    for scale in (1.0, 1e-14, 1e17, 1e20, 1e-20, 0.0):
        problem = pseudo_huber((1, 3000), reduction="none")
        for x in problem.inputs:
            x.bits.view("float32")[...] *= np.float32(scale)
        traffic.read = 0
        problem.run("cuda")
        read.append(traffic.read)
    assert read == [24_000] * 3 + [48_000] * 3


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("size", [3072, 3 * CHUNK])
def test_one_launch_forward_and_one_backward(device: bicm_emulator.Device, size: int, reduction: str) -> None:
    problem = pseudo_huber((3, size), reduction=reduction)
    launches = device.launches
    _, sums = problem.run("cuda")
    assert device.launches == launches + 1
    problem.differentiate("cuda", sums, 1.0, [True, False])
    assert device.launches == launches + 2


@pytest.mark.parametrize("problem", [pseudo_huber((3, 3072)), pseudo_huber((1, 3 * CHUNK))], ids=["samples", "chunks"])
def test_a_stream_s_counter_is_cleared_once(device: bicm_emulator.Device, problem: Loss) -> None:
    """It is 0 behind every launch, whatever its grid; what is captured, or finds no memory, clears one of its own."""
    device.stream = 10 + problem.batch
    expected, cleared = problem.run("cuda"), []

    def run() -> None:
        before = device.memsets
        for actual, wanted in zip(problem.run("cuda"), expected, strict=True):
            assert np.array_equal(actual, wanted)
        cleared.append(device.memsets - before)

    for x in (0, 2, 1, 3, 0):
        device.x = x
        run()
    device.captures = True
    run()
    device.captures, device.full = False, True
    run()
    device.stream += 100  # a new one, for which there is no memory
    run()
    device.full = False
    run()
    assert cleared == [0, 0, 0, 0, 0, 1, 0, 1, 1]


def test_addresses_beyond_32_bits(device: bicm_emulator.Device) -> None:
    """One block of each kernel, on a sample of 2^33 elements."""
    first = 2**32 + 5 * CHUNK
    rows = [values(k, (CHUNK,)).astype(np.float32) for k in range(2)]
    gradient, sums = np.zeros(CHUNK, np.float32), np.array([9.0])
    prediction, target, out = (far(row, first) for row in (*rows, gradient))
    arguments = pseudo_huber((1, 1), c=4.0).arguments() | {"prediction": prediction, "target": target}

    device.x, device.from_block = 2**20, first // CHUNK
    device.until_block = device.from_block + 1
    traffic = bicm_emulator.traffic
    traffic.read = 0
    bicm_emulator.pseudo_huber("cuda", np.zeros((), np.float32), sums.copy(), arguments)
    assert 8 * CHUNK <= traffic.read < 8 * CHUNK + 16

    device.x, device.from_block = 2**23, first // 1024
    device.until_block = device.from_block + CHUNK // 1024
    bicm_emulator.pseudo_huber_gradient("cuda", [out, None], sums, 5.0, arguments)
    assert np.array_equal(gradient, rows[0] - rows[1])


def test_an_error_of_the_runtime_comes_back(device: bicm_emulator.Device) -> None:
    device.fails = True
    with pytest.raises(RuntimeError, match="returned an error"):
        pseudo_huber((2, 4)).run("cuda")
    with pytest.raises(RuntimeError, match="returned an error"):
        pseudo_huber((2, 4)).differentiate("cuda", np.zeros(2), 1.0, [True, False])
