"""The consistency model's part of the demo: one picture and three tables; and the checker that draws it eagerly."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from rich.console import Console
from rich.table import Table

from bicm_diffusion.digits.consistency_measurements import (
    EAGER,
    INVERSION,
    SAMPLING,
    SampleFigures,
    draw,
    judge,
    reconstruct,
    sample_labels,
    squared_error,
    time_sampling,
    without_labels,
)
from bicm_diffusion.digits.consistency_network import ConsistencyNetwork
from bicm_diffusion.digits.consistency_picture import ConsistencyPanels, compose, draw_picture, save_picture
from bicm_diffusion.digits.consistency_training import load_network
from bicm_diffusion.digits.data import load_split

TIMED = {1: 40, 100: 8}


class Agreement(NamedTuple):
    """How far two drawings of one picture are apart: in the images, where paper is -1 and ink 1, and in grey levels."""

    images: float
    picture: int


def run_consistency_demo(output: Path, *, weights: Path, seed: int, console: Console) -> None:
    """Draw the picture to `output` and print what was measured.

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
    count = len(sample_labels(labelled=True))
    table = _table(
        f"{count} new digits from noise, beside {len(held_out.labels)} real ones the model has not seen",
        ("", "with probability ≥ 0.9", "classes", "Fréchet distance:\npixels", "\nfeatures"),
    )
    real = held_out.labels
    table.add_row("real digits, recognised as their class", *_cells(judge(held_out.images, real)))
    table.add_row("real digits, recognised as any", *_cells(judge(held_out.images, without_labels(held_out).labels)))
    for labelled in (False, True):
        table.add_section()
        labels = sample_labels(labelled=labelled)
        for name, schedule in SAMPLING.items():
            found = judge(draw(network, labels, schedule, seed=seed), labels)
            table.add_row(f"{name}, {'with labels' if labelled else 'without labels'}", *_cells(found))
    return table


def reconstruction_table(network: ConsistencyNetwork, *, seed: int) -> Table:
    """Return how well real digits return from noise."""
    held_out = load_split().held_out
    count = len(held_out.labels)
    title = f"{count} real digits to noise, and back in one evaluation: mean squared error, images in [0, 1]"
    table = _table(title, ("evaluations to noise", "without labels", "with labels", "deviation of the noise"))
    for name, schedule in INVERSION.items():
        noise, images = reconstruct(network, without_labels(held_out), schedule, seed=seed)
        labelled = reconstruct(network, held_out, schedule, seed=seed)[1]
        errors = (f"{squared_error(x, held_out.images):.5f}" for x in (images, labelled))
        table.add_row(name, *errors, f"{noise.std().item():.3f}")
    return table


def timing_table(network: ConsistencyNetwork) -> Table:
    """Return the time of an image, the network included."""
    title = f"milliseconds an image, the network included, float32, median, {torch.get_num_threads()} thread(s)"
    columns = [f"{count} at a time:\n{kind}" for count in TIMED for kind in ("fused", "eager")]
    table = _table(title, ("", *columns))
    for name, schedule in SAMPLING.items():
        times = [time_sampling(network, schedule, count, repeats=repeats) for count, repeats in TIMED.items()]
        table.add_row(name, *(f"{t * 1e3:.2f}" for pair in times for t in pair))
    return table


def compare(network: ConsistencyNetwork, *, seed: int) -> Agreement:
    """Return how far the fused picture and the eager one are apart."""
    fused, plain = (compose(network, seed=seed), compose(network, seed=seed, by=EAGER))
    pairs = zip(fused.tensors(), plain.tensors(), strict=True)
    images = max((a.double() - b.double()).abs().max().item() for a, b in pairs)
    pictures = [_pixels(panels).astype(np.int16) for panels in (fused, plain)]
    return Agreement(images, int(np.abs(pictures[0] - pictures[1]).max()))


def _pixels(panels: ConsistencyPanels) -> np.ndarray:
    canvas = draw_picture(panels).figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def _cells(found: SampleFigures) -> tuple[str, str, str, str]:
    return f"{found.confident:.1%}", f"{found.classes}", f"{found.pixels:.2f}", f"{found.features:.2f}"


def _table(title: str, headings: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left")
    return table
