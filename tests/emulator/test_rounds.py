"""Threads that move several groups in one round: every group once, whatever the grid, and what is left one by one."""

from __future__ import annotations

import bicm_emulator
import numpy as np
import pytest

from .checks import check_step
from .losses import pseudo_huber
from .problems import affine, values
from .tensors import Tensor

SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
#: Blocks along a sample and along the batch, threads; with 48 threads there are no rounds.
GRIDS = [(1, 1, 32), (1, 2, 96), (2, 1, 64), (3, 3, 48)]
#: Groups of a row: none in a round, one round and all kinds of rests, several rounds; of 2, of 4 and of 24 groups.
GROUPS = [31, 33, 96, 97, 128, 160, 257, 500, 512, 1000, 1600, 2100]


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_steps(device: bicm_emulator.Device, grid: tuple[int, int, int], terms: int, guided: bool) -> None:
    device.x, device.y, device.threads = grid
    traffic = bicm_emulator.traffic
    for dtype, size in SIZES.items():
        for groups in GROUPS:
            shape = (2, groups * 16 // size)
            problem = affine(shape, dtype, dtype, terms)
            # Of every sample, so that the batch is not one long row.
            problem.coefficients = [Tensor.of(np.full(2, x), "float32") for x in problem.coefficients]
            if guided:
                problem.conditional, problem.guidance_scale = Tensor.of(values(9, shape), dtype), 3.0
            traffic.read = traffic.written = traffic.numbers = 0
            check_step(lambda p: p.run("cuda"), problem)
            bytes_of_tensor = 2 * groups * 16
            assert traffic.written == bytes_of_tensor
            assert traffic.read == bytes_of_tensor * (terms + guided)


@pytest.mark.parametrize("groups", GROUPS)
def test_a_row_that_ends_with_a_part_of_a_group(device: bicm_emulator.Device, groups: int) -> None:
    device.x, device.y, device.threads = 1, 1, 32
    for dtype, size in SIZES.items():
        check_step(lambda p: p.run("cuda"), affine((1, groups * 16 // size + 3), dtype, dtype, 3))


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_every_processor_has_work(device: bicm_emulator.Device, terms: int) -> None:
    """Where there are more groups than threads that run at a time: rounds do not leave processors without any."""
    device.processors, threads = 8, 8 * 4 * 256
    traffic = bicm_emulator.traffic
    for groups in [threads + 1, 2 * threads, 5 * threads, 9 * threads + 100, 40 * threads]:
        problem = affine((1, groups * 4), "float32", "float32", terms)
        written = []
        for block in range(8 * 4 * 8):  # blocks of 32 threads
            device.from_block, device.until_block = block, block + 1
            traffic.written = 0
            problem.run("cuda")
            written.append(traffic.written)
        assert sum(written) == groups * 16
        assert sum(bytes_of_block > 0 for bytes_of_block in written) >= device.processors, groups
        assert max(written) <= 3 * groups * 16 / (8 * 4) + 24 * 16 * 256, groups


@pytest.mark.parametrize("terms", [1, 2, 3])
@pytest.mark.parametrize("groups", [31, 96, 768, 5000])
def test_short_rows_have_threads_enough(device: bicm_emulator.Device, groups: int, terms: int) -> None:
    device.processors, threads = 8, 8 * 4 * 256
    for rows in (1, 40, 300):
        problem = affine((rows, groups * 4), "float32", "float32", terms)
        problem.coefficients = [Tensor.of(np.full(rows, x), "float32") for x in problem.coefficients]
        check_step(lambda p: p.run("cuda"), problem)
        assert device.threads_of_grid >= min(rows * groups, threads) / 4


@pytest.mark.parametrize("kind", ["vector", "squared", "elementwise"])
def test_gradients(device: bicm_emulator.Device, kind: str) -> None:
    """With a thread for every group, and with a block for all of them, which are as many threads as a chunk has."""
    traffic = bicm_emulator.traffic
    for dtype, size in SIZES.items():
        for groups in (700, 1000, 1024, 1300, 3000, 4096):
            problem = pseudo_huber((2, groups * 16 // size), dtype, dtype, kind=kind)
            _, sums = problem.run("cuda")
            device.x = 64
            expected = problem.differentiate("cuda", sums, 3.0, [True, True])
            for x in (1, 2):
                device.x = x
                traffic.read = traffic.written = 0
                actual = problem.differentiate("cuda", sums, 3.0, [True, True])
                assert traffic.read == traffic.written == 2 * 2 * groups * 16
                for a, b in zip(actual, expected, strict=True):
                    assert np.array_equal(a.bits, b.bits)
            device.x = 0
