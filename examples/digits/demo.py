"""The demo: real digits to noise and back, new digits from noise, one picture and four tables."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bicm_diffusion.schedules import Schedule, vp_schedule
from bicm_kernels import normal
from examples.digits.data import CLASSES, Digits, load_split, one_per_class
from examples.digits.denoising import load_denoiser
from examples.digits.editing import EDITORS, edit, edit_table, round_trip_table, save_edits, targets_of
from examples.digits.measurements import (
    GUIDANCE_SCALE,
    INVERTERS,
    METHODS,
    Reconstruction,
    Timing,
    draw,
    reconstruct,
    time_steps,
)
from examples.digits.picture import Panels, save_picture
from examples.digits.recognition import recognised

IMAGES_PER_CLASS = 3
SAMPLES_PER_CLASS = 8
# The sampler's state dtype, and the dtype in which the network computes.
DTYPES = {torch.float64: torch.float64, torch.float32: torch.float32, torch.bfloat16: torch.float32}
TIMED_SHAPES = {(100, 1, 8, 8): 300, (64, 3, 64, 64): 50}


def run_demo(output: Path, *, weights: Path, steps: int, seed: int, console: Console) -> None:
    """Run the whole demo, write the picture to `output` and print the tables.

    Raises FileNotFoundError where the weights are missing.
    """
    schedule = vp_schedule(steps)
    real = real_digits()
    results: dict[torch.dtype, list[Reconstruction]] = {}
    samples: list[torch.Tensor] = []
    labels = torch.arange(CLASSES).repeat(SAMPLES_PER_CLASS)
    with console.status("loading the network") as status:
        for dtype, network_dtype in DTYPES.items():
            network = load_denoiser(weights, dtype=network_dtype)
            for method in INVERTERS:
                status.update(f"real digits to noise and back: {method.name}, {_name(dtype)}")
                results.setdefault(dtype, []).append(reconstruct(method, network, real, schedule, dtype))
        network = load_denoiser(weights)
        noise = normal((len(labels), *real.images.shape[1:]), seed=seed)
        for method in METHODS:
            status.update(f"new digits from noise: {method.name}")
            samples.append(draw(method, network, noise, labels, schedule))
        status.update("giving real digits another class")
        edits = [edit(method, network, real, targets_of(real), schedule) for method in EDITORS]
        status.update("timing the step ops")
        timings = [t for shape, repeats in TIMED_SHAPES.items() for t in time_steps(shape, schedule, repeats=repeats)]
        status.update("drawing the picture")
        ddim, *_, bdia = results[torch.float32]
        panels = Panels(steps, real.images, [ddim, bdia], [(m.name, s) for m, s in zip(METHODS, samples, strict=True)])
        save_picture(panels, output)
    console.print(reconstruction_table(results, schedule, len(real.images)))
    console.print(sample_table(samples, labels))
    console.print(edit_table(edits, real, schedule))
    console.print(timing_table(timings))
    console.print(f"picture: {output}", soft_wrap=True)


def run_edits(real: Digits, output: Path, *, weights: Path, steps: int, console: Console) -> None:
    """Edit digits to another class by every method, write the picture to `output` and print the errors of round trips.

    Raises FileNotFoundError where the weights are missing.
    """
    schedule = vp_schedule(steps)
    with console.status("giving real digits another class") as status:
        networks = {dtype: load_denoiser(weights, dtype=dtype) for dtype in (torch.float64, torch.float32)}
        edits = [edit(method, networks[torch.float32], real, targets_of(real), schedule) for method in EDITORS]
        save_edits(edits, real, output)
        status.update("round trips by every method")
        ten = Digits(real.images[:CLASSES], real.labels[:CLASSES])
        tables = [round_trip_table(networks, ten, schedule, from_noise=from_noise) for from_noise in (True, False)]
    console.print(edit_table(edits, real, schedule), *tables, sep="\n")
    console.print(f"picture: {output}", soft_wrap=True)


def real_digits() -> Digits:
    """Return `IMAGES_PER_CLASS` held-out digits of every class; the first ten are one of each, in order."""
    rows = [one_per_class(load_split().held_out, rank=rank) for rank in range(IMAGES_PER_CLASS)]
    return Digits(torch.cat([r.images for r in rows]), torch.cat([r.labels for r in rows]))


def reconstruction_table(results: dict[torch.dtype, list[Reconstruction]], schedule: Schedule, count: int) -> Table:
    """Return the errors of every method and dtype."""
    way = f"{count} real digits → noise → digits, {schedule.steps} steps each way"
    table = Table(title=f"{way}: errors (paper -1, ink 1)", title_justify="left")
    table.add_column("method", no_wrap=True)
    for dtype in results:
        table.add_column(f"{_name(dtype)}\nmax", justify="right")
        table.add_column("\nMSE", justify="right")
    for row in zip(*results.values(), strict=True):
        cells = [f"{value:.1e}" if value else "0" for r in row for value in (r.max_error, r.mean_squared_error)]
        table.add_row(row[0].method.name, *cells)
    return table


def sample_table(samples: list[torch.Tensor], labels: torch.Tensor) -> Table:
    """Return the number of samples that a classifier trained on real digits recognises."""
    held_out = load_split().held_out
    table = Table(
        title=f"{len(labels)} new digits, guidance scale {GUIDANCE_SCALE}, judged by a classifier",
        title_justify="left",
    )
    for heading in ("images", "recognised", "with probability ≥ 0.9"):
        table.add_column(heading, justify="left" if heading == "images" else "right")
    rows = [(m.name, s, labels) for m, s in zip(METHODS, samples, strict=True)]
    for name, images, wanted in [*rows, ("real held-out digits", held_out.images, held_out.labels)]:
        probability = recognised(images, wanted)
        table.add_row(name, f"{(probability > 0.5).mean():.1%}", f"{(probability >= 0.9).mean():.1%}")
    return table


def timing_table(timings: list[Timing]) -> Table:
    """Return the times of the fused and the eager arithmetic."""
    table = Table(
        title=f"sampler arithmetic without the network, float32, median, {torch.get_num_threads()} thread(s)",
        title_justify="left",
    )
    for heading in ("op", "shape", "fused, µs", "eager, µs", "eager / fused"):
        table.add_column(heading, justify="left" if heading in ("op", "shape") else "right")
    for t in timings:
        shape = " × ".join(map(str, t.shape))
        table.add_row(t.name, shape, f"{t.fused * 1e6:.1f}", f"{t.eager * 1e6:.1f}", f"{t.eager / t.fused:.1f}×")
    return table


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
