"""Registers, spills and widths of access of the Triton kernels, as its compiler reports them for GPUs that need not be
there."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget

from bicm_kernels.triton_kernels import operands
from tests.triton_cases import DENSE, EXACT, LOSSES
from tests.triton_compilation import accesses, compiled, resources

from .document import table

TARGETS = {f"sm_{number}": GPUTarget("cuda", number, 32) for number in (80, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
CALLS = {
    "`normal`": DENSE["normal float32"],
    "`ddim_step`": DENSE["ddim float32"],
    "`bdia_step`": DENSE["bdia float32"],
    "`bdia_step`, guided, bfloat16 network": DENSE["bdia guided mixed"],
    "`affine_step` of five": DENSE["affine of 5"],
    "`denoised_step`, with everything": DENSE["denoised float32"],
    "`scale_input`": DENSE["scale_input float32"],
    "`denoise`": DENSE["denoise float32"],
    "`renoise`": DENSE["renoise float32"],
    "`noisy_pair`": DENSE["noisy_pair float32"],
    "`pseudo_huber`": LOSSES["pseudo_huber vector float32"],
    "`pseudo_huber`, backward": LOSSES["pseudo_huber vector float32 backward"],
    "`consistency_loss`": LOSSES["consistency_loss vector float32"],
    "`consistency_loss`, backward": LOSSES["consistency_loss vector float32 backward"],
    "`bdia_exact_step`, ratio 1": EXACT["bdia unit torch.float32"],
    "`bdia_exact_step`, ratio 9/10": EXACT["bdia ratio torch.float32"],
}


def on_amd(binary: Any) -> tuple[int, int]:
    """Vector registers, and those spilled or bytes of scratch memory."""
    code = binary.asm["amdgcn"]
    counts = {key: int(value) for key, value in re.findall(r"\.(vgpr_count|vgpr_spill_count): +(\d+)", code)}
    return counts["vgpr_count"], counts["vgpr_spill_count"] + len(re.findall(r"\bscratch_", code))


def used(call: str, target: str) -> tuple[int, int]:
    """Registers, and whatever is in local memory."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        if target == "gfx942":
            patch.setattr(operands, "WARPS", 2)
        binary = compiled(*CALLS[call][:2], TARGETS[target])
        if target == "gfx942":
            return on_amd(binary)
        found = resources(binary, Path(folder))
        return found["REG"], found["STACK"] + found["LOCAL"]


def widest(call: str) -> int:
    """Bits of the widest access."""
    return 8 * max(size for _, size in accesses(compiled(*CALLS[call][:2]).asm["ptx"]))


def compiler() -> str:
    return f"Triton {triton.__version__}"


def of_triton() -> str:
    rows = []
    for call in CALLS:
        found = [used(call, target) for target in TARGETS]
        spilled = sum(count for _, count in found)
        rows.append([call, *(str(registers) for registers, _ in found), str(spilled), str(widest(call))])
    header = ["call, float32", *(f"registers on {target}" for target in TARGETS), "spills", "widest access, bits"]
    return table(header, rows)
