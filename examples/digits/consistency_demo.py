"""The consistency model's part of the demo: one picture and three tables; and the check against eager code."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from examples.digits.consistency_measurements import (
    EAGER,
    INVERSION,
    ONE_LEAP,
    SAMPLING,
    TWO_LEAPS,
    SampleFigures,
    draw,
    judge,
    reconstruct,
    sample_labels,
    squared_error,
    time_sampling,
    to_noise,
    without_labels,
)
from examples.digits.consistency_network import ConsistencyNetwork
from examples.digits.consistency_objective import load_network
from examples.digits.consistency_picture import compose, draw_picture, save_picture
from examples.digits.data import load_split

TIMED = {1: 30, 100: 6}


class Agreement(NamedTuple):
    """The difference of two drawings of one picture: in the images, where paper is -1 and ink 1, and in grey levels."""

    images: float
    picture: int


def run_consistency_demo(output: Path, *, weights: Path, seed: int, console: Console) -> None:
    """Draw the picture to `output` and print the measurements.

    Raises FileNotFoundError where the weights are missing.
    """
    network = load_network(weights)
    with console.status("consistency model: samples, reconstructions, picture"):
        save_picture(compose(network, seed=seed), output)
        tables = [sample_table(network, seed=seed), reconstruction_table(network, seed=seed), timing_table(network)]
    for table in tables:
        console.print(table)
    console.print(f"picture: {output}", soft_wrap=True)


def sample_table(network: ConsistencyNetwork, *, seed: int) -> Table:
    """Return how samples compare with real digits."""
    held_out = load_split().held_out
    counts = len(sample_labels(labelled=True)), len(held_out.labels)
    table = _table(
        f"{counts[0]} new digits from noise, and {counts[1]} held-out real ones",
        ("evaluations", "labels", "p ≥ 0.9", "classes", "Fréchet, pixels", "features"),
    )
    for labelled in (False, True):
        labels = sample_labels(labelled=labelled)
        shown = "given" if labelled else "none"
        for name, schedule in SAMPLING.items():
            found = judge(draw(network, labels, schedule, seed=seed), labels)
            table.add_row(_short(name), shown, *_cells(found))
        real = held_out if labelled else without_labels(held_out)
        table.add_row("real digits", "own" if labelled else "any", *_cells(judge(real.images, real.labels)))
        table.add_section()
    return table


def reconstruction_table(network: ConsistencyNetwork, *, seed: int) -> Table:
    """Return the reconstruction errors of real digits, by one leap and by two."""
    held_out = load_split().held_out
    title = f"{len(held_out.labels)} real digits to noise and back: mean squared error, images in [0, 1]"
    ways = {"1": ONE_LEAP, "2": TWO_LEAPS}
    columns = (f"back in {back}, {labels}" for labels in ("no labels", "labels") for back in ways)
    table = _table(title, ("to noise in", *columns, "std of the noise"))
    for name, schedule in INVERSION.items():
        errors = [
            squared_error(reconstruct(network, digits, schedule, seed=seed, back=back), digits.images)
            for digits in (without_labels(held_out), held_out)
            for back in ways.values()
        ]
        noise = to_noise(network, without_labels(held_out), schedule, seed=seed) / schedule.levels[0]
        table.add_row(_short(name), *(f"{error:.5f}" for error in errors), f"{noise.std().item():.2f}")
    return table


def timing_table(network: ConsistencyNetwork) -> Table:
    """Return the time of an image, fused and eager."""
    title = f"milliseconds per image, including the network, float32, median, {torch.get_num_threads()} thread(s)"
    columns = [f"{count} at a time, {kind}" for count in TIMED for kind in ("fused", "eager")]
    table = _table(title, ("evaluations", *columns))
    for name, schedule in SAMPLING.items():
        times = [time_sampling(network, schedule, count, repeats=repeats) for count, repeats in TIMED.items()]
        table.add_row(_short(name), *(f"{t * 1e3:.2f}" for pair in times for t in pair))
    return table


def compare(network: ConsistencyNetwork, *, seed: int) -> Agreement:
    """Return the difference of the fused and the eager picture."""
    fused, plain = (compose(network, seed=seed), compose(network, seed=seed, by=EAGER))
    pairs = zip(fused.tensors(), plain.tensors(), strict=True)
    images = max((a.double() - b.double()).abs().max().item() for a, b in pairs)
    pictures = [draw_picture(panels).pixels().astype(np.int16) for panels in (fused, plain)]
    return Agreement(images, int(np.abs(pictures[0] - pictures[1]).max()))


def _cells(found: SampleFigures) -> tuple[str, str, str, str]:
    return f"{found.confident:.1%}", f"{found.classes}", f"{found.pixels:.2f}", f"{found.features:.2f}"


def _short(name: str) -> str:
    return name.replace(" evaluations", "").replace(" evaluation", "")


def _table(title: str, headings: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=not i)
    return table
