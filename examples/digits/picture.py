"""The picture of the noise predictor: real digits inverted to noise and back, and new digits from noise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from examples.digits.canvas import DPI, ERRORS, LABEL_WIDTH, NOISE, PAPER, Canvas, Row
from examples.digits.data import CLASSES
from examples.digits.measurements import GUIDANCE_SCALE, Reconstruction

WIDTH, HEIGHT = 17.2, 8.1
LEFT, MIDDLE = 0.55, 9.05
GROUP_GAPS = {"inversion": 0.44, "samples": 0.2}
SAMPLE_ROWS = 3
TITLE = "Handwritten digits, to noise and back"
SUMMARY = (
    "A diffusion model turns noise into images. Run backwards, it finds the noise behind a real image; run"
    " forwards again, it should return that very image. DDIM returns a likeness, BDIA the image."
)


@dataclass(frozen=True)
class Panels:
    """The contents of the picture; the first ten images of every tensor are the digits 0 … 9, in order.

    reconstructions: DDIM's first, then that of exact BDIA. samples: (method, images) with at least thirty images each.
    """

    steps: int
    real: torch.Tensor
    reconstructions: list[Reconstruction]
    samples: list[tuple[str, torch.Tensor]]


def save_picture(panels: Panels, path: Path) -> None:
    """Draw the panels and write them to `path`, whose ending chooses the format."""
    canvas = Canvas(WIDTH, HEIGHT, TITLE, SUMMARY)
    note = f"{panels.steps} steps to noise and {panels.steps} steps back; BDIA's states are integers"
    bottom = canvas.column(LEFT, "Real images inverted", note, inversion_rows(panels), GROUP_GAPS["inversion"])
    meaning = "error of each pixel, where paper is −1 and ink is 1 (logarithmic colours)"
    canvas.colour_bar(LEFT + LABEL_WIDTH, bottom + 0.25, ERRORS, meaning)
    note = f"one column per class, the same noise for every method, guidance scale {GUIDANCE_SCALE}"
    canvas.column(MIDDLE, "New images from noise", note, sample_rows(panels), GROUP_GAPS["samples"])
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.figure.savefig(path, dpi=DPI, facecolor=PAPER)


def inversion_rows(panels: Panels) -> list[list[Row]]:
    """Return the groups of rows of the left column."""
    ddim, bdia = panels.reconstructions
    groups = [
        [Row(panels.real, "Real digits", "the model has never seen them")],
        [Row(bdia.noise, "The noise behind them", f"by {bdia.method.name}", NOISE)],
    ]
    for result in (ddim, bdia):
        name = result.method.name
        most = f"up to {_scientific(result.max_error)}" if result.max_error else "nothing: 0 in every pixel"
        lost = Row(result.error, "What was lost", most, ERRORS)
        groups.append([Row(result.images, f"Back by {name}", ""), lost])
    return groups


def sample_rows(panels: Panels) -> list[list[Row]]:
    """Return the groups of rows of the right column: every method from the same noise."""
    groups = []
    for name, images in panels.samples:
        rows = torch.split(images[: SAMPLE_ROWS * CLASSES], CLASSES)
        first = Row(rows[0], name, f"{panels.steps} steps")
        groups.append([first, *(Row(row, "", "") for row in rows[1:])])
    return groups


def _scientific(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return rf"${mantissa}\times10^{{{int(exponent)}}}$"
