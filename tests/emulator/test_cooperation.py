"""The emulator's blocks and clusters: what their threads do together works, and its misuse is reported."""

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


BLOCKS = 4


def run_cluster(name: str, blocks: int = BLOCKS, cluster: int = BLOCKS, threads: int = 32) -> np.ndarray:
    out = np.zeros(blocks * threads, np.float32)
    bicm_emulator.cooperate(name, given(blocks * threads), out, blocks, cluster=cluster)
    return out


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("cluster", [2, 4, 8])
def test_sums_of_a_cluster(device: bicm_emulator.Device, cluster: int, backwards: bool) -> None:
    device.backwards = backwards
    blocks = 3 * cluster
    numbers = given(blocks * 32)[::32].astype(np.float64).reshape(3, cluster)
    expected = np.zeros(3)
    for rank in range(cluster):
        expected = expected + numbers[:, rank]
    out = run_cluster("cluster_sum", blocks, cluster)[::32].reshape(3, cluster)
    assert np.array_equal(out, np.repeat(expected.astype(np.float32)[:, None], cluster, axis=1))


def test_another_block_s_memory() -> None:
    assert np.array_equal(run_cluster("next_block")[:BLOCKS], np.roll(given(BLOCKS * 32)[:BLOCKS], -1))


CLUSTER_FAULTS = {
    "no_barrier": "race: .* another block|read before it is written",
    "no_last_barrier": "race: .* another block|a block that has ended",
    "overwritten": "race: .* another block",
    "peer_too_far": "a block that the cluster does not have",
    "of_some": "race: .* another block|read before it is written|deadlock: .*waits for its cluster",
    "no_wait": "arrives at a cluster's barrier and ends without waiting",
    "no_arrival": "waits for a cluster and has not arrived",
    "twice": "arrives twice and has not waited",
}


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("fault", CLUSTER_FAULTS)
def test_faults_of_clusters_are_reported(device: bicm_emulator.Device, fault: str, backwards: bool) -> None:
    device.backwards = backwards
    with pytest.raises((RuntimeError, IndexError), match=CLUSTER_FAULTS[fault]):
        run_cluster(fault, *((2, 2) if fault == "overwritten" else ()))
    assert np.array_equal(run("reverse", 100), given(100)[::-1])  # the next launch starts afresh


@pytest.mark.parametrize(("blocks", "cluster", "threads"), [(16, 16, 32), (3, 2, 32)])
def test_clusters_that_no_gpu_starts(blocks: int, cluster: int, threads: int) -> None:
    with pytest.raises(RuntimeError, match="the launch returned an error"):
        run_cluster("next_block", blocks, cluster, threads)
