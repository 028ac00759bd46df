"""``python -m benchmarks.gpu_figures``: times on a GPU, kernels and host apart.

Kernels are timed as graphs whose calls have inputs of their own, together several times the L2 cache: no time of the
host's is in them. What the host does for a call is timed beside them, with tensors so small that the GPU waits for it.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Shape
from benchmarks.registry import FAMILIES
from bicm_diffusion import bdia_sample, ddim_sample, vp_schedule
from bicm_kernels import backend
from bicm_kernels.families import FAMILIES as OPS

DEVICE = "cuda"
SHAPES: tuple[Shape, ...] = (
    (1024, 3, 32, 32),
    (16, 4, 128, 128),
    (1, 3, 32, 32),
    (2, 4, 64, 64),
    (16384, 3, 32, 32),
    (64, 3, 512, 512),
)
LOSS_SHAPES: tuple[Shape, ...] = (*SHAPES[:2], (16384, 3, 32, 32), (8, 3, 512, 512), (1, 1, 10_000, 10_000))
SMALL: Shape = (1, 3, 8, 8)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: Bytes that the calls of a graph touch together: several times the L2 cache.
ROTATED = 256 << 20
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
        graph, kept = torch.cuda.CUDAGraph(), []
        with torch.cuda.graph(graph):
            for call in calls:
                kept.append(call())
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


@dataclass
class Budget:
    """Seconds for all figures, of which every table may take its part."""

    seconds: float
    begun: float = field(default_factory=time.time)

    def spent(self, part: float = 1.0) -> bool:
        return time.time() - self.begun > self.seconds * part


def inputs_of(case: Case, shape: Shape, dtype: torch.dtype) -> list[Tensor]:
    """Made on the GPU: on the host 200 MB of normal numbers take seconds."""
    tensors = [torch.randn(shape, device=DEVICE).to(dtype) for _ in range(case.tensors)]
    numbers = [torch.linspace(1.0 + k, 2.0 + k, shape[0], device=DEVICE) for k in range(case.per_sample)]
    states = [torch.randint(-(2**34), 2**34, shape, device=DEVICE) for _ in range(case.states)]
    return [*tensors, *numbers, *states]


def contestants(case: Case, compile_too: bool) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Ours, and what people write in its place."""
    yield "ours", case.measured(case.ours)
    yield "eager", case.measured(case.eager)
    if compile_too:
        torch.compiler.reset()
        yield "compile", case.measured(torch.compile(case.eager, dynamic=False, fullgraph=True))


def attempt(row: Row, name: str, measure: Callable[[], float]) -> None:
    """A figure in a row; a contestant that fails leaves its reason there."""
    try:
        row[name] = measure()
    except Exception as error:
        row[f"{name} failed"] = f"{type(error).__name__}: {error}".partition("\n")[0][:120]


def kernels(clock: Clock, budget: Budget, compile_too: bool, copy: float) -> list[Row]:
    """Every case at every shape, in microseconds, and the part of a copy's bandwidth that ours reaches."""
    rows: list[Row] = []
    cases = [case for name in OPS for case in FAMILIES[name]]
    # The first shape of every case comes first: what the time does not reach is a shape, not a case.
    for k, case, dtype in itertools.product(range(len(SHAPES)), cases, DTYPES):
        shapes = LOSS_SHAPES if case.trains else SHAPES
        if k >= len(shapes):
            continue
        shape = shapes[k]
        if budget.spent(0.8):
            break
        least = case.least_bytes(shape, DTYPES[dtype])
        sets = max(1, min(48, ROTATED // least + 1))
        held = [inputs_of(case, shape, DTYPES[dtype]) for _ in range(sets)]
        row: Row = {"case": case.name, "shape": "×".join(map(str, shape)), "dtype": dtype, "MB": least / 1e6}
        with torch.set_grad_enabled(case.trains):
            for name, function in contestants(case, compile_too and math.prod(shape) < 10**6):
                calls = [partial(function, *x, **case.coefficients) for x in held]
                attempt(row, name, partial(clock.graph, calls * max(1, 8 // len(calls))))
                if name == "ours" and k == 0:
                    attempt(row, "operations", partial(clock.operations, calls[0]))
        if "ours" in row:
            row["of copy"] = least / row["ours"] / 1e6 / copy
        rows.append(row)
        print(" ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
        del held
    return rows


def bounds(clock: Clock) -> list[Row]:
    """What a copy and torch's own generator reach."""
    rows = []
    for count in (1 << 28, 1 << 20):
        source = torch.randn(count, device=DEVICE)
        target = torch.empty_like(source)
        us = clock.graph([partial(target.copy_, source)] * 4)
        randn = clock.graph([partial(torch.randn, count, device=DEVICE)] * 4)
        rows.append({"MB": count * 4 / 1e6, "copy µs": us, "copy TB/s": 8 * count / us / 1e6, "torch.randn µs": randn})
    return rows


@contextmanager
def past_the_dispatcher() -> Iterator[None]:
    """Calls on the GPU without the dispatcher, as under BICM_KERNELS_DIRECT=cuda."""
    before, backend._switch = backend._switch, "cuda"
    backend._hand_over_launchers()
    try:
        yield
    finally:
        backend._switch = before
        backend._hand_over_launchers()


def hosts(clock: Clock, budget: Budget, compile_too: bool) -> list[Row]:
    """Microseconds of the host for a call, and from a call to its end where it is compiled into a graph."""
    rows: list[Row] = []
    for case in (case for name in OPS for case in FAMILIES[name]):
        if budget.spent(0.3):
            break
        x, row = inputs_of(case, SMALL, torch.float32), {"case": case.name}
        with torch.set_grad_enabled(case.trains):
            for name, function in contestants(case, compile_too):
                attempt(row, name, partial(clock.host, partial(function, *x, **case.coefficients)))
            with past_the_dispatcher():
                attempt(row, "past it", partial(clock.host, partial(case.measured(case.ours), *x, **case.coefficients)))
            if compile_too:
                torch.compiler.reset()
                fast = case.measured(torch.compile(case.eager, mode="reduce-overhead"))
                attempt(row, "reduce-overhead", partial(clock.host, partial(fast, *x, **case.coefficients)))
        rows.append(row)
    small = torch.randn(1, 64, device=DEVICE)
    rows.append({"case": "torch.add", "ours": clock.host(partial(torch.add, small, small))})
    return rows


def network(channels: int = 64) -> torch.nn.Module:
    """Something to step with, in bfloat16."""
    inner: list[torch.nn.Module] = []
    for _ in range(6):
        convolution = torch.nn.Conv2d(channels, channels, 3, padding=1)
        inner += [torch.nn.GroupNorm(8, channels), torch.nn.SiLU(), convolution]
    ends = torch.nn.Conv2d(4, channels, 3, padding=1), torch.nn.Conv2d(channels, 4, 3, padding=1)
    return torch.nn.Sequential(ends[0], *inner, ends[1]).to(DEVICE, torch.bfloat16)


def loops(clock: Clock, steps: int = 50, side: int = 64) -> list[Row]:
    """Samplers from end to end, each call of the loop from Python and the whole loop in one graph."""
    net, schedule, rows = network(), vp_schedule(steps), []

    def model(z: Tensor, times: Tensor) -> Tensor:
        return net(z.to(torch.bfloat16))

    def alone(z: Tensor) -> Tensor:
        return [model(z, z) for _ in range(steps)][-1]

    def written(z: Tensor) -> Tensor:
        for i in range(steps, 0, -1):
            eps = model(z, torch.full((len(z),), float(schedule.times[i]), device=DEVICE)).float()
            x0 = (z - schedule.sigma[i] * eps) / schedule.alpha[i]
            z = schedule.alpha[i - 1] * x0 + schedule.sigma[i - 1] * eps
        return z

    for batch in (1, 4):
        z = torch.randn(batch, 4, side, side, device=DEVICE)
        runs: dict[str, Call] = {
            "network alone": partial(alone, z),
            "ddim as written": partial(written, z),
            "ddim_sample": partial(ddim_sample, model, z, schedule),
            "bdia_sample, floats": partial(bdia_sample, model, z, schedule, gamma=0.96, exact=False),
            "bdia_sample": partial(bdia_sample, model, z, schedule, gamma=0.96),
        }
        runs |= diffusers_loops(model, z, steps)
        for name, run in runs.items():
            row: Row = {"loop": name, "batch": batch}
            attempt(row, "µs", partial(clock.wall, run))
            attempt(row, "µs, graph", partial(clock.graph, [run]))
            rows.append(row)
    return rows


def diffusers_loops(model: Callable[[Tensor, Tensor], Tensor], z: Tensor, steps: int) -> dict[str, Call]:
    """The same network under diffusers' DDIM, theirs and accelerated, where it is installed."""
    if importlib.util.find_spec("diffusers") is None:
        return {}
    from diffusers import DDIMScheduler

    from bicm_diffusion.adapters.diffusers import accelerate_scheduler

    def run(scheduler: Any) -> Tensor:
        x = z
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t).float(), t, x, return_dict=False)[0]
        return x

    found: dict[str, Call] = {}
    for name, change in (("diffusers DDIM", lambda x: x), ("diffusers DDIM, accelerated", accelerate_scheduler)):
        scheduler = change(DDIMScheduler())
        scheduler.set_timesteps(steps, device=DEVICE)
        found[name] = partial(run, scheduler)
    return found


def once() -> None:
    """Every kernel once at a large size, for a profiler."""
    for case in (case for name in OPS for case in FAMILIES[name]):
        for shape in LOSS_SHAPES[1:3] if case.trains else SHAPES[4:5]:
            for dtype in DTYPES.values():
                with torch.set_grad_enabled(case.trains):
                    case.measured(case.ours)(*inputs_of(case, shape, dtype), **case.coefficients)


def measured(clock: Clock, seconds: float, compile_too: bool) -> dict[str, Any]:
    """All tables, as far as the time goes."""
    budget = Budget(seconds)
    bandwidth = bounds(clock)
    found: dict[str, Any] = {"backend": backend.describe(), "bounds": bandwidth}
    with torch.no_grad():
        found["host, µs a call"] = hosts(clock, budget, compile_too)
        found["loops"] = loops(clock)
    found["kernels, µs"] = kernels(clock, budget, compile_too, bandwidth[0]["copy TB/s"])
    return found


def main() -> int:
    """Measure, and write what was found as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_figures", description=__doc__)
    parser.add_argument("--once", action="store_true", help="run every kernel once, for a profiler")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--seconds", type=float, default=360.0, help="how long it may take (default: 360)")
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no GPU: nothing was measured", file=sys.stderr)
        return 1
    if options.once:
        once()
        torch.cuda.synchronize()
        return 0
    found = measured(Clock(), options.seconds, not options.no_compile)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
