"""One case at one size: ours, eager, ``torch.compile`` and a copy of as many bytes, measured in turns."""

from __future__ import annotations

import math
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import Case, Results, Shape
from benchmarks.timing import CLOCKS, Call, Effort, Sampler, Timing, interleave

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Measurement:
    """The measurements of a case, and the contestants that failed."""

    family: str
    case: str
    device: str
    threads: int
    clock: str
    dtype: str
    shape: Shape
    least_bytes: int
    times: dict[str, Timing]
    failures: dict[str, str]
    #: Preemptions of this process per second.
    preemptions: float

    @property
    def elements(self) -> int:
        """Elements of one tensor."""
        return math.prod(self.shape)

    def ratio(self, other: str) -> float | None:
        """The ratio of another's time to ours; for "copy", the fraction of the bound that is reached."""
        return self.times[other].median / self.times["ours"].median if other in self.times else None

    def faulted(self, name: str) -> bool:
        """Whether a contestant's memory was page-faulted in every call rather than kept by the allocator."""
        faulted = self.times[name].page_faults * resource.getpagesize()
        return self.device == "cpu" and faulted > 0.1 * self.least_bytes

    def bandwidth(self, name: str = "ours") -> float | None:
        """Required bytes per second."""
        return self.least_bytes / self.times[name].median if name in self.times else None


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Set PyTorch's number of threads for the length of a ``with`` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def preemptions() -> int:
    """The number of involuntary context switches of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def copy_of(least_bytes: int, device: str) -> Callable[[], Tensor]:
    """A copy that moves this number of bytes, half of them read and half written."""
    source = torch.ones(least_bytes // 8, device=device)
    return partial(torch.empty_like(source).copy_, source)


def compiled(case: Case, inputs: list[Tensor]) -> Callable[..., Results]:
    """The eager function compiled for this shape and dtype, and run once."""
    # Compiling in this process: idle workers would share the processor with what is measured.
    torch._inductor.config.compile_threads = 1
    torch.compiler.reset()
    function = torch.compile(case.eager, dynamic=False, fullgraph=True)
    case.measured(function)(*inputs, **case.coefficients)
    return function


def measure(
    family: str,
    case: Case,
    shape: Shape,
    dtype: str,
    *,
    device: str = "cpu",
    thread_count: int = 1,
    compile_too: bool = True,
    effort: Effort,
    clock: str = "wall",
    sampler: Sampler | None = None,
) -> Measurement:
    """Measure a case; a contestant that fails is reported with its error.

    ``clock`` names one of the host's clocks, or that of the ``sampler``.
    """
    inputs = case.inputs(shape, DTYPES[dtype], device)
    least_bytes = case.least_bytes(shape, DTYPES[dtype])
    functions: dict[str, Callable[..., Results]] = {"ours": case.ours, "eager": case.eager}
    failures: dict[str, str] = {}
    with torch.no_grad(), threads(thread_count):
        if compile_too:
            # Any error of the compiler or its C++ toolchain is this contestant's result.
            try:
                functions["compile"] = compiled(case, inputs)
            except Exception as error:
                failures["compile"] = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        calls: dict[str, Call] = {
            name: partial(case.measured(function), *inputs, **case.coefficients) for name, function in functions.items()
        }
        calls["copy"] = copy_of(least_bytes, device)
        start, preempted = time.perf_counter(), preemptions()
        times = interleave(calls, effort, sampler or CLOCKS[clock])
        rate = (preemptions() - preempted) / (time.perf_counter() - start)
    return Measurement(
        family=family,
        case=case.name,
        device=device,
        threads=thread_count,
        clock=clock,
        dtype=dtype,
        shape=shape,
        least_bytes=least_bytes,
        times=times,
        failures=failures,
        preemptions=rate,
    )
