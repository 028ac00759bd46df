"""One case at one size: ours, eager, ``torch.compile`` and a copy of as many bytes, measured in turns."""

from __future__ import annotations

import math
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from benchmarks.cases import Case, Results, Shape
from benchmarks.timing import CLOCKS, Call, Effort, Sampler, Timing, interleave, pooled

#: Elements for every thread of an operation that PyTorch distributes.
WOKEN = 1 << 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Row: TypeAlias = tuple[str, str, str, str, Shape]


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
    #: The number of the process, where a case is measured in several.
    run: int = 0

    @property
    def row(self) -> Row:
        """What names a row in every run, apart from its threads."""
        return self.family, self.case, self.device, self.dtype, self.shape

    @property
    def elements(self) -> int:
        """Elements of one tensor."""
        return math.prod(self.shape)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of one tensor."""
        return self.elements * DTYPES[self.dtype].itemsize

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


def merged(measurements: Iterable[Measurement]) -> list[Measurement]:
    """Every row once, over its processes."""
    runs: dict[tuple[Row, int], list[Measurement]] = {}
    for m in measurements:
        runs.setdefault((m.row, m.threads), []).append(m)
    return [
        replace(
            found[0],
            times={x: pooled([m.times[x] for m in found]) for x in found[0].times if all(x in m.times for m in found)},
            preemptions=statistics.mean(m.preemptions for m in found),
        )
        for found in runs.values()
    ]


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


def copy_of(least_bytes: int, device: str, times: int = 1) -> Call:
    """Copies one after another that move this number of bytes together, half of them read and half written."""
    source = torch.ones(least_bytes // (8 * times), device=device)
    copy = partial(torch.empty_like(source).copy_, source)
    return copy if times == 1 else lambda: [copy() for _ in range(times)]


@dataclass(frozen=True)
class OnThreads:
    """A call on a number of PyTorch's threads."""

    count: int
    call: Call

    def __call__(self) -> object:
        torch.set_num_threads(self.count)
        return self.call()


def switching(sampler: Sampler) -> Sampler:
    """A sampler that sets a call's number of threads before the sample, and wakes them."""

    def sample(call: Call, repeats: int) -> float:
        if not isinstance(call, OnThreads):
            return sampler(call, repeats)
        torch.set_num_threads(call.count)
        torch.ones(WOKEN * call.count)
        return sampler(call.call, repeats)

    return sample


def compiled(case: Case, inputs: list[Tensor]) -> Callable[..., Results]:
    """The eager function compiled for this shape and dtype, and run once."""
    # Compiling in this process: idle workers would share the processor with what is measured.
    torch._inductor.config.compile_threads = 1
    torch.compiler.reset()
    function = torch.compile(case.eager, dynamic=False, fullgraph=True)
    case.measured(function)(*inputs, **case.coefficients)
    return function


def measure(family: str, case: Case, shape: Shape, dtype: str, *, thread_count: int = 1, **options: Any) -> Measurement:
    """Measure a case on one number of threads, see `measure_together`."""
    (measurement,) = measure_together(family, case, shape, dtype, thread_counts=(thread_count,), **options)
    return measurement


def measure_together(
    family: str,
    case: Case,
    shape: Shape,
    dtype: str,
    *,
    thread_counts: Sequence[int],
    device: str = "cpu",
    compile_too: bool = True,
    effort: Effort,
    clock: str = "wall",
    sampler: Sampler | None = None,
    run: int = 0,
) -> list[Measurement]:
    """Measure a case, on every number of threads in turns; a contestant that fails is reported with its error.

    ``clock`` names one of the host's clocks, or that of the ``sampler``; ``run`` is the number of this process.
    """
    inputs = case.inputs(shape, DTYPES[dtype], device)
    least_bytes = case.least_bytes(shape, DTYPES[dtype])
    functions: dict[str, Callable[..., Results]] = {"ours": case.ours, "eager": case.eager}
    failures: dict[str, str] = {}
    with torch.set_grad_enabled(case.trains), threads(max(thread_counts)):
        if compile_too and case.compiles:
            # Any error of the compiler or its C++ toolchain is this contestant's result.
            try:
                functions["compile"] = compiled(case, inputs)
            except Exception as error:
                failures["compile"] = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        calls: dict[str, Call] = {
            name: partial(case.measured(function), *inputs, **case.coefficients) for name, function in functions.items()
        }
        calls["copy"] = copy_of(least_bytes, device, times=case.copies)
        # A compiled function has a version for each number of threads: the first, unmeasured calls compile them.
        together = {
            f"{count} {name}": OnThreads(count, call) for count in thread_counts for name, call in calls.items()
        }
        start, preempted = time.perf_counter(), preemptions()
        times = interleave(together, effort, switching(sampler or CLOCKS[clock]))
        rate = (preemptions() - preempted) / (time.perf_counter() - start)
    return [
        Measurement(
            family=family,
            case=case.name,
            device=device,
            threads=count,
            clock=clock,
            dtype=dtype,
            shape=shape,
            least_bytes=least_bytes,
            times={name: times[f"{count} {name}"] for name in calls},
            failures=failures,
            preemptions=rate,
            run=run,
        )
        for count in thread_counts
    ]
