"""Compiling what an op would launch of a Triton kernel, for a GPU that need not be there, and reading the result.

A recorder stands in for a kernel, so that exactly what an op would launch is compiled, alignment included.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from bicm_kernels.triton_kernels import gaussian, multistep, noise, pseudo_huber, reversible

SM90 = GPUTarget("cuda", 90, 32)
KERNELS = {"multistep": multistep} | dict.fromkeys(("noise", "pair", "fold"), noise)
KERNELS |= dict.fromkeys(("sums", "gradients", "resident", "scale"), pseudo_huber)
KERNELS |= dict.fromkeys(("density_sums", "density_gradients"), gaussian)
KERNELS |= dict.fromkeys(("exact_step", "decode_fixed_point"), reversible)


class Recorder:
    """Takes a kernel's place and keeps the arguments of its launch."""

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self.launches.append((args, kwargs))


def specialized(name: str, call: Callable[[], object], target: GPUTarget = SM90) -> tuple[Any, list[Any]]:
    """The kernel `name`, and the options, signature and constants that a launch compiles it for."""
    kernel, recorders = getattr(KERNELS[name], name), {key: Recorder() for key in KERNELS}
    with pytest.MonkeyPatch.context() as patch:
        for key, module in KERNELS.items():
            patch.setattr(module, key, recorders[key])
        call()
    ((args, kwargs),) = recorders[name].launches
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*args, **kwargs)
    return kernel, list(kernel._pack_args(backend, kwargs, bound, specialization, options))


def compiled(name: str, call: Callable[[], object], target: GPUTarget = SM90) -> Any:
    """Compile what `call` would launch of the kernel `name`."""
    kernel, (options, *source) = specialized(name, call, target)
    return triton.compile(ASTSource(kernel, *source), target=target, options=options.__dict__)


def resources(binary: Any, folder: Path) -> dict[str, int]:
    """Registers, stack and local memory that ptxas gave a kernel."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", listing)}


def accesses(ptx: str) -> Counter[tuple[str, int]]:
    """How often a thread loads and stores how many bytes of global memory."""
    found = re.findall(r"\b(ld|st)\.global\.(?:cg\.)?(?:\w+::\w+\.)*(?:v(\d)\.)?b(\d+)", ptx)
    return Counter((kind, int(width or 1) * int(bits) // 8) for kind, width, bits in found)


def check_arithmetic(binary: Any) -> None:
    """Every product and sum rounds by itself, quotients and roots correctly; nothing is flushed to zero."""
    ptx = binary.asm["ptx"]
    for loose in (r"\bfma\.", r"\bmad\.\w*\.?f", r"\.approx", r"\.ftz", r"\bdiv\.full", r"\bcall\b"):
        assert not re.search(loose, ptx), loose


def check_resources(binary: Any, folder: Path, registers: int = 128, stack: int = 0) -> None:
    """Nothing spills but so many bytes, and enough threads fit on a multiprocessor."""
    used = resources(binary, folder)
    assert used["STACK"] <= stack
    assert used["LOCAL"] == 0
    assert used["REG"] <= registers


DOUBLE = re.compile(r"\b(?:add|mul|sub|div|sqrt|fma)\.\S*f64")


def element_loops(ptx: str) -> list[str]:
    """The stretches without a branch, in or out, that read 16 bytes at a time."""
    blocks = re.split(r"^\$L__BB\d+_\d+:|\bbra\b.*$", ptx, flags=re.MULTILINE)
    return [block for block in blocks if accesses(block)["ld", 16]]
