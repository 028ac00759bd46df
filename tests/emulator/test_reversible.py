"""Exact steps: Python's integers from every target, whatever the memory, the grid and the order of threads."""

from __future__ import annotations

from itertools import pairwise, product

import bicm_emulator
import numpy as np
import pytest

from .checks import targets
from .exact import Exact, check_decoded, check_exact
from .problems import Shape, values
from .tensors import DTYPES, INPUT_LAYOUTS, LAYOUTS, Tensor

#: Some of them leave every sample at a multiple of 16 bytes.
SIZES = sorted({1, 3, 5, 64, 65, 136, bicm_emulator.CHUNK + 1})
RATIOS = [(1, 1), (24, 25), (9, 10), (1, 2), (3, 2), (1023, 2**20)]
BDIA = [0.9, 0.3, 1.1, -0.2]


def states(
    seed: int, shape: Shape, bits: int = 36, dtype: str = "int64", layout: str = "contiguous", offset: int = 0
) -> Tensor:
    q = np.random.default_rng(seed).integers(-(2**bits), 2**bits, shape)
    return Tensor.of(q, dtype, layout, offset)


def bdia(shape: Shape, network: str, n: object, m: object, bits: int = 36) -> Exact:
    """One in a few elements is missing from each state."""
    last, q = (states(seed, shape, bits) for seed in (0, 1))
    for k, x in enumerate((last, q)):
        x.bits.reshape(-1)[37 + k :: 101] = 2**63
    unit = isinstance(n, int) and n == m
    return Exact(
        [q, Tensor.of(values(2, shape), network)],
        BDIA,
        Tensor.empty(shape, "int64"),
        last=last,
        info=None if unit else states(3, shape, 40),
        info_out=None if unit else Tensor.empty(shape, "int64"),
        form="bdia",
        n=n,
        m=m,
        overflow=np.zeros(shape[0], np.int64),
        mark=7,
    )


def both_ways(target: str, problem: Exact) -> None:
    for inverse in (False, True):
        problem.inverse = inverse
        if problem.overflow is not None:
            problem.overflow[...] = 0
        check_exact(lambda p: p.run(target), problem)


@pytest.mark.parametrize("network", DTYPES)
@pytest.mark.parametrize(("n", "m"), RATIOS)
def test_bdia(target: str, network: str, n: int, m: int) -> None:
    for size in SIZES:
        problem = bdia((2, size), network, n, m)
        both_ways(target, problem)
        problem.conditional, problem.guidance_scale = Tensor.of(values(9, (2, size)), network), 7.5
        both_ways(target, problem)


@pytest.mark.parametrize("bits", [20, 50, 62])
def test_ratios_and_numbers_per_sample(target: str, bits: int) -> None:
    """A ratio of 1 among others, and two that are none: their samples are missing from the results."""
    n, m = np.array([1, 9, 5, 2**20, 0, 3]), np.array([2, 10, 5, 2**20 - 1, 3, 2**20 + 1])
    problem = bdia((6, 130), "float16", n, m, bits)
    for row in (np.linspace(0.5, 1.5, 6), np.array(0.7)):
        problem.coefficients = [Tensor.of(row, "float32"), 0.3, Tensor.of(row + 0.1, "float64"), -0.2]
        problem.conditional = Tensor.of(values(9, (6, 130)), "float32")
        problem.guidance_scale = Tensor.of(row, "float16")
        problem.mark = np.arange(6) + 10
        both_ways(target, problem)
    problem.overflow = np.zeros((6, 2), np.int64)[:, 0]
    problem.m = np.array(7)
    both_ways(target, problem)


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("ratio", [(1, 1), (9, 10)])
def test_affine(target: str, terms: int, ratio: tuple[int, int]) -> None:
    """States and network outputs of every dtype side by side."""
    for size in (1, 5, 64, 1025):
        shape = (3, size)
        floats = [Tensor.of(values(k, shape), dtype) for k, dtype in enumerate(("float16", "float64", "bfloat16"))]
        inputs = [states(5, shape, 35), *floats, states(6, shape, 33)][5 - terms :]
        problem = bdia(shape, "float32", *ratio)
        problem.form, problem.inputs = "affine", inputs
        problem.coefficients = [0.3, Tensor.of(np.linspace(-1, 1, 3), "float32"), 1e3, -2.0, 0.5][:terms]
        both_ways(target, problem)


@pytest.mark.parametrize("guided", [False, True])
def test_int32_states(target: str, guided: bool) -> None:
    """Sums beyond 32 bits are missing, as is the least integer of an input."""
    for size in SIZES:
        shape = (2, size)
        last, q = (states(seed, shape, 30, "int32") for seed in (0, 1))
        for k, x in enumerate((last, q)):
            x.bits.reshape(-1)[3 + k :: 7] = 2**31
        eps, out = Tensor.of(values(2, shape), "float32"), Tensor.empty(shape, "int32")
        problem = Exact([q, eps], [1.7, 30.0], out, last=last)
        problem.fraction_bits, problem.overflow = 24, np.zeros(2, np.int64)
        if guided:
            problem.conditional, problem.guidance_scale = Tensor.of(values(9, shape), "bfloat16"), 2.5
        both_ways(target, problem)


TIES = [0.5, 1.5, 2.5, -0.5, -1.5, -0.0, 2.0**52 + 0.5, 2.0**51 + 0.5, -(2.0**51) - 1.5, 123456789.5, 0.5 - 2.0**-54]
ENDS = [2.0**63, -(2.0**63), 2.0**63 - 1024, 1024 - 2.0**63, -(2.0**62) - 1024, 2.0**53 - 1, 2.0**31 - 0.5]
SPECIAL = np.array([*TIES, *ENDS, 1e300, 1e-300, np.inf, -np.inf, np.nan])


@pytest.mark.parametrize("dtype", ["int64", "int32"])
@pytest.mark.parametrize("source", DTYPES)
def test_encoding(target: str, source: str, dtype: str) -> None:
    for size, fraction_bits in product(SIZES, (0, 20)):
        numbers = values(size, (2, size)) * 100
        with np.errstate(over="ignore"):
            numbers[0] = np.resize(SPECIAL, size)
            problem = Exact([Tensor.of(numbers, source)], [1.0], Tensor.empty((2, size), dtype))
        problem.fraction_bits, problem.overflow, problem.mark = fraction_bits, np.zeros(2, np.int64), 3
        check_exact(lambda p: p.run(target), problem)


@pytest.mark.parametrize("result", DTYPES)
@pytest.mark.parametrize("dtype", ["int64", "int32"])
def test_decoding(target: str, result: str, dtype: str) -> None:
    """Among them integers halfway between two float64 numbers."""
    ties = np.array([2**53 + 1, 2**53 + 3, -(2**53) - 1, 2**54 + 2, 2**63 - 1, -(2**63), 2**62 + 257, 0, 1])
    for size, layout in product(SIZES, LAYOUTS):
        q = states(0, (2, size), 62 if dtype == "int64" else 31, dtype, layout)
        if dtype == "int64":
            q.bits[0] = np.resize(ties, size).view(np.uint64)
        q.bits[1, ::5] = 2**63 if dtype == "int64" else 2**31
        check_decoded(target, q, Tensor.empty((2, size), result), 24)
    check_decoded(target, states(0, (2, 6, 7)), Tensor.empty((2, 6, 7), result, "permuted", offset=1), 0)


@pytest.mark.parametrize("layout", INPUT_LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (3, 4, 16), (4, 1), (5,), (2, 2, 3, 2, 3, 2, 3)], ids=str)
def test_layouts_of_inputs(target: str, shape: Shape, layout: str) -> None:
    for merge, (n, m) in product((True, False), [(1, 1), (9, 10)]):
        problem = bdia(shape, "bfloat16", n, m)
        problem.merge = merge
        problem.inputs = [
            states(4, shape, layout=layout),
            Tensor.of(values(5, shape), "bfloat16", layout, offset=1),
        ]
        problem.last = states(6, shape, layout=layout, offset=1)
        check_exact(lambda p: p.run(target), problem)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (3, 4, 16), (5,)], ids=str)
def test_layouts_of_outputs(target: str, shape: Shape, layout: str) -> None:
    for streams, offset in product((False, True), (0, 1)):
        problem = bdia(shape, "float32", 9, 10)
        problem.out = Tensor.empty(shape, "int64", layout, offset)
        problem.info_out, problem.streams = Tensor.empty(shape, "int64", layout), streams
        check_exact(lambda p: p.run(target), problem)


def test_unaligned_operands(target: str) -> None:
    """Any operand that does not lie at a multiple of 16 bytes."""
    shape = (2, 132)
    for odd in range(5):
        offset = [int(k == odd) for k in range(5)]
        problem = bdia(shape, "bfloat16", 9, 10)
        problem.inputs = [states(1, shape, offset=offset[0]), Tensor.of(values(2, shape), "bfloat16", offset=offset[1])]
        problem.last, problem.info = states(0, shape, offset=offset[2]), states(3, shape, offset=offset[3])
        problem.out = Tensor.empty(shape, "int64", offset=offset[4])
        both_ways(target, problem)


def test_results_may_replace_inputs(target: str) -> None:
    for streams, swapped in product((False, True), (False, True)):
        problem = bdia((2, 5, 211), "float32", 9, 10)
        pair = (problem.info, problem.last) if swapped else (problem.last, problem.info)
        (problem.out, problem.info_out), problem.streams = pair, streams
        check_exact(lambda p: p.run(target), problem)
        problem = bdia((2, 5, 211), "float32", 1, 1)
        problem.out, problem.streams = problem.inputs[0], streams
        check_exact(lambda p: p.run(target), problem)


def test_the_first_mark_stays(target: str) -> None:
    """One missing element of a long sample is enough; an entry that is there is kept."""
    shape = (4, 5000)
    for place in (0, 2499, 4999):
        x = values(0, shape)
        x[1:, place] = np.nan
        problem = Exact([Tensor.of(x, "float32")], [1.0], Tensor.empty(shape, "int64"), last=states(1, shape))
        problem.overflow, problem.mark = np.array([0, 0, 5, 0]), np.array([11, 12, 13, 14])
        check_exact(lambda p: p.run(target), problem)
        assert problem.overflow.tolist() == [0, 12, 5, 14]


@pytest.mark.parametrize(("n", "m"), RATIOS[:4])
@pytest.mark.parametrize("network", DTYPES)
def test_sixty_steps_return_every_bit(target: str, network: str, n: int, m: int) -> None:
    """Sampled and inverted with a network that rounds to its dtype; the buffer is empty at both ends."""
    shape, unit = (2, 37), n == m
    first, second = states(0, shape, 33), states(1, shape, 33)
    last, q, info = first, second, Tensor.of(np.zeros(shape), "int64")

    def move(last: Tensor, q: Tensor, info: Tensor, time: int, inverse: bool) -> tuple[Tensor, Tensor]:
        eps = Tensor.of(np.tanh(q.values * 2.0**-33 + 0.01 * time), network)
        problem = Exact([q, eps], [1 - 0.01 * time / 60, 0.1, 1.01, -0.05], Tensor.empty(shape, "int64"), last=last)
        problem.form, problem.inverse, problem.n, problem.m = "bdia", inverse, n, m
        problem.overflow = np.zeros(2, np.int64)
        if not unit:
            problem.info, problem.info_out = info, Tensor.empty(shape, "int64")
        problem.run(target)
        assert not problem.overflow.any()
        return problem.out, info if unit else problem.info_out

    for time in range(60):
        result, info = move(last, q, info, time, inverse=False)
        last, q = q, result
    assert np.any(info.values) != unit
    for time in reversed(range(60)):
        result, info = move(q, last, info, time, inverse=True)
        last, q = result, last
    assert np.array_equal(last.bits, first.bits)
    assert np.array_equal(q.bits, second.bits)
    assert not np.any(info.values)


GRIDS = [(1, 1, 1), (1, 1, 32), (2, 3, 7), (7, 1, 64), (64, 5, 256), (3, 2, 1024)]


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_any_grid(device: bicm_emulator.Device, grid: tuple[int, int, int], backwards: bool) -> None:
    device.x, device.y, device.threads = grid
    device.backwards = backwards
    for n, m in RATIOS[:3]:
        problem = bdia((4, 3, 67), "bfloat16", n, m)
        problem.out = problem.last
        check_exact(lambda p: p.run("cuda"), problem)


@pytest.mark.parametrize("target", bicm_emulator.instruction_sets())
def test_any_split_into_units(target: str) -> None:
    units = 3 * -(-4000 // bicm_emulator.CHUNK)
    rng = np.random.default_rng(1)
    for _ in range(4):
        cuts = [0, *sorted(rng.integers(0, units + 1, 4).tolist()), units]
        spans = list(pairwise(cuts))
        rng.shuffle(spans)
        problem = bdia((3, 4000), "float32", 9, 10)
        check_exact(lambda p, spans=spans: p.run(target, [tuple(span) for span in spans]), problem)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,), (2, 0, 3)])
def test_nothing_to_do(target: str, device: bicm_emulator.Device, shape: Shape) -> None:
    launches = device.launches
    problem = bdia(shape, "float32", 9, 10)
    problem.run(target)
    bicm_emulator.fixed_point_decode(target, Tensor.empty(shape, "float32").argument, problem.out.argument)
    assert device.launches == launches


def test_an_error_of_the_runtime_comes_back(device: bicm_emulator.Device) -> None:
    device.fails = True
    with pytest.raises(RuntimeError, match="returned an error"):
        bdia((1, 4), "float32", 1, 1).run("cuda")


def test_a_sample_does_not_know_its_batch(target: str) -> None:
    n = np.arange(9) + 1
    whole = bdia((9, 333), "float16", n, n[::-1].copy())
    whole.run(target)
    for b in (0, 4, 8):
        one = bdia((1, 333), "float16", b + 1, 9 - b)
        one.inputs = [Tensor(x.dtype, x.memory, x.bits[b : b + 1], x.touched) for x in whole.inputs]
        one.last, one.info = (Tensor(x.dtype, x.memory, x.bits[b : b + 1], x.touched) for x in (whole.last, whole.info))
        one.info_out = Tensor.empty((1, 333), "int64")
        one.run(target)
        for single, batch in zip(one.outputs, whole.outputs, strict=True):
            assert np.array_equal(single.bits[0], batch.bits[b])


def truncated(problem: Exact) -> None:
    """A planted fault: division towards zero, which an odd negative state does not survive."""
    problem.run("cuda")
    z, n, m = problem.last.values, problem.n, problem.m
    buffer = problem.info.values * m + np.fmod(z, m)
    problem.out.bits[...] = (((z - np.fmod(z, m)) // m * n + np.fmod(buffer, n)) + 1).view(np.uint64)


def unmarked(problem: Exact) -> None:
    problem.run("cuda")
    problem.overflow[...] = 0


def forgetful(problem: Exact) -> None:
    problem.run("cuda")
    problem.info_out.bits[...] = problem.info.bits


@pytest.mark.parametrize("fault", [truncated, unmarked, forgetful])
def test_faults_are_seen(fault: object) -> None:
    check_exact(lambda p: p.run(targets()[-1]), bdia((2, 400), "float32", 9, 10))
    with pytest.raises(AssertionError):
        check_exact(fault, bdia((2, 400), "float32", 9, 10))
