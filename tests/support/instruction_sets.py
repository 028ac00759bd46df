"""The instruction sets of the CPU kernels, and which of them this processor has."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

EVERY = ("scalar", "avx2", "avx512", "avx512bf16", "neon")
#: Those with which the native library draws torch's own numbers.
DRAW_LIKE_TORCH = ("avx2", "avx512", "avx512bf16")


def of_machine() -> tuple[str, ...]:
    """Those of this architecture, from the least to the best."""
    arm = ("scalar", "neon")
    sets = {"x86_64": ("scalar", "avx2", "avx512", "avx512bf16"), "aarch64": arm, "arm64": arm}
    return sets.get(platform.machine(), ("scalar",))


def available() -> tuple[str, ...]:
    """Those of this processor."""
    sets = of_machine()
    if "avx2" not in sets:
        return sets
    found = sets[: {"DEFAULT": 1, "AVX2": 2, "AVX512": 4}[torch.backends.cpu.get_cpu_capability()]]
    flags = Path("/proc/cpuinfo").read_text().split()
    return tuple(name for name in found if name != "avx512bf16" or "avx512_bf16" in flags)


def need(instructions: str) -> None:
    """Skip the test where this processor does not have them."""
    if instructions not in available():
        pytest.skip(f"this processor has no {instructions}")
