"""Measurements as tables, as JSON and as a picture."""

from __future__ import annotations

import itertools
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.measurement import Measurement, cores
from benchmarks.overhead import COLUMNS, Overhead
from bicm_kernels import backend

SCHEMA = 1
WIDTH = 140
#: Preemptions per second on a machine that is not quiet.
BUSY = 20
NOTES = """\
ours, eager, compile, copy: median time of a call; every op and dtype in a separate process.
±: interquartile range of ours over the rounds.
moved: the minimum bytes that any implementation must read and write. copy: Tensor.copy_ of as many bytes.
GB/s: moved / ours. vs eager, vs compile: how many times faster ours is.
of bound: copy / ours, the fraction of the bandwidth bound that ours reaches.
†: the allocator returned memory to the system and page-faulted it again in every call.\
"""
STYLES = {
    "ours": ("C3", "o", "-"),
    "eager": ("C0", "s", "-"),
    "compile": ("C2", "^", "-"),
    "copy": ("0.45", "", "--"),
}
LABELS = {"ours": "bicm_kernels", "eager": "eager", "compile": "torch.compile", "copy": "bound: copy_"}


def processor() -> str:
    """The processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def environment() -> dict[str, Any]:
    """The environment of the figures."""
    about: dict[str, Any] = {
        "processor": processor(),
        "cores": cores(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "backend": backend.describe(),
    }
    if torch.cuda.is_available():
        about |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return about


def console() -> Console:
    """A console that is wide enough for the tables, so that cells do not wrap."""
    terminal = Console()
    return terminal if terminal.width >= WIDTH else Console(width=WIDTH)


def duration(seconds: float) -> str:
    """Three significant digits, in microseconds or milliseconds."""
    number, unit = (seconds * 1e6, "µs") if seconds < 1e-3 else (seconds * 1e3, "ms")
    digits = 2 if number < 10 else 1 if number < 100 else 0
    return f"{number:.{digits}f} {unit}"


def time_of(m: Measurement, name: str) -> str:
    """A contestant's time, marked where it includes page faults."""
    if name not in m.times:
        return "failed" if name in m.failures else "–"
    return duration(m.times[name].median) + (" †" if m.faulted(name) else "")


def size(count: int) -> str:
    """Bytes, in decimal units like the bandwidth."""
    return f"{count / 1e3:.0f} kB" if count < 1e6 else f"{count / 1e6:.1f} MB"


def short(count: int) -> str:
    """A number of elements for an axis."""
    return f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count / 1e3:.0f}k"


def quotient(value: float | None) -> str:
    """A ratio with three significant digits."""
    return "–" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def title(group: Sequence[Measurement]) -> str:
    """The common settings of a table's measurements."""
    first = group[0]
    if first.device != "cpu":
        return f"{first.family} on {torch.cuda.get_device_name(first.device)}, cold L2"
    text = f"{first.family}, {first.threads} thread{'s' if first.threads > 1 else ''}"
    rate = statistics.mean(m.preemptions for m in group)
    if first.clock == "processor":
        text += ", processor time"
    elif rate > BUSY:
        text += f" — preempted {rate:.0f} times a second: other processes ran, see --clock processor"
    return text


def cells(m: Measurement) -> list[str]:
    """The row of one measurement."""
    return [
        m.case,
        m.dtype,
        f"{m.elements:,}",
        size(m.least_bytes),
        time_of(m, "ours"),
        f"{m.times['ours'].spread:.0%}",
        *(time_of(m, name) for name in ("eager", "compile", "copy")),
        f"{(m.bandwidth() or 0) / 1e9:.1f}",
        *(quotient(m.ratio(other)) for other in ("eager", "compile", "copy")),
    ]


HEADINGS = (
    *("op", "dtype", "elements", "moved", "ours", "±", "eager", "compile", "copy"),
    *("GB/s", "vs eager", "vs compile", "of bound"),
)


def table(group: Sequence[Measurement]) -> Table:
    """The table of one family on one device."""
    result = Table(title=title(group), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, heading in enumerate(HEADINGS):
        result.add_column(heading, justify="left" if index < 2 else "right", no_wrap=True)
    for m, following in itertools.zip_longest(group, group[1:]):
        result.add_row(*cells(m), end_section=following is None or following.case != m.case)
    return result


def overhead_table(rows: Sequence[Overhead]) -> Table:
    """The table of call overheads, in microseconds."""
    result = Table(
        title="call overhead, 1 thread, float32: µs from Python to the kernel and back",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    result.add_column("op", no_wrap=True)
    for column in COLUMNS:
        result.add_column(column, justify="right", no_wrap=True)
    for op, group in itertools.groupby(sorted_by_first_seen(rows), lambda row: row.op):
        times = {row.column: row.time.median for row in group}
        result.add_row(op, *(f"{times[c] * 1e6:.2f}" if c in times else "–" for c in COLUMNS))
    return result


def sorted_by_first_seen(rows: Sequence[Overhead]) -> list[Overhead]:
    """The rows of each op together, ops in the order in which they first come."""
    order = {op: index for index, op in enumerate(dict.fromkeys(row.op for row in rows))}
    return sorted(rows, key=lambda row: order[row.op])


def show(measurements: Sequence[Measurement], overheads: Sequence[Overhead] = ()) -> None:
    """Print the tables and, below them, failures and the meaning of the columns."""
    screen = console()
    about = environment()
    screen.print(", ".join(f"{name} {value}" for name, value in about.items()), highlight=False)
    for group in grouped(measurements):
        screen.print(table(group))
    for m in measurements:
        for name, error in m.failures.items():
            screen.print(f"{m.case} {m.dtype} {m.shape}: {name} failed: {error}", highlight=False, markup=False)
    if measurements:
        screen.print(NOTES, highlight=False)
    if overheads:
        screen.print(overhead_table(overheads))


def grouped(measurements: Iterable[Measurement]) -> list[list[Measurement]]:
    """Measurements by device, thread count and family, in the order in which they were made."""
    groups: dict[tuple[str, int, str], list[Measurement]] = {}
    for m in measurements:
        groups.setdefault((m.device, m.threads, m.family), []).append(m)
    return list(groups.values())


def document(measurements: Sequence[Measurement], overheads: Sequence[Overhead] = ()) -> dict[str, Any]:
    """Everything as JSON: seconds, bytes, ratios."""
    rows = [
        asdict(m)
        | {
            "elements": m.elements,
            "bytes_per_second": m.bandwidth(),
            "ratios": {name: m.ratio(name) for name in m.times if name != "ours"},
        }
        for m in measurements
    ]
    return {
        "schema": SCHEMA,
        "environment": environment(),
        "measurements": rows,
        "overhead": [asdict(row) for row in overheads],
    }


def panel(axes: Axes, curves: Sequence[Measurement]) -> None:
    """One op: the bandwidth of each contestant by size, and the speedup at the largest size."""
    for name, (color, marker, line) in STYLES.items():
        points = [(m.elements, bandwidth / 1e9) for m in curves if (bandwidth := m.bandwidth(name))]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, linestyle=line, label=LABELS[name])
    largest = curves[-1]
    gains = [f"{quotient(ratio)}× {name}" for name in ("eager", "compile") if (ratio := largest.ratio(name))]
    gain = f"{', '.join(gains)} at {short(largest.elements)}"
    axes.set_title(largest.case, pad=16)
    axes.text(0.5, 1.03, gain, ha="center", fontsize=8, color="0.3", transform=axes.transAxes)
    axes.set(xscale="log", yscale="log")
    axes.set_xticks([m.elements for m in curves], [short(m.elements) for m in curves], minor=False)
    axes.set_xticks([], minor=True)
    axes.margins(y=0.15)
    axes.grid(True, which="major", color="0.9")
    axes.set_axisbelow(True)


def plot(measurements: Sequence[Measurement], path: str) -> None:
    """Draw a block of panels for every dtype and thread count, one panel per op."""
    blocks: dict[tuple[str, int, str], dict[str, list[Measurement]]] = {}
    for m in measurements:
        blocks.setdefault((m.device, m.threads, m.dtype), {}).setdefault(m.case, []).append(m)
    columns = min(5, max(len(panels) for panels in blocks.values()))
    heights = [-(-len(panels) // columns) for panels in blocks.values()]
    figure = Figure(figsize=(3.1 * columns + 0.6, 2.7 * sum(heights) + 0.7 * len(blocks)), layout="constrained")
    parts = figure.subfigures(len(blocks), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, ((device, count, dtype), panels), rows in zip(parts, blocks.items(), heights, strict=True):
        where = f"{count} thread{'s' if count > 1 else ''}" if device == "cpu" else device
        part.suptitle(f"{dtype}, {where}", fontweight="bold")
        grid = part.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for axes, curves in itertools.zip_longest(grid, panels.values()):
            if curves is None:
                axes.set_axis_off()
            else:
                panel(axes, sorted(curves, key=lambda m: m.elements))
        part.supxlabel("elements")
        part.supylabel("GB/s of the bytes that must move")
        part.legend(*grid[0].get_legend_handles_labels(), loc="outside upper right", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)
