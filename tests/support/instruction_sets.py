"""The instruction sets of the CPU kernels, and which of them this processor has."""

from __future__ import annotations

import platform

import pytest
import torch

EVERY = ("scalar", "avx2", "avx512", "neon")
#: Those with which the native library draws torch's own numbers.
DRAW_LIKE_TORCH = ("avx2", "avx512")


def of_machine() -> tuple[str, ...]:
    """Those of this architecture, from the least to the best."""
    sets = {"x86_64": ("scalar", "avx2", "avx512"), "aarch64": ("scalar", "neon"), "arm64": ("scalar", "neon")}
    return sets.get(platform.machine(), ("scalar",))


def available() -> tuple[str, ...]:
    """Those of this processor."""
    sets = of_machine()
    if "avx2" not in sets:
        return sets
    return sets[: {"DEFAULT": 1, "AVX2": 2, "AVX512": 3}[torch.backends.cpu.get_cpu_capability()]]


def need(instructions: str) -> None:
    """Skip the test where this processor does not have them."""
    if instructions not in available():
        pytest.skip(f"this processor has no {instructions}")
