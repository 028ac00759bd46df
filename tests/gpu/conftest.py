"""Tests that need a GPU; without one they are skipped, and `make gpu-check` says that nothing was checked."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(params=["native", "triton"])
def gpu_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test on the CUDA library, and again on Triton's kernels."""
    from bicm_kernels import backend

    if request.param == "triton":
        pytest.importorskip("triton")
    with backend.use(request.param):
        assert backend.running("cuda") == request.param, backend.describe()
        yield request.param


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    """Whatever waits for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")
