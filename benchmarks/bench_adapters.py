"""``python -m benchmarks.bench_adapters``: a step of each diffusers scheduler beside its accelerated form, in one run.

A step is `scale_model_input` and `step` as pipelines call them, on one thread, in a loop of twenty; `set_timesteps` is
called once, before. It needs diffusers: the extra `[diffusers]`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import click
import diffusers
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cases import SEED, Shape
from benchmarks.measurement import threads
from benchmarks.timing import CLOCKS, QUICK, Call, Effort, interleave
from bicm_diffusion.adapters.diffusers import accelerate_scheduler
from bicm_diffusion.adapters.diffusers.accelerate import COVERED
from bicm_kernels import generator_normal

STEPS = 20
SHAPES: tuple[Shape, ...] = ((1, 4, 64, 64), (16, 4, 128, 128))


def steps_of(scheduler: Any, shape: Shape) -> Call:
    """A call that takes the next step of an endless row of loops."""
    generator = torch.Generator().manual_seed(SEED)
    start, output = (torch.randn(shape, generator=generator) for _ in range(2))

    scheduler.set_timesteps(STEPS)
    timesteps = list(scheduler.timesteps)
    fresh = {name: copy.copy(value) if isinstance(value, list) else value for name, value in vars(scheduler).items()}

    def walk() -> Iterator[None]:
        while True:
            for name, value in fresh.items():
                setattr(scheduler, name, list(value) if isinstance(value, list) else value)
            x = start * float(scheduler.init_noise_sigma)
            for t in timesteps:
                scheduler.scale_model_input(x, t)
                x = scheduler.step(output, t, x).prev_sample
                yield

    walking = walk()
    return lambda: next(walking)


@click.command()
@click.option("--quick", is_flag=True, help="A few short rounds: a smoke test.")
@click.option("--clock", type=click.Choice(list(CLOCKS)), default="wall", help="processor: this thread's own time.")
def main(quick: bool, clock: str) -> None:
    """Measure every accelerated scheduler against the original, with torch's noise and with keyed noise."""
    effort = QUICK if quick else Effort(rounds=11, least_rounds=5, sample=2e-2, budget=1.5)
    table = Table(
        title=f"diffusers {diffusers.__version__}, torch {torch.__version__}, one thread, float32, {clock} time"
    )
    for column in ("scheduler", "shape", "original", "accelerated", "×", "keyed noise", "×"):
        table.add_column(column, justify="left" if column == "scheduler" else "right")
    # The allocator gives large blocks back to the system until it has seen one larger still, as beside any network.
    torch.empty(31 << 20, dtype=torch.uint8)
    with torch.no_grad(), threads(1):
        for cls in COVERED:
            for shape in SHAPES:
                contestants = {
                    "original": cls(),
                    "accelerated": accelerate_scheduler(cls()),
                    "keyed": accelerate_scheduler(cls(), noise="keyed"),
                }
                calls = {name: steps_of(scheduler, shape) for name, scheduler in contestants.items()}
                times = {k: t.median * 1e6 for k, t in interleave(calls, effort, CLOCKS[clock]).items()}
                original, accelerated, keyed = times["original"], times["accelerated"], times["keyed"]
                table.add_row(
                    cls.__name__.removesuffix("Scheduler"),
                    "×".join(map(str, shape)),
                    f"{original:.1f} µs",
                    f"{accelerated:.1f} µs",
                    f"{original / accelerated:.1f}",
                    f"{keyed:.1f} µs",
                    f"{original / keyed:.1f}",
                )
                assert all(map(math.isfinite, times.values()))
        for shape in SHAPES:
            draws = {"torch": partial(torch.randn, shape), "ours": partial(generator_normal, shape)}
            drawn = {k: t.median * 1e6 for k, t in interleave(draws, effort, CLOCKS[clock]).items()}
            row = f"{drawn['torch']:.1f} µs", f"{drawn['ours']:.1f} µs", f"{drawn['torch'] / drawn['ours']:.1f}"
            table.add_row("one draw of torch's generator", "×".join(map(str, shape)), *row)
    Console(width=120).print(table)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.bench_adapters")
