"""The demo's picture: real digits taken to noise and back, and new digits drawn from noise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.figure import Figure

from bicm_diffusion.digits.data import CLASSES, SIDE
from bicm_diffusion.digits.measurements import GUIDANCE_SCALE, Reconstruction

INK, GREY, PAPER = "#1b1f24", "#667079", "#ffffff"
WIDTH, HEIGHT = 17.2, 8.1  # inches; every length below is in inches too, from the top left corner
CELL, GAP = 0.5, 0.06
LEFT, MIDDLE, TOP = 0.55, 9.05, 2.2
LABEL_WIDTH = 2.2
GROUP_GAPS = {"inversion": 0.44, "samples": 0.2}
SAMPLE_ROWS = 3
SUMMARY = (
    "A diffusion model turns noise into images. Run backwards, it finds the noise behind a real image; run"
    " forwards again, it should return that very image. DDIM returns a likeness, BDIA the image."
)


@dataclass(frozen=True)
class Look:
    """How a row of images is coloured."""

    colours: Colormap
    scale: Normalize


DIGITS = Look(matplotlib.colormaps["Greys"], Normalize(-1.0, 1.0, clip=True))
NOISE = Look(matplotlib.colormaps["PuOr"], Normalize(-3.0, 3.0, clip=True))
ERRORS = Look(matplotlib.colormaps["magma"], LogNorm(1e-8, 1.0, clip=True))


@dataclass(frozen=True)
class Row:
    """Ten images (10, 1, 8, 8) side by side, with a name and a line of explanation."""

    images: torch.Tensor
    name: str
    note: str
    look: Look = DIGITS


@dataclass(frozen=True)
class Panels:
    """What the picture shows; the first ten images of every tensor are the digits 0 … 9, in order.

    reconstructions: DDIM's first, then BDIA's. samples: (method, images) with at least thirty images each.
    """

    steps: int
    real: torch.Tensor
    reconstructions: list[Reconstruction]
    samples: list[tuple[str, torch.Tensor]]


def save_picture(panels: Panels, path: Path) -> None:
    """Draw the panels and write them to `path`, whose ending chooses the format."""
    figure = Figure(figsize=(WIDTH, HEIGHT), facecolor=PAPER)
    FigureCanvasAgg(figure)
    _text(figure, LEFT, 0.35, "Handwritten digits, to noise and back", size=22, weight="bold")
    _text(figure, LEFT, 0.85, SUMMARY, size=11.5, colour=GREY)
    note = f"{panels.steps} steps to noise and {panels.steps} steps back, state in {_dtype_name(panels)}"
    bottom = _column(figure, LEFT, "Real images inverted", note, inversion_rows(panels), GROUP_GAPS["inversion"])
    _colour_bar(figure, LEFT + LABEL_WIDTH, bottom + 0.25)
    note = f"one column per class, the same noise for every method, guidance scale {GUIDANCE_SCALE}"
    _column(figure, MIDDLE, "New images from noise", note, sample_rows(panels), GROUP_GAPS["samples"])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, facecolor=PAPER)


def inversion_rows(panels: Panels) -> list[list[Row]]:
    """Return the groups of rows of the left column."""
    ddim, bdia = panels.reconstructions
    groups = [
        [Row(panels.real, "Real digits", "the model has never seen them")],
        [Row(bdia.noise, "The noise behind them", f"by {bdia.method.name}", NOISE)],
    ]
    for result in (ddim, bdia):
        name = result.method.name
        lost = Row(result.error, "What was lost", f"up to {_scientific(result.max_error)}", ERRORS)
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


def _column(figure: Figure, left: float, title: str, note: str, groups: list[list[Row]], group_gap: float) -> float:
    _text(figure, left, 1.4, title, size=14, weight="bold")
    _text(figure, left, 1.74, note, size=10, colour=GREY)
    top = TOP
    for group in groups:
        for row in group:
            _draw_row(figure, left, top, row)
            top += CELL + GAP
        top += group_gap - GAP
    return top - group_gap


def _draw_row(figure: Figure, left: float, top: float, row: Row) -> None:
    _text(figure, left, top + (0.06 if row.note else 0.17), row.name, size=11, weight="bold")
    _text(figure, left, top + 0.28, row.note, size=9.5, colour=GREY)
    for i in range(CLASSES):
        axes = _axes(figure, left + LABEL_WIDTH + i * (CELL + GAP), top, CELL, CELL)
        image = row.images[i].double().reshape(SIDE, SIDE).numpy()
        axes.imshow(image, cmap=row.look.colours, norm=row.look.scale, interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color="#d7dce0", linewidth=0.6)


def _colour_bar(figure: Figure, left: float, top: float) -> None:
    axes = _axes(figure, left, top, CLASSES * (CELL + GAP) - GAP, 0.12)
    bar = figure.colorbar(ScalarMappable(ERRORS.scale, ERRORS.colours), cax=axes, orientation="horizontal")
    bar.outline.set_visible(False)
    bar.minorticks_off()
    axes.tick_params(labelsize=9, colors=GREY, length=2)
    label = "error of each pixel, where paper is −1 and ink is 1 (logarithmic colours)"
    axes.set_xlabel(label, fontsize=9.5, color=GREY, loc="left")


def _scientific(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return rf"${mantissa}\times10^{{{int(exponent)}}}$"


def _dtype_name(panels: Panels) -> str:
    return str(panels.reconstructions[0].images.dtype).removeprefix("torch.")


def _axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    return figure.add_axes((left / WIDTH, 1 - (top + height) / HEIGHT, width / WIDTH, height / HEIGHT))


def _text(
    figure: Figure,
    left: float,
    top: float,
    text: str,
    *,
    size: float,
    weight: str = "normal",
    colour: str = INK,
) -> None:
    figure.text(left / WIDTH, 1 - top / HEIGHT, text, fontsize=size, fontweight=weight, color=colour, va="top")
