"""The picture of the consistency model: digits from one to four evaluations, reconstructions, and interpolations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from examples.digits.canvas import DPI, NOISE, PAPER, Canvas, Row
from examples.digits.consistency_measurements import (
    FUSED,
    INTERPOLATION,
    INVERSION,
    SAMPLING,
    T_MAX,
    TWO_LEAPS,
    Implementation,
    draw,
    reconstruct,
    squared_error,
    to_noise,
)
from examples.digits.consistency_network import ConsistencyNetwork
from examples.digits.data import CLASSES, Digits, load_split, one_per_class
from examples.digits.network import NO_LABEL

WIDTH, HEIGHT = 17.2, 8.75
LEFT, MIDDLE = 0.55, 9.05
TITLE = "Handwritten digits in one to four evaluations"
SUMMARY = (
    "A bidirectional consistency model leaps along the trajectory between noise and image, both ways: one evaluation"
    " draws a digit, a few take a real digit to its noise, and two return it."
)
PAIRS = ((3, 8), (0, 6), (4, 9))


@dataclass(frozen=True)
class ConsistencyPanels:
    """The contents of the picture: ten images (10, 1, 8, 8) per row, by name.

    noise: what two evaluations find behind the real digits, over its level. interpolations: by the two digits' classes.
    """

    real: Tensor
    noise: Tensor
    reconstructions: dict[str, Tensor]
    labelled: dict[str, Tensor]
    unlabelled: dict[str, Tensor]
    interpolations: dict[tuple[int, int], Tensor]

    def tensors(self) -> list[Tensor]:
        """Return all images of the picture."""
        found = [self.real, self.noise, *self.reconstructions.values()]
        return [*found, *self.labelled.values(), *self.unlabelled.values(), *self.interpolations.values()]


def compose(network: ConsistencyNetwork, *, seed: int, by: Implementation = FUSED) -> ConsistencyPanels:
    """Return the panels, computed by the samplers `by`."""
    real = one_per_class(load_split().held_out)
    none = torch.full((CLASSES,), NO_LABEL)
    unlabelled_real = Digits(real.images, none)
    return ConsistencyPanels(
        real.images,
        to_noise(network, unlabelled_real, INVERSION["2 evaluations"], seed=seed, by=by) / T_MAX,
        {name: reconstruct(network, unlabelled_real, s, seed=seed, by=by) for name, s in INVERSION.items()},
        {name: draw(network, torch.arange(CLASSES), schedule, seed=seed, by=by) for name, schedule in SAMPLING.items()},
        {name: draw(network, none, schedule, seed=seed, by=by) for name, schedule in SAMPLING.items()},
        {pair: interpolate(network, real, pair, seed=seed, by=by) for pair in PAIRS},
    )


def interpolate(
    network: ConsistencyNetwork, real: Digits, pair: tuple[int, int], *, seed: int, by: Implementation = FUSED
) -> Tensor:
    """Return ten images from one real digit to another: inverted, their noises interpolated, and sampled; no labels."""
    ends = real.images[list(pair)]
    none = {"labels": torch.full((CLASSES,), NO_LABEL)}
    # Two samples of one batch have different noises: equal noises would be interpolated with themselves.
    noise = by.invert(network, ends, INTERPOLATION, seed=seed, extra_args={"labels": none["labels"][:2]})
    first, second = (end.expand(CLASSES, *end.shape).contiguous() for end in noise)
    between = by.slerp(first, second, torch.linspace(0, 1, CLASSES, dtype=torch.float64))
    return by.sample(network, between, TWO_LEAPS, seed=seed, extra_args=none)


def draw_picture(panels: ConsistencyPanels) -> Canvas:
    """Return the drawn panels."""
    canvas = Canvas(WIDTH, HEIGHT, TITLE, SUMMARY)
    note = "without labels; noise of the lowest level is added, then each evaluation climbs; two return"
    bottom = canvas.column(LEFT, "Real images inverted and returned", note, _reconstruction_rows(panels), 0.14)
    rows = [
        [
            Row(images, f"{pair[0]} to {pair[1]}", "" if i else "along the arc between noises")
            for i, (pair, images) in enumerate(panels.interpolations.items())
        ]
    ]
    note = (
        f"inverted in {len(INTERPOLATION.levels) - 1} evaluations, sampled in two; first and last are reconstructions"
    )
    canvas.column(LEFT, "From one real image to another", note, rows, 0.0, top=bottom + 1.2)
    note = "one noise a column; the same noise in every row"
    groups = [
        [Row(images, name, note) for name, images in block.items()]
        for block, note in ((panels.labelled, "with a label"), (panels.unlabelled, "without a label"))
    ]
    canvas.column(MIDDLE, "New images from noise", note, groups, 0.3)
    return canvas


def save_picture(panels: ConsistencyPanels, path: Path) -> None:
    """Draw the panels and write them to `path`, whose ending chooses the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_picture(panels).figure.savefig(path, dpi=DPI, facecolor=PAPER)


def _reconstruction_rows(panels: ConsistencyPanels) -> list[list[Row]]:
    rows = [Row(panels.real, "Real digits", "the model has never seen them")]
    rows.append(Row(panels.noise, "The noise behind them", "by 2 evaluations", NOISE))
    for name, images in panels.reconstructions.items():
        error = f"{squared_error(images, panels.real):.4f}"
        rows.append(Row(images, f"Back after {name}", f"mean squared error {error}"))
    return [rows[:1], rows[1:2], rows[2:]]
