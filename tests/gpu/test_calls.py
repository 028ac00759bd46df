"""The calls of the GPU's tests, on the CPU: what cannot run there would otherwise first fail on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from calls import CALLS, DTYPES, EXACT, states
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
