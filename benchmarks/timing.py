"""Interleaved timing: the contestants take turns in rounds, so that drift of the machine affects all equally."""

from __future__ import annotations

import gc
import math
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

Call = Callable[[], object]
#: Seconds per call, from so many calls one after another.
Sampler = Callable[[Call, int], float]


@dataclass(frozen=True)
class Effort:
    """How long to measure: ``rounds`` of samples of at least ``sample`` seconds.

    If the rounds take more than ``budget`` seconds, only ``least_rounds`` are made, and of calls that take seconds
    no more than three, the fewest with quartiles, once they took ``patience`` seconds.
    """

    rounds: int = 21
    least_rounds: int = 7
    sample: float = 5e-3
    budget: float = 3.0
    patience: float = 60.0


QUICK = Effort(rounds=3, least_rounds=3, sample=2e-4, budget=0.5)


@dataclass(frozen=True)
class Timing:
    """Seconds per call over the rounds, and page faults per call."""

    median: float
    low: float
    high: float
    best: float
    rounds: int
    repeats: int
    page_faults: float = 0.0

    @property
    def spread(self) -> float:
        """The interquartile range relative to the median."""
        return (self.high - self.low) / self.median


def summary(samples: list[float], repeats: int, page_faults: float = 0.0) -> Timing:
    """Median, quartiles and best of the rounds."""
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, low, high, min(samples), len(samples), repeats, page_faults)


def pooled(timings: Sequence[Timing]) -> Timing:
    """One timing of several processes: the median of medians, between the lowest and the highest quartile."""
    if len(timings) == 1:
        return timings[0]
    return Timing(
        median=statistics.median(t.median for t in timings),
        low=min(t.low for t in timings),
        high=max(t.high for t in timings),
        best=min(t.best for t in timings),
        rounds=sum(t.rounds for t in timings),
        repeats=max(t.repeats for t in timings),
        page_faults=statistics.median(t.page_faults for t in timings),
    )


def clocked(clock: Callable[[], float]) -> Sampler:
    """A sampler that reads a clock of the host."""

    def sample(call: Call, repeats: int) -> float:
        start = clock()
        for _ in range(repeats):
            call()
        return (clock() - start) / repeats

    return sample


#: On an idle machine both agree on one thread. Where other processes share the processor, the wall
#: clock includes their time, more for long calls than for short ones; the thread's own time does not.
CLOCKS: dict[str, Sampler] = {"wall": clocked(time.perf_counter), "processor": clocked(time.thread_time)}


def minor_faults() -> int:
    """The number of minor page faults of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def repeats_for(call: Call, sampler: Sampler, seconds: float) -> int:
    """The number of calls that take a given time; the best of three tries, to exclude disturbances."""
    repeats = 1
    if sampler(call, 1) >= 20 * seconds:
        return 1  # no disturbance made it that long
    while True:
        elapsed = min(sampler(call, repeats) for _ in range(3)) * repeats
        if elapsed >= seconds:
            return repeats
        wanted = repeats * seconds / max(elapsed, 1e-9)
        repeats = max(repeats + 1, min(10 * repeats, math.ceil(1.1 * wanted)))


@contextmanager
def no_collection() -> Iterator[None]:
    """Keep the garbage collector out of the samples."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def interleave(calls: Mapping[str, Call], effort: Effort, sampler: Sampler = CLOCKS["wall"]) -> dict[str, Timing]:
    """Time the calls in turns; each round starts with another one, so that each follows every other."""
    for call in calls.values():
        call()
    repeats = {name: repeats_for(call, sampler, effort.sample) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    faults: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    start = time.perf_counter()
    with no_collection():
        for index in range(effort.rounds):
            taken = time.perf_counter() - start
            if (index >= effort.least_rounds and taken > effort.budget) or (index >= 3 and taken > effort.patience):
                break
            shift = index % len(names)
            for name in names[shift:] + names[:shift]:
                before = minor_faults()
                samples[name].append(sampler(calls[name], repeats[name]))
                faults[name].append((minor_faults() - before) / repeats[name])
    return {name: summary(seconds, repeats[name], statistics.median(faults[name])) for name, seconds in samples.items()}
