"""What times calls on a GPU, and goes on after a call that fails."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]
Row = dict[str, Any]


@dataclass
class Clock:
    """What times calls. A test replaces it where there is no GPU."""

    rounds: int = 9

    def graph(self, calls: Sequence[Call]) -> float:
        """Microseconds of a call, all of them in one graph; results are kept, so that none lies where another lay."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in (calls[0], calls[0], calls[-1]):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph, kept = captured(calls)
        times = []
        for _ in range(self.rounds + 2):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / len(calls))
        del graph, kept
        return statistics.median(times[2:])

    def host(self, call: Call, count: int = 300) -> float:
        """Microseconds that the host is busy with a call."""
        for _ in range(30):
            call()
        times = []
        for _ in range(self.rounds):
            self.wait()
            begun = time.perf_counter()
            for _ in range(count):
                call()
            times.append((time.perf_counter() - begun) / count * 1e6)
        self.wait()
        return statistics.median(times)

    def wall(self, call: Call) -> float:
        """Microseconds from a call to the end of what it started, the GPU idle before."""
        call()
        times = []
        for _ in range(self.rounds):
            self.wait()
            begun = time.perf_counter()
            call()
            self.wait()
            times.append((time.perf_counter() - begun) * 1e6)
        return statistics.median(times)

    def wait(self) -> None:
        torch.cuda.synchronize()

    def operations(self, call: Call) -> int:
        """What a call makes the GPU do: kernels, copies and memsets."""
        call()
        self.wait()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            self.wait()
        events: Any = profile.events()
        return sum("CUDA" in str(event.device_type) for event in events)

    def attempt(self, row: Row, name: str, measure: Callable[[], float]) -> None:
        """A figure in a row; a contestant that fails leaves its reason there."""
        with self.noting(row, name):
            row[name] = measure()

    @contextmanager
    def noting(self, row: Row, name: str) -> Iterator[None]:
        """Note in a row why what is done here fails, and go on as if it had not been tried."""
        stream = self.stream()
        try:
            yield
        except Exception as error:
            row[f"{name} failed"] = f"{type(error).__name__}: {error}".partition("\n")[0][:120]
            self.restore(stream)

    def stream(self) -> Any:
        return torch.cuda.current_stream()

    def restore(self, stream: Any) -> None:
        """Take back what a capture that fails leaves: its stream as the current one and, before torch 2.13, a
        generator that does not draw outside of captures."""
        torch.cuda.set_stream(stream)
        fresh = torch.Generator(stream.device)
        torch.cuda.default_generators[stream.device.index].graphsafe_set_state(fresh.graphsafe_get_state())


def captured(calls: Sequence[Call]) -> tuple[torch.cuda.CUDAGraph, list[Any]]:
    """A graph of calls, and their results, whose memory is the graph's."""
    graph, pool, kept = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), []
    try:
        with torch.cuda.graph(graph, pool=pool):
            for call in calls:
                kept.append(call())
    except Exception:
        # Before torch 2.13 the allocator takes a capture that failed for one that goes on, and refuses the next one.
        with suppress(RuntimeError):  # later ones have ended it already
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        raise
    return graph, kept
