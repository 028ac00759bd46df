"""What a batch shares is formed once; sums of many chunks are added in a tree that depends on their number alone."""

from __future__ import annotations

import bicm_emulator
import numpy as np
import pytest

from .checks import check_step
from .losses import pseudo_huber
from .problems import NOISE, affine, denoised
from .tensors import Tensor

CHUNK, SERIAL = 8192, 32


def tree(sums: list[float]) -> float:
    """At most 32 numbers are added one after another."""
    while len(sums) > SERIAL:
        sums = [tree(sums[first : first + SERIAL]) for first in range(0, len(sums), SERIAL)]
    total = 0.0
    for x in sums:
        total += x
    return total


@pytest.mark.parametrize("chunks", [32, 33, 70])
def test_sums_of_many_chunks(device: bicm_emulator.Device, chunks: int) -> None:
    """2^54, then ones, which it absorbs one by one, but not 32 at a time."""
    problem = pseudo_huber((1, chunks * CHUNK), kind="squared", reduction="none")
    for x in problem.inputs:
        x.bits[...] = 0
    residuals = problem.prediction.bits.view("float32")
    residuals[0, ::CHUNK] = 1.0
    residuals[0, 0] = 2.0**27
    expected = tree([2.0**54] + [1.0] * (chunks - 1))
    assert (expected > 2.0**54) == (chunks == 70)
    for processors, backwards in ((1, False), (3, True), (132, False)):
        device.processors, device.backwards = processors, backwards
        loss, sums = problem.run("cuda")
        assert sums[0] == expected
        assert loss[0] == np.float32(expected)


SIZES = [*(1, 2, 3, 5, 7, 64, 100, 641), *(2**15 + d for d in (-1, 0, 1)), *(2**30 + d for d in (-1, 0, 1)), 2**31 - 1]


@pytest.mark.parametrize("size", SIZES)
def test_quotients_by_reciprocals(size: int) -> None:
    last = 2**31 - 1
    positions = {0, 1, last - 1, last, *np.random.default_rng(size).integers(0, 2**31, 200).tolist()}
    for multiple in (1, 2, 3, last // size // 2, last // size):
        positions |= {multiple * size + d for d in (-1, 0, 1)}
    for position in positions:
        if 0 <= position <= last:
            assert bicm_emulator.quotient(position, size) == divmod(position, size)


def numbers(value: float, kind: str, batch: int) -> float | Tensor:
    if kind == "float":
        return value
    return Tensor.of(np.asarray(value if kind == "shared" else value * np.linspace(0.9, 1.1, batch)), "float32")


@pytest.mark.parametrize("grid", [(0, 0, 0), (1, 1, 32), (2, 3, 64)], ids=str)
@pytest.mark.parametrize("kinds", ["float", "shared", "each", "shared each", "float shared"])
def test_weights_are_formed_where_their_numbers_are(
    device: bicm_emulator.Device, kinds: str, grid: tuple[int, int, int]
) -> None:
    """On the host, once by a block, or for every sample: with a block for several samples, which share no odd row."""
    device.x, device.y, device.threads = grid
    batch, kind = 5, kinds.split()
    for problem in (affine((batch, 67), "bfloat16", "bfloat16", 3, "bdia"), denoised((batch, 67))):
        problem.coefficients = [numbers(x, kind[k % len(kind)], batch) for k, x in enumerate(problem.coefficients)]
        check_step(lambda p: p.run("cuda"), problem)


@pytest.mark.parametrize("name", [None, *NOISE])
def test_keys_that_samples_share_or_not(device: bicm_emulator.Device, name: str | None) -> None:
    """A block that draws for several samples reads again what differs between them."""
    device.x, device.y, device.threads = 1, 2, 32
    for dtype in ("float32", "bfloat16"):
        problem = affine((7, 67), dtype, dtype, 1)
        problem.noise_weight, problem.key = 0.3, dict(NOISE)
        if name is not None:
            problem.key[name] = np.arange(7) * 3 + NOISE[name]
        check_step(lambda p: p.run("cuda"), problem)
