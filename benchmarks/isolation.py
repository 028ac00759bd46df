"""A process for every op, because an allocator's speed depends on what the process freed before."""

from __future__ import annotations

import ctypes
import math
import platform
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from benchmarks.cases import Shape
from benchmarks.measurement import Measurement, measure_together
from benchmarks.registry import FAMILIES

#: mallopt's numbers in glibc.
TRIM_THRESHOLD, MAPPED_BLOCKS = -1, -4


def keep_memory() -> None:
    """Make the C library keep freed memory of any size, as allocators that people preload do.

    By default it returns large blocks at once until a larger one was freed, and those above 32 MiB always. Another C
    library than glibc keeps its own rules.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MAPPED_BLOCKS, 0)
        mallopt(TRIM_THRESHOLD, -1)
    torch.empty(31 << 20, dtype=torch.uint8)


def measure_shapes(
    family: str, name: str, shapes: Sequence[Shape], dtype: str, keeps_memory: bool, options: dict[str, Any]
) -> list[Measurement]:
    """Measure a case at every shape, the smallest first."""
    if keeps_memory:
        keep_memory()
    case = next(case for case in FAMILIES[family] if case.name == name)
    return [
        measurement
        for shape in sorted(shapes, key=math.prod)
        for measurement in measure_together(family, case, shape, dtype, **options)
    ]


def measure_apart(
    family: str, name: str, shapes: Sequence[Shape], dtype: str, *, keeps_memory: bool, **options: Any
) -> list[Measurement]:
    """The same in a new process, so that figures do not depend on which cases ran before.

    The C library adapts to the blocks that a process frees: after a few large ones it keeps memory that it returned
    to the system before, and eager PyTorch with its many temporaries becomes up to twice as fast.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure_shapes, family, name, shapes, dtype, keeps_memory, options).result()
