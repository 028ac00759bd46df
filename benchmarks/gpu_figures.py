"""``python -m benchmarks.gpu_figures``: times on a GPU, kernels and host apart.

Kernels are timed as graphs whose calls have inputs of their own: no time of the host's is in them. Together the calls
touch several times the L2 cache, but for small shapes: the calls of a graph are limited, and what they touch stays in
the cache. Such rows have no part of a copy's bandwidth; "MB together" is what the calls of a graph touch. What the host
does for a call is timed beside them, with tensors so small that the GPU waits for it.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bicm_kernels as bk
from benchmarks.cases import SEED, Case, Shape
from benchmarks.gpu_clock import Call, Clock, Row
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
#: Bytes that the calls of a graph touch together, several times the L2 cache, where so many calls are enough.
ROTATED, MOST_CALLS = 256 << 20, 128
#: The loop whose steps read the timestep on the host: no graph can hold it.
THEIRS = "diffusers DDIM"


@dataclass
class Budget:
    """Seconds for all figures, of which every table may take its part."""

    seconds: float
    begun: float = field(default_factory=time.time)

    def spent(self, part: float = 1.0) -> bool:
        return time.time() - self.begun > self.seconds * part


@cache
def own_generator(device: str) -> torch.Generator:
    """Torch's own one may refuse to draw after a capture that failed."""
    return torch.Generator(device).manual_seed(SEED)


def normal(shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
    """Made on the GPU: on the host 200 MB of normal numbers take seconds."""
    return torch.randn(shape, generator=own_generator(DEVICE), device=DEVICE).to(dtype)


def inputs_of(case: Case, shape: Shape, dtype: torch.dtype) -> list[Tensor]:
    """The inputs of a call."""
    tensors = [normal(shape, dtype) for _ in range(case.tensors)]
    numbers = [torch.linspace(1.0 + k, 2.0 + k, shape[0], device=DEVICE) for k in range(case.per_sample)]
    states = [
        torch.randint(-(2**34), 2**34, shape, generator=own_generator(DEVICE), device=DEVICE)
        for _ in range(case.states)
    ]
    return [*tensors, *numbers, *states]


def sets_of(least: int) -> int:
    """How many calls, of so many bytes each, a graph has."""
    return max(1, min(MOST_CALLS, ROTATED // least + 1))


def contestants(case: Case, compile_too: bool) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Ours, and what people write in its place."""
    yield "ours", case.measured(case.ours)
    yield "eager", case.measured(case.eager)
    if compile_too:
        torch.compiler.reset()
        yield "compile", case.measured(torch.compile(case.eager, dynamic=False, fullgraph=True))


def kernels(clock: Clock, budget: Budget, compile_too: bool, copy: float | None) -> Iterator[Row]:
    """Every case at every shape, in microseconds, and the part of a copy's bandwidth that ours reaches."""
    cases = [case for name in OPS for case in FAMILIES[name]]
    # The first shape of every case comes first: what the time does not reach is a shape, not a case.
    for k, case, dtype in itertools.product(range(len(SHAPES)), cases, DTYPES):
        shapes = LOSS_SHAPES if case.trains else SHAPES
        if k >= len(shapes):
            continue
        if budget.spent(0.8):
            break
        row: Row = {"case": case.name, "shape": "×".join(map(str, shapes[k])), "dtype": dtype}
        with clock.noting(row, "case"):
            time_case(clock, row, case, shapes[k], DTYPES[dtype], compile_too, copy)
        print(" ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
        yield row


def time_case(
    clock: Clock, row: Row, case: Case, shape: Shape, dtype: torch.dtype, compile_too: bool, copy: float | None
) -> None:
    """Fill the row of a case at a shape."""
    least = case.least_bytes(shape, dtype)
    sets = sets_of(least)
    row |= {"MB": least / 1e6, "MB together": least * sets / 1e6}
    held = [inputs_of(case, shape, dtype) for _ in range(sets)]
    with torch.set_grad_enabled(case.trains):
        for name, function in contestants(case, compile_too and math.prod(shape) < 10**6):
            calls = [partial(function, *x, **case.coefficients) for x in held]
            clock.attempt(row, name, partial(clock.graph, calls * max(1, 8 // sets)))
            if name == "ours" and shape in (SHAPES[0], LOSS_SHAPES[0]):
                clock.attempt(row, "operations", partial(clock.operations, calls[0]))
    # What stays in the L2 cache says nothing about the memory.
    if copy and "ours" in row and least * sets >= ROTATED:
        row["of copy"] = least / row["ours"] / 1e6 / copy


def bounds(clock: Clock) -> Iterator[Row]:
    """What a copy and torch's own generator reach."""
    for count in (1 << 28, 1 << 20):
        sources = [normal((count,)) for _ in range(sets_of(8 * count))]
        copies = [partial(torch.empty_like(x).copy_, x) for x in sources]
        draws = [partial(torch.randn, count, device=DEVICE)] * len(copies)
        row: Row = {"MB": count * 4 / 1e6}
        clock.attempt(row, "copy µs", partial(clock.graph, copies * max(1, 4 // len(copies))))
        if "copy µs" in row:
            row["copy TB/s"] = 8 * count / row["copy µs"] / 1e6
        clock.attempt(row, "torch.randn µs", partial(clock.graph, draws * max(1, 4 // len(draws))))
        yield row


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


def hosts(clock: Clock, budget: Budget, compile_too: bool) -> Iterator[Row]:
    """Microseconds of the host for a call, and from a call to its end where it is compiled into a graph."""
    for case in (case for name in OPS for case in FAMILIES[name]):
        if budget.spent(0.3):
            break
        x, row = inputs_of(case, SMALL, torch.float32), {"case": case.name}
        with torch.set_grad_enabled(case.trains):
            for name, function in contestants(case, compile_too):
                clock.attempt(row, name, partial(clock.host, partial(function, *x, **case.coefficients)))
            with past_the_dispatcher():
                direct = partial(case.measured(case.ours), *x, **case.coefficients)
                clock.attempt(row, "past it", partial(clock.host, direct))
            if compile_too:
                torch.compiler.reset()
                fast = case.measured(torch.compile(case.eager, mode="reduce-overhead"))
                clock.attempt(row, "reduce-overhead", partial(clock.host, partial(fast, *x, **case.coefficients)))
        yield row
    small, row = normal((1, 64)), {"case": "torch.add"}
    clock.attempt(row, "ours", partial(clock.host, partial(torch.add, small, small)))
    yield row


def network(channels: int = 64) -> torch.nn.Module:
    """Something to step with, in bfloat16."""
    inner: list[torch.nn.Module] = []
    for _ in range(6):
        convolution = torch.nn.Conv2d(channels, channels, 3, padding=1)
        inner += [torch.nn.GroupNorm(8, channels), torch.nn.SiLU(), convolution]
    ends = torch.nn.Conv2d(4, channels, 3, padding=1), torch.nn.Conv2d(channels, 4, 3, padding=1)
    return torch.nn.Sequential(ends[0], *inner, ends[1]).to(DEVICE, torch.bfloat16)


def loops(clock: Clock, steps: int = 50, side: int = 64) -> Iterator[Row]:
    """Samplers from end to end, each call of the loop from Python and the whole loop in one graph."""
    net, schedule = network(), vp_schedule(steps)

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
        z = normal((batch, 4, side, side))
        runs: dict[str, Call] = {
            "network alone": partial(alone, z),
            "ddim as written": partial(written, z),
            "ddim_sample": partial(ddim_sample, model, z, schedule),
            "bdia_sample, floats": partial(bdia_sample, model, z, schedule, gamma=0.96, exact=False),
            "bdia_sample": partial(bdia_sample, model, z, schedule, gamma=0.96),
        }
        absent: Row = {}
        with clock.noting(absent, "loop"):
            runs |= diffusers_loops(model, z, steps)
        for name, run in runs.items():
            row: Row = {"loop": name, "batch": batch}
            clock.attempt(row, "µs", partial(clock.wall, run))
            if name != THEIRS:
                clock.attempt(row, "µs, graph", partial(clock.graph, [run]))
            yield row
        if absent:
            yield {"loop": THEIRS, "batch": batch, **absent}


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
    for name, change in ((THEIRS, lambda x: x), (f"{THEIRS}, accelerated", accelerate_scheduler)):
        scheduler = change(DDIMScheduler())
        scheduler.set_timesteps(steps, device=DEVICE)
        found[name] = partial(run, scheduler)
    return found


def without_benchmark(dtype: torch.dtype) -> None:
    """The kernels that no case runs: fixed-point states back, seeds, pairs of a sample, losses with element weights."""
    x, weight = normal(SHAPES[4], dtype), normal(SHAPES[4]).abs()
    bk.fixed_point_decode(bk.fixed_point_encode(x), dtype=dtype)
    bk.fold_in(torch.arange(1 << 24, device=DEVICE), 7)
    bk.noisy_pair(x, 0.3, 0.7, seed=SEED, step=0)
    with torch.enable_grad():
        bk.pseudo_huber(x.clone().requires_grad_(), x.flip(0), weight=weight).backward()


def once() -> None:
    """Every kernel once at a large size, for a profiler."""
    for dtype in DTYPES.values():
        without_benchmark(dtype)
        for case in (case for name in OPS for case in FAMILIES[name]):
            for shape in LOSS_SHAPES[1:3] if case.trains else SHAPES[4:5]:
                with torch.set_grad_enabled(case.trains):
                    case.measured(case.ours)(*inputs_of(case, shape, dtype), **case.coefficients)


def measured(
    clock: Clock, seconds: float, compile_too: bool, keep: Callable[[dict[str, Any]], object] = lambda found: None
) -> dict[str, Any]:
    """All tables, as far as the time goes; each is kept with those before it as soon as it is there."""
    budget = Budget(seconds)
    found: dict[str, Any] = {"backend": backend.describe()}

    def fill(name: str, rows: Iterable[Row]) -> None:
        table, end = found.setdefault(name, []), Row()
        with clock.noting(end, "table"):
            for row in rows:
                table.append(row)
        table += [end] if end else []
        keep(found)

    with torch.no_grad():
        fill("bounds", bounds(clock))
        fill("host, µs a call", hosts(clock, budget, compile_too))
        fill("loops", loops(clock))
    copy = next((row["copy TB/s"] for row in found["bounds"] if "copy TB/s" in row), None)
    fill("kernels, µs", kernels(clock, budget, compile_too, copy))
    return found


def stopped(found: dict[str, Any]) -> list[str]:
    """The tables that end before their last row."""
    tables = {name: rows for name, rows in found.items() if isinstance(rows, list)}
    return [name for name, rows in tables.items() if any("table failed" in row for row in rows)]


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

    def keep(found: dict[str, Any]) -> None:
        if options.json is not None:
            part = options.json.with_suffix(".part")  # whoever is stopped while it writes leaves the tables of before
            part.write_text(json.dumps(found, indent=1) + "\n")
            part.replace(options.json)

    unfinished = stopped(measured(Clock(), options.seconds, not options.no_compile, keep))
    if unfinished:
        print(f"tables that could not be finished: {', '.join(unfinished)}", file=sys.stderr)
    return int(bool(unfinished))


if __name__ == "__main__":
    sys.exit(main())
