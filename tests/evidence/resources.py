"""Registers, spills and widths of access of the CUDA kernels, from the library as it was built."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .document import table

LIBRARY = Path(__file__).parents[2] / "bicm_kernels" / "_C_cuda.so"
MEMORY = {
    "PackedIfE": "float32",
    "PackedIdE": "float64",
    "4HalfE": "float16",
    "BFloat16E": "bfloat16",
    "5MixedE": "float32 and halves",
    "StridedI": "any strides",
    "DenseFixedE": "integers",
    "StridedFixedE": "integers, any strides",
}


def tool(name: str) -> str | None:
    """A binary tool: Triton's wheel carries them, and so may the toolkit."""
    triton = importlib.util.find_spec("triton")
    folders = triton.submodule_search_locations if triton else None
    path = Path(folders[0]) / "backends/nvidia/bin" / name if folders else None
    return str(path) if path and path.exists() else shutil.which(name)


def output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@dataclass
class Usage:
    """What the variants of a kernel use: registers by architecture, and whatever would be in local memory."""

    registers: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    spilled: int = 0
    shared: int = 0


NAMES = "|".join(
    [
        *("generated_pair", "noisy_pair", "noise", "fold_in", "multistep", "weighed_gradient", "weighed_sums"),
        *(
            "gaussian_gradient",
            "gaussian",
            "pseudo_huber",
            "gradient",
            "resident",
            "cluster",
            "scale",
            "reversible",
            "fixed_point_decode",
        ),
    ]
)


def kernel_of(name: str) -> str:
    """What a mangled name says: the kernel, and the memory that it is made for."""
    kernel = re.search(rf"\d({NAMES})_kernel", name)
    assert kernel is not None, name
    memory = next((title for key, title in MEMORY.items() if key in name), "")
    return f"`{kernel[1]}`" + (f", {memory}" if memory else "")


def reported(listing: str) -> dict[str, Usage]:
    """By kernel, from `cuobjdump --dump-resource-usage` of a library."""
    found: dict[str, Usage] = {}
    architecture = ""
    for line in listing.splitlines():
        if match := re.search(r"arch = (sm_\d+)", line):
            architecture = match[1]
        elif match := re.search(r"Function (\w+):", line):
            usage = found.setdefault(kernel_of(match[1]), Usage())
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            usage.registers[architecture].append(registers)
            usage.spilled += stack + local
            usage.shared = max(usage.shared, shared)
    return found


def span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def accesses(disassembly: str) -> dict[str, set[int]]:
    """Bits of the widest global load and store of each variant, by kernel."""
    found: dict[str, set[int]] = defaultdict(set)
    for part in disassembly.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        widths = [int(bits) for bits in re.findall(r"\b(?:LDG|STG)\.E(?:\.\w+)*?\.(64|128)\b", body)]
        found[kernel_of(name)].add(max(widths, default=32))
    return found


def usage_of_library() -> dict[str, Usage]:
    return reported(output(str(tool("cuobjdump")), "--dump-resource-usage", LIBRARY))


def compiler() -> str:
    """Which nvcc is here."""
    release = re.search(r"release [\d.]+, V([\d.]+)", output("nvcc", "--version")) if shutil.which("nvcc") else None
    return f"nvcc {release[1]}" if release else "no nvcc"


def of_cuda() -> str:
    """Every kernel of the CUDA library that was built."""
    usage = usage_of_library()
    architectures = sorted({x for u in usage.values() for x in u.registers}, key=lambda x: int(x[3:]))
    assert len(architectures) > 1, "the library was built for one architecture alone"
    widths = accesses(output(str(tool("cuobjdump")), "-sass", "-arch", architectures[-1], LIBRARY))
    rows = [
        [
            kernel,
            str(len(u.registers[architectures[0]])),
            *(span(u.registers[architecture]) for architecture in architectures),
            str(u.spilled),
            str(u.shared),
            span(sorted(widths[kernel])),
        ]
        for kernel, u in sorted(usage.items())
    ]
    header = ["kernel, memory", "variants", *(f"registers on {x}" for x in architectures)]
    return table([*header, "stack and spills, bytes", "shared memory, bytes", "widest access, bits"], rows)
