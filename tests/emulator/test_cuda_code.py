"""What nvcc makes of the CUDA kernels, without a GPU: rounding as written, registers only, wide accesses."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import bicm_emulator
import pytest

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
ARITHMETIC = "fma|mad|mul|add|sub|div|sqrt|rcp|rsqrt|ex2|lg2|sin|cos"

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed"),
    pytest.mark.skipif(bicm_emulator.SANITIZED, reason="compiles the same files as the ordinary run"),
]


@dataclass
class Code:
    """A family's kernels, compiled for sm_90."""

    ptx: str
    cubin: Path
    statistics: str


@pytest.fixture(scope="module", params=["noise", "multistep"])
def code(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Code:
    folder = tmp_path_factory.mktemp("cuda")
    cubin = folder / "kernels.cubin"
    command = ["nvcc", "-arch=sm_90", "--fmad=false", "-O3", "-std=c++17", "-Xptxas", "-v"]
    command += ["--keep", "--keep-dir", folder, "-cubin", SOURCES / f"{request.param}.cu", "-o", cubin]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Code((folder / f"{request.param}.ptx").read_text(), cubin, done.stderr)


def test_no_operation_is_contracted_or_approximate(code: Code) -> None:
    """ptxas never fuses operations that name their rounding, and takes no short cut for their quotients."""
    operation = rf"^\s+(?:@!?%p\d+ )?((?:{ARITHMETIC})\.[\w.]*f(?:16|32|64)\w*)"
    found = Counter(re.findall(operation, code.ptx, re.MULTILINE))
    assert found
    rounded = re.compile(r"(mul|add|sub|div|sqrt|rcp)\.rn\.f(32|64)")
    assert [name for name in found if not rounded.fullmatch(name)] == []


def test_registers_only(code: Code) -> None:
    usage = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    assert set(re.findall(usage, code.statistics)) == {("0", "0", "0")}


def disassembler() -> str | None:
    """Triton's wheel carries one."""
    triton = importlib.util.find_spec("triton")
    folders = triton.submodule_search_locations if triton else None
    tool = Path(folders[0]) / "backends/nvidia/bin/cuobjdump" if folders else None
    return str(tool) if tool and tool.exists() else shutil.which("cuobjdump")


@pytest.mark.skipif(disassembler() is None, reason="neither Triton's nor the toolkit's cuobjdump is there")
def test_aligned_groups_move_128_bits_at_a_time(code: Code) -> None:
    """One access per operand and 16 bytes of its group, no more and no narrower; no local memory."""
    done = subprocess.run([disassembler(), "-sass", code.cubin], capture_output=True, text=True, check=True)
    kernels = done.stdout.split("Function : ")[1:]
    dense = 0
    for kernel in kernels:
        packed = re.search(r"6PackedI(d|f|NS0_\w+?E)EE?L(?:i(\d)ELb(\d)|NS_12Distribution)", kernel)
        if packed is None:
            continue
        loads, stores = (int(packed[2]) + 1, 1 + 2 * int(packed[3])) if packed[2] else (0, 1)
        width = 2 if packed[1] == "d" else 1
        found = Counter(re.findall(r"\b(?:(?:LDG|STG)\.E\.128|LDL|STL)\b", kernel))
        expected = {"LDG.E.128": loads * width, "STG.E.128": stores * width}
        assert found == {name: count for name, count in expected.items() if count}
        dense += 1
    assert dense in (8, 40)
