"""Sampler updates: whatever the memory, however the work is split, the NumPy model's bits and no others."""

from __future__ import annotations

from itertools import pairwise

import bicm_emulator
import numpy as np
import pytest

from .checks import check_step, targets
from .problems import NOISE, PAIRS, affine, denoised, states, values
from .tensors import DTYPES, INPUT_LAYOUTS, LAYOUTS, Tensor, far

SHAPES = [(2, 3, 5, 7), (3, 4, 16), (1, 129), (4, 1), (5,), (2, 1, 9, 1), (2, 2, 3, 2, 3, 2, 3)]


@pytest.mark.parametrize("layout", INPUT_LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layouts_of_inputs(target: str, shape: tuple[int, ...], layout: str) -> None:
    for state, network in PAIRS:
        for merge in (True, False):
            problem = affine(shape, state, network, 3)
            problem.inputs = [
                problem.inputs[0],
                Tensor.of(values(5, shape), state, layout),
                Tensor.of(values(6, shape), network, layout, offset=1),
            ]
            problem.noise_weight, problem.key, problem.merge = 0.3, NOISE, merge
            check_step(lambda p: p.run(target), problem)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layouts_of_outputs(target: str, shape: tuple[int, ...], layout: str) -> None:
    for state in DTYPES:
        for streams in (False, True):
            problem = denoised(shape, state, state)
            for name in ("out", "x0", "next"):
                setattr(problem, name, Tensor.empty(shape, state, layout, offset=streams))
            problem.streams = streams
            check_step(lambda p: p.run(target), problem)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_dtype_of_the_output(target: str, dtype: str) -> None:
    for state, network in PAIRS:
        problem = affine((3, 130), state, network)
        problem.out = Tensor.empty((3, 130), dtype)
        check_step(lambda p: p.run(target), problem)


@pytest.mark.parametrize("float64", [False, True])
def test_any_compute_type(target: str, float64: bool) -> None:
    for dtype in DTYPES:
        problem = denoised((3, 130), dtype, dtype)
        problem.float64 = float64
        check_step(lambda p: p.run(target), problem)


@pytest.mark.parametrize("offset", [1, 2, 3, 4, 5])
def test_unaligned_tensors(target: str, offset: int) -> None:
    """Every operand alone, and all of them, away from a multiple of 16 bytes."""
    shape = (3, 1030)
    for state, network in PAIRS:
        for odd in (0, 1, 2, None):
            problem = affine(shape, state, network)
            offsets = [offset if odd in (k, None) else 0 for k in range(3)]
            problem.inputs = [
                Tensor.of(values(k, shape), dtype, offset=offsets[k]) for k, dtype in enumerate((state, network))
            ]
            problem.out = Tensor.empty(shape, state, offset=offsets[2])
            problem.streams = odd is None
            check_step(lambda p: p.run(target), problem)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_may_replace_inputs(target: str, dtype: str, layout: str) -> None:
    shape = (2, 5, 211)
    for streams in (False, True):
        for place in range(3):
            problem = affine(shape, dtype, dtype, 3, "bdia")
            problem.inputs = states(shape, 3, dtype, dtype, layout)
            problem.out, problem.streams = problem.inputs[place], streams
            check_step(lambda p: p.run(target), problem)
        problem = affine(shape, dtype, dtype)
        problem.inputs = states(shape, 2, dtype, dtype, layout)
        problem.conditional = Tensor.of(values(7, shape), dtype, layout)
        problem.guidance_scale, problem.out, problem.streams = 3.0, problem.conditional, streams
        check_step(lambda p: p.run(target), problem)
        problem = denoised(shape, dtype, dtype, 3)
        problem.inputs = states(shape, 3, dtype, dtype, layout)
        problem.x0, problem.next, problem.out = problem.inputs
        problem.streams = streams
        check_step(lambda p: p.run(target), problem)


@pytest.mark.parametrize("target", bicm_emulator.instruction_sets())
def test_any_split_into_units(target: str) -> None:
    units = 3 * -(-4000 // bicm_emulator.CHUNK)
    rng = np.random.default_rng(1)
    for _ in range(10):
        cuts = [0, *sorted(rng.integers(0, units + 1, 4).tolist()), units]
        spans = list(pairwise(cuts))
        rng.shuffle(spans)
        problem = denoised((3, 4000), "float32", "bfloat16")
        check_step(lambda p, spans=spans: p.run(target, [tuple(span) for span in spans]), problem)


GRIDS = [(1, 1, 1), (1, 1, 32), (2, 3, 7), (7, 1, 64), (1, 9, 33), (64, 5, 256), (3, 2, 1024)]


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_any_grid(device: bicm_emulator.Device, grid: tuple[int, int, int], backwards: bool) -> None:
    device.x, device.y, device.threads = grid
    device.backwards = backwards
    for state, network in PAIRS:
        problem = denoised((4, 3, 67), state, network)
        problem.out = problem.inputs[0]
        check_step(lambda p: p.run("cuda"), problem)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,), (2, 0, 3)])
def test_nothing_to_do(target: str, device: bicm_emulator.Device, shape: tuple[int, ...]) -> None:
    launches = device.launches
    denoised(shape).run(target)
    assert device.launches == launches


def test_an_error_of_the_runtime_comes_back(device: bicm_emulator.Device) -> None:
    device.fails = True
    with pytest.raises(RuntimeError, match="returned an error"):
        affine((1, 4)).run("cuda")


def test_one_launch_per_step(device: bicm_emulator.Device) -> None:
    launches = device.launches
    denoised((3, 1000), "float32", "float16").run("cuda")
    assert device.launches == launches + 1


@pytest.mark.parametrize("target", targets())
def test_addresses_beyond_32_bits(target: str, device: bicm_emulator.Device) -> None:
    rows = [values(k, (1024,)).astype(np.float32) for k in range(2)]
    out = np.zeros(1024, np.float32)
    device.x, device.threads = 2**23, 256
    first = 2**32 + 1024 * 5
    device.from_block = first // 1024
    device.until_block = device.from_block + 1
    unit = (first // bicm_emulator.CHUNK, (first + 1024) // bicm_emulator.CHUNK)
    far_out, *far_rows = (far(row, first) for row in (out, *rows))
    bicm_emulator.multistep(target, far_out, far_rows, [0.5, 0.25], units=[unit])
    assert np.array_equal(out, np.float32(0.5) * rows[0] + np.float32(0.25) * rows[1])
