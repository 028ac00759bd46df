"""Calls past the dispatcher on GPUs that are not there: what is launched where, and what is left to the dispatcher."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from bicm_kernels import backend
from tests.support import gpu_hand_over, gpu_losses  # noqa: F401  they add theirs
from tests.support.gpu_checks import CHECKS

PROGRAM = """
from pathlib import Path
from benchmarks.fake_gpu import FakeGpus
gpus = FakeGpus(Path.cwd())
from tests.support import gpu_hand_over, gpu_losses
from tests.support.gpu_checks import CHECKS
CHECKS[{name!r}](gpus)
"""


@pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler")
@pytest.mark.parametrize("name", CHECKS)
def test_on_a_fake_gpu(name: str, python: Callable[..., Any]) -> None:
    python(PROGRAM.format(name=name), BICM_KERNELS_BACKEND="native", BICM_KERNELS_DIRECT=None)


def test_a_torch_without_gpus_takes_no_launchers() -> None:
    assert backend.library.use_launchers(backend.library.host_launchers()) is False
