"""Microseconds from Python to a step's kernel and back, where the arithmetic itself costs next to nothing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_multistep import CASES, GUIDANCE
from benchmarks.cases import Case, Shape
from benchmarks.measurement import threads
from benchmarks.timing import CLOCKS, Call, Effort, Timing, interleave

SIZES: dict[str, Shape] = {"3,072 elements": (1, 3, 32, 32), "1 element": (1, 1)}
GUIDED = "3,072 elements, guided"
COLUMNS = ("3,072 elements", GUIDED, "1 element")
#: PyTorch's own overhead, for scale: an allocation, and one operation on two tensors.
ATEN: dict[str, Any] = {"torch.empty_like": torch.empty_like, "torch.add": lambda x: torch.add(x, x)}


@dataclass(frozen=True)
class Overhead:
    """One op and one way to call it."""

    op: str
    column: str
    time: Timing


def _guided(case: Case, inputs: list[Tensor]) -> Call:
    pair = (inputs[-1], inputs[-1].clone())
    return partial(case.ours, *inputs[:-1], pair, **case.coefficients, guidance_scale=GUIDANCE)


def calls() -> dict[tuple[str, str], Call]:
    """Every step op that takes a prediction, with and without guidance, and PyTorch's own for scale."""
    table: dict[tuple[str, str], Call] = {}
    for column, shape in SIZES.items():
        for name, function in ATEN.items():
            table[name, column] = partial(function, torch.ones(shape))
    for case in CASES:
        if "guidance_scale" in case.coefficients:
            continue
        for column, shape in SIZES.items():
            table[case.name, column] = partial(case.ours, *case.inputs(shape, torch.float32), **case.coefficients)
        table[case.name, GUIDED] = _guided(case, case.inputs(SIZES[COLUMNS[0]], torch.float32))
    return table


def measure(effort: Effort, clock: str = "wall") -> list[Overhead]:
    """Time every call in turns, on one thread."""
    table = calls()
    with torch.no_grad(), threads(1):
        times = interleave({"|".join(name): call for name, call in table.items()}, effort, CLOCKS[clock])
    return [Overhead(op, column, times[f"{op}|{column}"]) for op, column in table]
