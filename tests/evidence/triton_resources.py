"""Registers, spills and widths of access of every variant of the Triton kernels, as its compilers report them for GPUs
that need not be there."""

from __future__ import annotations

import multiprocessing
import os
import re
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget

from bicm_kernels.triton_kernels import operands
from tests.support.triton_cases import DENSE, EXACT, LOSSES, OTHERS, RESIDENTS
from tests.support.triton_compilation import accesses, compiled, resources

from .document import table
from .resources import span

TARGETS = {f"sm_{number}": GPUTarget("cuda", number, 32) for number in (80, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
#: Kernel and call; dense tensors first, where every access should be wide.
CASES = {name: (case[0], case[1]) for cases in (DENSE, LOSSES, RESIDENTS, EXACT) for name, case in cases.items()}
CASES |= {f"other: {name}": case for name, case in OTHERS.items()}


@dataclass(frozen=True)
class Used:
    """By one variant on one target: registers, what is in local memory, bits of the widest access (0: not asked)."""

    registers: int
    spilled: int
    widest: int


def title(name: str) -> str:
    name = name if name in CASES else f"other: {name}"
    return f"`{CASES[name][0]}`, " + ("other layouts and arguments" if name.startswith("other: ") else "dense")


def on_amd(binary: Any) -> Used:
    code = binary.asm["amdgcn"]
    counts = {key: int(value) for key, value in re.findall(r"\.(vgpr_count|vgpr_spill_count): +(\d+)", code)}
    return Used(counts["vgpr_count"], counts["vgpr_spill_count"] + len(re.findall(r"\bscratch_", code)), 0)


def used(name: str, target: str) -> Used:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setenv("TRITON_CACHE_DIR", folder)
        if target == "gfx942":
            patch.setattr(operands, "WARPS", 2)
        binary = compiled(*CASES[name], TARGETS[target])
        if target == "gfx942":
            return on_amd(binary)
        found = resources(binary, Path(folder))
        widest = 8 * max(size for _, size in accesses(binary.asm["ptx"]))
        return Used(found["REG"], found["STACK"] + found["LOCAL"], widest)


def compiler() -> str:
    return f"Triton {triton.__version__}"


def _used(job: tuple[str, str]) -> Used:
    return used(*job)


def of_triton() -> str:
    """Every variant that the tests compile, for every target: by kernel."""
    jobs = list(product(CASES, TARGETS))
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        found = dict(zip(jobs, pool.map(_used, jobs, chunksize=8), strict=True))
    kernels: dict[str, list[str]] = defaultdict(list)
    for name in CASES:
        kernels[title(name)].append(name)
    rows = [
        [
            kernel,
            str(len(names)),
            *(span([found[name, target].registers for name in names]) for target in TARGETS),
            str(max(found[name, target].spilled for name in names for target in TARGETS)),
            span([found[name, "sm_90"].widest for name in names]),
        ]
        for kernel, names in sorted(kernels.items())
    ]
    header = ["kernel, tensors", "variants", *(f"registers on {target}" for target in TARGETS)]
    return table([*header, "stack and spills, bytes", "widest access, bits"], rows)
