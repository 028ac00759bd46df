"""A kernel's tensor arguments: B samples, each a row-major index space that strides map to memory.

A kernel works on tiles of ROWS samples by COLUMNS elements. An operand is (tensor, batch_stride, strides);
`strides` is empty where a sample's elements are adjacent and in order: the path with 128-bit accesses.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

Operand = tuple[Tensor, int, tuple[int, ...]]

WARPS = 4 if torch.version.hip is None else 2  # 128 threads
TILE = 1024  # elements of a program: eight for each thread
HALVES = frozenset((torch.float16, torch.bfloat16))
WIDE = 2**31 - 2 * TILE  # from here on, an element's index needs 64 bits


@triton.jit
def locate(elements, batch, blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INDEX: tl.constexpr):
    """The tile's samples (ROWS, 1), which exist; its first and all its elements (1, COLUMNS), which exist."""
    tile = tl.program_id(0)
    sample = (tile // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    first = (tile % blocks).to(INDEX) * COLUMNS
    element = first + tl.arange(0, COLUMNS)[None, :]
    present = sample < batch
    if ROWS == 1:
        inside = element < elements
    else:
        inside = (element < elements) & present
    return sample, present, first, element, inside


@triton.jit
def addresses(operand, sizes, sample, element):
    """Pointers to a tile of an operand; `sizes` are the sample's dimensions, outermost first."""
    row = operand[0] + sample * operand[1]
    strides = operand[2]
    if len(strides) == 0:
        pointers = row + element
    else:
        offset = tl.zeros(element.shape, tl.int64)
        rest = element
        for k in tl.static_range(1, len(strides)):
            size = sizes[len(strides) - k]
            offset += (rest % size).to(tl.int64) * strides[len(strides) - k]
            rest = rest // size
        pointers = row + (offset + rest.to(tl.int64) * strides[0])
    return pointers


@triton.jit
def load(operand, sizes, sample, element, inside, COMPUTE: tl.constexpr):
    """A tile in the compute type."""
    return tl.load(addresses(operand, sizes, sample, element), mask=inside).to(COMPUTE)


@triton.jit
def store(operand, sizes, sample, element, inside, value):
    """Round a tile once, to nearest even, and store it."""
    dtype: tl.constexpr = operand[0].dtype.element_ty
    if value.dtype == tl.float64 and dtype.primitive_bitwidth == 16:
        value = value.to(tl.float32)  # as every backend does, torch included
    tl.store(addresses(operand, sizes, sample, element), value.to(dtype), mask=inside)


class Plan(NamedTuple):
    """The traversal of tensors and the tiles that cover them; depends only on shapes, strides and dtypes."""

    batch: int
    elements: int
    sizes: tuple[int, ...]
    #: Of every tensor, from sample to sample and inside one.
    strides: tuple[tuple[int, tuple[int, ...]], ...]
    rows: int
    columns: int
    blocks: int
    tiles: int
    #: Adjacent elements of one thread: as many as its widest load of a tensor.
    group: int


Strides = tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def plan(
    shape: tuple[int, ...],
    strides: tuple[Strides, ...],
    dtypes: tuple[torch.dtype, ...],
    per_sample: bool,
    in_order: bool,
) -> Plan:
    """Merge dimensions where possible, and divide them into tiles."""
    batch = shape[0] if per_sample else 1
    elements = math.prod(shape) // batch if batch else 0
    dims = [
        (size, tuple(stride[i] for stride in strides))
        for i, size in enumerate(shape)
        if size != 1 and not (per_sample and i == 0)
    ]
    if not in_order:
        dims.sort(key=lambda dim: -dim[1][0])
    dims = merge(dims)
    sizes = tuple(size for size, _ in dims)
    dense = row_major(sizes)
    inner = [tuple(steps[k] for _, steps in dims) for k in range(len(strides))]
    walks = [() if steps == dense else steps for steps in inner]
    apart = per_sample and batch > 1
    columns = min(TILE, max(8, power_of_two(elements))) if elements else 8
    rows = min(TILE // columns, power_of_two(batch)) if batch else 1
    blocks = -(-elements // columns)
    return Plan(
        batch,
        elements,
        sizes if any(walks) else (),
        tuple((stride[0] if apart else elements, walk) for stride, walk in zip(strides, walks, strict=True)),
        rows,
        columns,
        blocks,
        -(-batch // rows) * blocks,
        8 if any(dtype in HALVES for dtype in dtypes) else 4,
    )


class Layout:
    """Tensors of one shape and the plan by which a kernel traverses them."""

    def __init__(self, plan: Plan, tensors: Sequence[Tensor]) -> None:
        self.plan = plan
        self.operands: list[Operand] = [
            (x, stride, walk) for x, (stride, walk) in zip(tensors, plan.strides, strict=True)
        ]

    @property
    def index(self) -> Any:
        """The type of an element's index."""
        return tl.int32 if self.plan.elements < WIDE else tl.int64

    def launch(self, kernel: Any, *, spread: int = 1, **arguments: object) -> None:
        """Run a kernel over the tiles; `spread` over more threads where each would need too many registers."""
        plan = self.plan
        if not plan.tiles:
            return
        with device_of(self.operands[0][0]):
            kernel[(plan.tiles,)](
                sizes=plan.sizes,
                batch=plan.batch,
                elements=plan.elements,
                blocks=plan.blocks,
                ROWS=plan.rows,
                COLUMNS=plan.columns,
                GROUP=plan.group,
                INDEX=self.index,
                num_warps=WARPS * spread,
                enable_fp_fusion=False,
                **arguments,
            )


def lay_out(tensors: Sequence[Tensor], *, per_sample: bool, in_order: bool) -> Layout:
    """The layout of tensors of one shape.

    Samples stay separate where arguments differ `per_sample`. Where elements need not be visited `in_order` of
    their logical index, memory order is used.
    """
    strides, dtypes = tuple([x.stride() for x in tensors]), tuple([x.dtype for x in tensors])
    return Layout(plan(tuple(tensors[0].shape), strides, dtypes, per_sample, in_order), tensors)


def power_of_two(count: int) -> int:
    """The smallest power of two that is not below a positive count."""
    return 1 << (count - 1).bit_length()


def merge(dims: Sequence[tuple[int, tuple[int, ...]]]) -> list[tuple[int, tuple[int, ...]]]:
    """Merge adjacent dimensions, (size, stride of each tensor), that are contiguous in every tensor."""
    merged: list[tuple[int, tuple[int, ...]]] = []
    for size, steps in dims:
        if merged and merged[-1][1] == tuple(step * size for step in steps):
            size *= merged.pop()[0]
        merged.append((size, steps))
    return merged


def row_major(sizes: Sequence[int]) -> tuple[int, ...]:
    """The strides of a dense tensor."""
    strides: list[int] = []
    step = 1
    for size in reversed(sizes):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Kernels start on the current device: make it the tensor's."""
    device = x.device
    if device.type == "cpu" or device.index == torch.accelerator.current_device_index():
        return contextlib.nullcontext()
    guard: Callable[[torch.device], contextlib.AbstractContextManager[object]]
    guard = torch.get_device_module(device).device
    return guard(device)
