"""The suite's sizes by name, from one CIFAR image to 2 GB of video latents, and whether they fit into memory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import click
import psutil
import torch

from benchmarks.cases import STATE, Case, Shape

SHAPES: dict[str, Shape] = {
    "cifar": (1, 3, 32, 32),
    "sd": (1, 4, 64, 64),  # 512², as Stable Diffusion 1.5
    "sdxl": (1, 4, 128, 128),  # 1024²
    "flux": (1, 16, 128, 128),  # 1024², as Flux and Stable Diffusion 3
    "cifar-256": (256, 3, 32, 32),  # a training batch
    "sdxl-16": (16, 4, 128, 128),
    "video": (1, 16, 21, 90, 160),  # 81 frames of 720 × 1280, as Wan 2.1: 19 MB in float32
    "video-8": (8, 16, 21, 90, 160),
    "video-103": (103, 16, 21, 90, 160),  # 2.0 GB
}
#: Tensors of the inputs' size that eager code holds at most besides its inputs, as resident memory showed: a formula's,
#: a peer's own step, a loss with its graph.
TEMPORARIES, TEMPORARIES_OF_PEER, TEMPORARIES_OF_LOSS = 4, 8, 24
#: The share of the free memory that a case may take.
SHARE = 0.85


@dataclass(frozen=True)
class Skipped:
    """A row that is not measured, because its tensors do not fit."""

    case: str
    dtype: str
    shape: Shape
    needed: int
    free: int

    def __str__(self) -> str:
        name = "×".join(map(str, self.shape))
        needed, free = (f"{count / 1e9:.1f} GB" for count in (self.needed, self.free))
        return f"{self.case} {self.dtype} {name}: not measured, it may need {needed} where {free} are free"


def needed(case: Case, shape: Shape, dtype: torch.dtype) -> int:
    """An upper bound of the bytes that a case takes: inputs, temporaries of eager code, and the copy's two tensors."""
    usual = TEMPORARIES_OF_LOSS if case.trains else TEMPORARIES_OF_PEER if case.package else TEMPORARIES
    tensors = (case.tensors + (case.temporaries or usual)) * max(dtype.itemsize, 4) + 3 * case.states * STATE.itemsize
    return math.prod(shape) * tensors + case.least_bytes(shape, dtype) // case.copies


def free_memory() -> int:
    """Bytes that this process may still take: the machine's, or its control group's where those are fewer."""
    free: int = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        return free if limit == "max" else min(free, max(0, int(limit) - int(used)))
    except (OSError, ValueError):
        return free


def fitting(
    case: Case, shapes: Iterable[Shape], name: str, dtype: torch.dtype, free: int
) -> tuple[list[Shape], list[Skipped]]:
    """The shapes that fit into the free memory, and the others; name: of the dtype."""
    bytes_of = {shape: needed(case, shape, dtype) for shape in shapes}
    small = [shape for shape, count in bytes_of.items() if count <= SHARE * free]
    large = [Skipped(case.name, name, s, count, free) for s, count in bytes_of.items() if s not in small]
    return small, large


def shapes_given(_: click.Context, __: click.Parameter, value: str | None) -> tuple[Shape, ...] | None:
    """Shapes as 1x4x64x64 or by their names, separated by commas."""
    if value is None:
        return None
    items = [item.strip() for item in value.split(",")]
    shapes = [SHAPES.get(item) or tuple(int(n) if n.isdecimal() else 0 for n in item.split("x")) for item in items]
    if not all(len(shape) > 1 and min(shape) > 0 for shape in shapes):
        names = ", ".join(SHAPES)
        raise click.BadParameter(f"expected shapes like 1x4x64x64 or {names}, separated by commas, got {value!r}")
    return tuple(shapes)
