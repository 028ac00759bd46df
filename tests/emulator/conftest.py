"""Kernels without torch, so that the sanitizers can watch: CPU by instruction set, CUDA on the host."""

import os
import sys
from collections.abc import Iterator

import pytest

if "BICM_EMULATOR_PATH" in os.environ:
    sys.path.insert(0, os.environ["BICM_EMULATOR_PATH"])

import bicm_emulator

DEFAULTS = {
    name: getattr(bicm_emulator.device, name)
    for name in (
        *("processors", "x", "y", "threads", "from_block", "until_block", "backwards", "fails", "has_clusters"),
        *("skips_barriers", "skips_cluster_barriers", "mistakes_peer", "captures", "full", "stream"),
    )
}


@pytest.fixture
def device() -> Iterator[bicm_emulator.Device]:
    """The imitated GPU, for tests that change how it runs kernels."""
    yield bicm_emulator.device
    for name, value in DEFAULTS.items():
        setattr(bicm_emulator.device, name, value)


@pytest.fixture(params=[*bicm_emulator.instruction_sets(), "cuda"])
def target(request: pytest.FixtureRequest) -> str:
    """An instruction set of this processor, or the emulated CUDA kernels."""
    return request.param
