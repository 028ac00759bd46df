"""The calls of the GPU's tests, on the CPU: what cannot run there would otherwise first fail on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from calls import CALLS, DTYPES, EXACT, NOT_DIRECT, some_op_took, states
from loops import LOOPS, ROUND_TRIPS, opened, start
from torch import Tensor

from bicm_kernels import backend


@pytest.mark.parametrize("name", CALLS)
def test_every_call_runs(same_bits: Callable[[Tensor, Tensor], None], name: str) -> None:
    for dtypes in DTYPES.values():
        inputs = states((3, 67), dtypes, "cpu")
        results = CALLS[name](inputs)
        assert results
        with backend.use("reference"):
            expected = CALLS[name](inputs)
        for actual, wanted in zip(results, expected, strict=True):
            if name in EXACT:
                same_bits(actual, wanted)
            else:
                assert torch.allclose(actual.double(), wanted.double(), rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_what_is_direct(taken: list[tuple[str, bool]], name: str) -> None:
    """On GPUs the same calls are, under BICM_KERNELS_DIRECT=cuda."""
    for dtypes in DTYPES.values():
        taken.clear()
        CALLS[name](states((3, 67), dtypes, "cpu"))
        assert some_op_took(taken) == (name not in NOT_DIRECT)


@pytest.mark.filterwarnings("ignore::bicm_diffusion.InexactInversionWarning")
@pytest.mark.parametrize("name", LOOPS)
def test_every_loop_runs(same_bits: Callable[[Tensor, Tensor], None], name: str) -> None:
    results = opened(LOOPS[name](start("cpu")))
    with backend.use("reference"):
        expected = opened(LOOPS[name](start("cpu")))
    for actual, wanted in zip(results, expected, strict=True):
        same_bits(actual, wanted)


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_every_round_trip_ends_where_it_began(same_bits: Callable[[Tensor, Tensor], None], name: str) -> None:
    there, back = ROUND_TRIPS[name]
    pair = back(there(start("cpu")))
    same_bits(pair.z, start("cpu"))
    assert not pair.info.any()
