"""The emulator's blocks: barriers, shuffles, votes and shared memory work, and their misuse is reported."""

from __future__ import annotations

import bicm_emulator
import numpy as np
import pytest


def run(name: str, threads: int = 256, blocks: int = 1, synchronises: bool = True) -> np.ndarray:
    out = np.zeros(threads, np.float32)
    bicm_emulator.cooperate(name, given(threads), out, blocks, synchronises)
    return out


def given(threads: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(threads).astype(np.float32)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("threads", [32, 64, 96, 256])
def test_sums_of_a_block(device: bicm_emulator.Device, threads: int, backwards: bool) -> None:
    device.backwards = backwards
    out = run("block_sum", threads, blocks=3)
    assert out[0] == np.float32(given(threads).astype(np.float64).sum())


@pytest.mark.parametrize("backwards", [False, True])
def test_shared_memory(device: bicm_emulator.Device, backwards: bool) -> None:
    device.backwards = backwards
    assert np.array_equal(run("reverse", 100, blocks=4), given(100)[::-1])


def test_votes() -> None:
    out = run("votes", 64)
    for warp in (slice(0, 32), slice(32, 64)):
        count = int((given(64)[warp] > 0).sum())
        assert set(out[warp].tolist()) == {4.0 * count + (count > 0) + 2 * (count == 32)}


FAULTS = {
    "missing_barrier": "race: thread .* between the same barriers|read before it is written",
    "barrier_of_some": "deadlock: .*thread 1 has ended",
    "barriers_apart": r"deadlock: .*waits at the barrier cooperation.cpp:\d+, thread 1 waits at the barrier",
    "uninitialised": "read before it is written",
    "all_write": "race: .* writes what another thread writes",
    "absent_lanes": "deadlock: ",
    "missing_lane": "a lane is not in its own mask|the partner is no lane",
    "one_too_far": "a load outside every tensor",
}


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_reported(device: bicm_emulator.Device, fault: str, backwards: bool) -> None:
    device.backwards = backwards
    with pytest.raises((RuntimeError, IndexError), match=FAULTS[fault]):
        run(fault, 64)
    assert np.array_equal(run("reverse", 100), given(100)[::-1])  # the next launch starts afresh


@pytest.mark.parametrize("name", ["reverse", "votes", "block_sum"])
def test_a_kernel_that_waits_must_say_so(name: str) -> None:
    with pytest.raises(RuntimeError, match="launched as one that never waits"):
        run(name, 64, synchronises=False)


def test_threads_that_never_wait_may_be_calls() -> None:
    with pytest.raises(IndexError, match="outside every tensor"):
        run("one_too_far", 64, synchronises=False)
