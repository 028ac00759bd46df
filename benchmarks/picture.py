"""Time over size, and the sizes where ours and torch.compile change places."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullFormatter

from benchmarks.measurement import Measurement

STYLES = {
    "ours": ("C3", "o", "-"),
    "eager": ("C0", "s", "-"),
    "compile": ("C2", "^", "-"),
    "copy": ("0.45", "", "--"),
}
LABELS = {
    "ours": "bicm_kernels",
    "eager": "eager, or the peer's own",
    "compile": "torch.compile",
    "copy": "bound: copy_ of as many bytes",
}


def size(count: float) -> str:
    """Bytes, in decimal units like the bandwidth."""
    if count >= 999.5e6:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e3:.0f} kB" if count < 1e6 else f"{count / 1e6:.1f} MB"


def ratios(curves: Sequence[Measurement], other: str) -> list[tuple[int, float]]:
    """Another's time by ours, over the bytes of a tensor, the smallest first."""
    points = [(m.tensor_bytes, ratio) for m in curves if (ratio := m.ratio(other)) is not None]
    return sorted(points)


def crossings(points: Sequence[tuple[float, float]]) -> list[float]:
    """The sizes at which a ratio passes one, on straight lines between points in logarithms of both."""
    found = []
    for (a, at_a), (b, at_b) in itertools.pairwise(points):
        if (at_a >= 1) != (at_b >= 1):
            part = math.log(at_a) / (math.log(at_a) - math.log(at_b))
            found.append(a * (b / a) ** part)
    return found


def verdict(points: Sequence[tuple[float, float]]) -> str:
    """Where ours is faster, in words."""
    if not points:
        return "–"
    sizes, first = [size(x) for x in crossings(points)], points[0][1] >= 1
    if not sizes:
        return "at every size" if first else "at no size"
    parts = [f"up to {sizes.pop(0)}"] if first else []
    pairs = itertools.zip_longest(sizes[::2], sizes[1::2])
    parts += [f"from {low}" if high is None else f"{low} to {high}" for low, high in pairs]
    return ", ".join(parts)


def panel(axes: Axes, curves: Sequence[Measurement]) -> None:
    """One op: the time of each contestant by size, and where ours and torch.compile cross."""
    for name, (color, marker, line) in STYLES.items():
        points = [(m.tensor_bytes, m.times[name].median) for m in curves if name in m.times]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, ms=4, linestyle=line, label=LABELS[name])
    axes.set(xscale="log", yscale="log")
    for axis, unit in ((axes.xaxis, "B"), (axes.yaxis, "s")):
        axis.set_major_formatter(EngFormatter(unit))
        axis.set_minor_formatter(NullFormatter())
    axes.set_title(curves[-1].case, pad=16)
    points_of = ratios(curves, "compile")
    where = f"faster than compile {verdict(points_of)}" if points_of else "not compiled"
    axes.text(0.5, 1.03, where, ha="center", fontsize=8, color="0.3", transform=axes.transAxes)
    for x in crossings(points_of):
        axes.axvline(x, color=STYLES["compile"][0], linestyle=":", gid="crossover")
    axes.grid(True, which="major", color="0.9")
    axes.set_axisbelow(True)


def draw(measurements: Sequence[Measurement]) -> Figure:
    """Return a figure with a block of panels for every dtype and thread count, one panel per op."""
    blocks: dict[tuple[str, int, str], dict[str, list[Measurement]]] = {}
    for m in measurements:
        blocks.setdefault((m.device, m.threads, m.dtype), {}).setdefault(m.case, []).append(m)
    columns = min(5, max(len(panels) for panels in blocks.values()))
    heights = [-(-len(panels) // columns) for panels in blocks.values()]
    figure = Figure(figsize=(3.1 * columns + 0.6, 2.7 * sum(heights) + 0.7 * len(blocks)), layout="constrained")
    parts = figure.subfigures(len(blocks), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, ((device, count, dtype), panels), rows in zip(parts, blocks.items(), heights, strict=True):
        where = f"{count} thread{'s' if count > 1 else ''}" if device == "cpu" else device
        part.suptitle(f"{dtype}, {where}", fontweight="bold", x=0.01, ha="left")
        grid = part.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for axes, curves in itertools.zip_longest(grid, panels.values()):
            if curves is None:
                axes.set_axis_off()
            else:
                panel(axes, sorted(curves, key=lambda m: m.elements))
        part.supxlabel("bytes of one tensor")
        part.supylabel("time of a call")
        labels = {label: line for axes in grid for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        part.legend(labels.values(), labels.keys(), loc="outside upper right", ncols=4, frameon=False)
    return figure


def plot(measurements: Sequence[Measurement], path: Path) -> None:
    """Write the figure to a file."""
    draw(measurements).savefig(path, dpi=110)
