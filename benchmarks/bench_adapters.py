"""``python -m benchmarks.bench_adapters``: a step of each diffusers scheduler and of its accelerated form, in one run.

A step is `scale_model_input` and `step` as pipelines call them, on one thread, in a loop of twenty; `set_timesteps` is
called once, before. Every scheduler runs in a separate process, because an allocator's speed depends on what the
process freed before. Needs diffusers: the extra `[diffusers]`.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import click
import diffusers
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cases import SEED, Shape
from benchmarks.isolation import keep_memory
from benchmarks.measurement import threads
from benchmarks.sizes import shapes_given
from benchmarks.timing import CLOCKS, QUICK, Call, Effort, interleave
from bicm_diffusion.adapters.diffusers import accelerate_scheduler
from bicm_diffusion.adapters.diffusers.accelerate import COVERED
from bicm_kernels import torch_randn

#: The schedulers by their names in the table.
CLASSES = {cls.__name__.removesuffix("Scheduler"): cls for cls in COVERED}

STEPS = 20
SHAPES: tuple[Shape, ...] = ((1, 4, 64, 64), (16, 4, 128, 128))


def steps_of(scheduler: Any, shape: Shape) -> Call:
    """A call that takes the next step of an endless sequence of loops."""
    generator = torch.Generator().manual_seed(SEED)
    start, output = (torch.randn(shape, generator=generator) for _ in range(2))

    scheduler.set_timesteps(STEPS)
    timesteps = list(scheduler.timesteps)
    scales = hasattr(scheduler, "scale_model_input")  # flow matching's have none
    takes_last = "timestep_back" in inspect.signature(scheduler.step).parameters  # CogVideoX's DPM
    fresh = {name: copy.copy(value) if isinstance(value, list) else value for name, value in vars(scheduler).items()}

    def walk() -> Iterator[None]:
        while True:
            for name, value in fresh.items():
                setattr(scheduler, name, list(value) if isinstance(value, list) else value)
            x = start * float(getattr(scheduler, "init_noise_sigma", 1.0))
            x0, back = None, None
            for t in timesteps:
                if scales:
                    scheduler.scale_model_input(x, t)
                if takes_last:
                    x, x0 = scheduler.step(output, x0, t, back, x, return_dict=False)
                    back = t
                else:
                    x = scheduler.step(output, t, x).prev_sample
                yield

    walking = walk()
    return lambda: next(walking)


Row = tuple[str, dict[str, float]]


def measure(name: str, shapes: tuple[Shape, ...], keeps_memory: bool, quick: bool, clock: str) -> list[Row]:
    """Medians in microseconds at every shape; without keeps_memory, at the last one also where memory is kept."""
    cls = CLASSES[name]
    effort = QUICK if quick else Effort(rounds=11, least_rounds=5, sample=2e-2, budget=1.5)

    def row(shape: Shape, label: str = "") -> Row:
        contestants = {
            "original": cls(),
            "accelerated": accelerate_scheduler(cls()),
            "keyed": accelerate_scheduler(cls(), noise="keyed"),
        }
        calls = {key: steps_of(scheduler, shape) for key, scheduler in contestants.items()}
        times = interleave(calls, effort, CLOCKS[clock])
        # Separate, because they empty the cache.
        draws = {"torch's draw": partial(torch.randn, shape), "our draw": partial(torch_randn, shape)}
        times |= interleave(draws, effort, CLOCKS[clock])
        return "×".join(map(str, shape)) + label, {key: t.median * 1e6 for key, t in times.items()}

    with torch.no_grad(), threads(1):
        if keeps_memory:
            keep_memory()
            return [row(shape, ", memory kept") for shape in shapes]
        rows = [row(shape) for shape in shapes]
        keep_memory()
        return [*rows, row(shapes[-1], ", memory kept")]


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(CLASSES)), metavar="[NAMES]...")
@click.option("--shapes", callback=shapes_given, help="As 1x4x64x64,16x4x128x128, the largest last.")
@click.option(
    "--keep-memory",
    "keeps_memory",
    is_flag=True,
    help="Keep memory at every shape: page faults are no part of the times.",
)
@click.option("--quick", is_flag=True, help="A few short rounds: a smoke test.")
@click.option("--clock", type=click.Choice(list(CLOCKS)), default="wall", help="processor: this thread's own time.")
def main(names: tuple[str, ...], shapes: tuple[Shape, ...] | None, keeps_memory: bool, quick: bool, clock: str) -> None:
    """Measure accelerated schedulers, all or those named, against the originals, with torch's noise and keyed noise."""
    table = Table(
        title=f"diffusers {diffusers.__version__}, torch {torch.__version__}, one thread, float32, {clock} time, µs"
    )
    columns = ("original", "accelerated", "×", "keyed noise", "×", "torch's draw alone", "ours", "×")
    for column in ("scheduler", "shape", *columns):
        table.add_column(column, justify="left" if column in ("scheduler", "shape") else "right")
    for name in names or CLASSES:
        with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
            rows = pool.submit(measure, name, shapes or SHAPES, keeps_memory, quick, clock).result()
        for shape, times in rows:
            assert all(map(math.isfinite, times.values()))
            original, accelerated, keyed, draw, our_draw = times.values()
            pairs = ((original, accelerated), (original, keyed), (draw, our_draw))
            shown = [cell for pair in pairs for cell in (f"{pair[1]:.1f}", f"{pair[0] / pair[1]:.1f}")]
            cells = [f"{original:.1f}", *shown[:4], f"{draw:.1f}", *shown[4:]]
            table.add_row(name, shape, *cells)
    Console(width=150).print(table)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.bench_adapters")
