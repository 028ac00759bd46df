"""Philox: published vectors, every lane of every instruction set, and seeds for other purposes."""

import bicm_emulator
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from . import model
from .checks import check_known_answers, signed


def test_known_answers(target: str) -> None:
    check_known_answers(lambda seed, counters: bicm_emulator.philox(target, seed, counters))


def test_the_model_gives_the_known_answers() -> None:
    check_known_answers(lambda seed, counters: model.philox(counters, seed % 2**64))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 100])
def test_every_lane_has_its_own_counter(target: str, count: int) -> None:
    rng = np.random.default_rng(count)
    counters = rng.integers(0, 2**32, (count, 4), dtype=np.uint32)
    seed = int(rng.integers(0, 2**64, dtype=np.uint64))
    assert np.array_equal(bicm_emulator.philox(target, signed(seed), counters), model.philox(counters, seed))


SEEDS = st.integers(-(2**63), 2**63 - 1) | st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63), 2**32, 2**32 - 1])


@given(st.lists(st.tuples(SEEDS, SEEDS), min_size=1, max_size=5))
def test_fold_in(pairs: list[tuple[int, int]]) -> None:
    seed, data = (np.array(column, np.int64) for column in zip(*pairs, strict=True))
    out = np.empty(len(pairs), np.int64)
    bicm_emulator.fold_in(seed, data, out)
    assert out.tolist() == [model.fold_in(s % 2**64, d % 2**64) for s, d in pairs]
    bicm_emulator.fold_in(int(seed[0]), data, out)
    assert out.tolist() == [model.fold_in(int(seed[0]) % 2**64, d % 2**64) for _, d in pairs]


def test_fold_in_of_many_on_a_small_grid(device: bicm_emulator.Device) -> None:
    data = np.arange(1000, dtype=np.int64)
    expected = np.empty(1000, np.int64)
    bicm_emulator.fold_in(7, data, expected)
    device.x, device.threads = 3, 32
    out = np.empty(1000, np.int64)
    bicm_emulator.fold_in(7, data, out)
    assert np.array_equal(out, expected)
    assert len(set(out.tolist())) == 1000
    assert out.min() >= 0
