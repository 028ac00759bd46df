"""Rows of small images with names, which make the demo's pictures. Lengths are inches from the top left corner."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from bicm_diffusion.extras import extra
from examples.digits.data import CLASSES, SIDE

with extra("diffusion"):
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Colormap, LogNorm, Normalize
    from matplotlib.figure import Figure

INK, GREY, PAPER = "#1b1f24", "#667079", "#ffffff"
CELL, GAP = 0.5, 0.06
LABEL_WIDTH = 2.2
TOP = 2.2
DPI = 130


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
    """Ten images (10, 1, 8, 8) in a row, with a name and a line of explanation."""

    images: torch.Tensor
    name: str
    note: str
    look: Look = DIGITS


class Canvas:
    """A sheet of `width` by `height` with a title and a summary, on which columns of rows are drawn."""

    def __init__(self, width: float, height: float, title: str, summary: str) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), facecolor=PAPER, dpi=DPI)
        self.canvas = FigureCanvasAgg(self.figure)
        left = 0.55
        self.text(left, 0.35, title, size=22, weight="bold")
        self.text(left, 0.85, summary, size=11.5, colour=GREY)

    def column(
        self, left: float, title: str, note: str, groups: list[list[Row]], group_gap: float, *, top: float = TOP
    ) -> float:
        """Draw groups of rows under a title and return where they end."""
        self.text(left, top - 0.8, title, size=14, weight="bold")
        self.text(left, top - 0.46, note, size=10, colour=GREY)
        for group in groups:
            for row in group:
                self._row(left, top, row)
                top += CELL + GAP
            top += group_gap - GAP
        return top - group_gap

    def colour_bar(self, left: float, top: float, look: Look, label: str) -> None:
        """Draw the legend of a colour scheme."""
        axes = self._axes(left, top, CLASSES * (CELL + GAP) - GAP, 0.12)
        bar = self.figure.colorbar(ScalarMappable(look.scale, look.colours), cax=axes, orientation="horizontal")
        bar.outline.set_visible(False)
        bar.minorticks_off()
        axes.tick_params(labelsize=9, colors=GREY, length=2)
        axes.set_xlabel(label, fontsize=9.5, color=GREY, loc="left")

    def text(
        self, left: float, top: float, text: str, *, size: float, weight: str = "normal", colour: str = INK
    ) -> None:
        """Write a line of text."""
        x, y = left / self.width, 1 - top / self.height
        self.figure.text(x, y, text, fontsize=size, fontweight=weight, color=colour, va="top")

    def pixels(self) -> np.ndarray:
        """Return the drawing, (height, width, 4) uint8."""
        self.canvas.draw()
        return np.asarray(self.canvas.buffer_rgba())

    def _row(self, left: float, top: float, row: Row) -> None:
        self.text(left, top + (0.06 if row.note else 0.17), row.name, size=11, weight="bold")
        self.text(left, top + 0.28, row.note, size=9.5, colour=GREY)
        for i in range(CLASSES):
            axes = self._axes(left + LABEL_WIDTH + i * (CELL + GAP), top, CELL, CELL)
            image = row.images[i].double().reshape(SIDE, SIDE).numpy()
            axes.imshow(image, cmap=row.look.colours, norm=row.look.scale, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(color="#d7dce0", linewidth=0.6)

    def _axes(self, left: float, top: float, width: float, height: float) -> Axes:
        return self.figure.add_axes(
            (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
        )
