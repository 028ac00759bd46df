"""The functions of `bicm_kernels.inputs` in both of their implementations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from bicm_kernels import backend, inputs

WAYS = ("native", "python")


def functions_of(way: str) -> Any:
    """The native library's functions, or their Python twins."""
    if way == "python":
        return SimpleNamespace(**inputs.TWINS)
    if not hasattr(backend.library, "place_in"):
        pytest.skip("the native library is not loaded")
    return backend.library
