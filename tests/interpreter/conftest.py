"""The Triton kernels in Triton's interpreter, on CPU tensors: a process of its own, see CONTRIBUTING.md."""

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError(
            "Triton decides at import whether kernels are interpreted. Run these tests as "
            "TRITON_INTERPRET=1 BICM_KERNELS_BACKEND=reference pytest tests/interpreter"
        )
