"""Measurements as tables."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.documents import environment
from benchmarks.measurement import Measurement, Row, merged
from benchmarks.overhead import COLUMNS, Overhead
from benchmarks.picture import ratios, size, verdict

WIDTH = 176
#: Preemptions per second on a machine that is not quiet.
BUSY = 20
NOTES = """\
ours, eager, compile, copy: median time of a call; every op and dtype in a separate process.
±: interquartile range of ours over the rounds.
in family peers, eager is the peer's own code; a run of several of its steps is not compiled.
moved: the minimum bytes that any implementation must read and write. copy: Tensor.copy_ of as many bytes.
GB/s: moved / ours. vs eager, vs compile: how many times faster ours is.
of bound: copy / ours, the fraction of the bandwidth bound that ours reaches.
vs N threads: how many times faster ours is than on N threads, measured in turns with it; copy vs N threads: the same of
copy, whose gain is that of the memory.
†: the allocator returned memory to the system and page-faulted it again in every call.\
"""


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


def gain(base: Measurement, m: Measurement, name: str) -> str:
    """How many times faster a contestant is than on fewer threads."""
    known = name in base.times and name in m.times
    return quotient(base.times[name].median / m.times[name].median if known else None)


def cells(m: Measurement, base: Measurement | None = None) -> list[str]:
    """The row of one measurement; base: the same on fewer threads."""
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
        *([] if base is None else [gain(base, m, name) for name in ("ours", "copy")]),
    ]


HEADINGS = (
    *("op", "dtype", "elements", "moved", "ours", "±", "eager", "compile", "copy"),
    *("GB/s", "vs eager", "vs compile", "of bound"),
)


def table(group: Sequence[Measurement], bases: Mapping[Row, Measurement] | None = None) -> Table:
    """The table of one family on one device; bases: the rows on the fewest threads, where these are more."""
    bases = bases or {}
    fewest = {m.threads for m in bases.values()}
    more = fewest and group[0].threads > min(fewest)
    gain_of = f"vs {min(fewest)} thread{'s' if min(fewest) > 1 else ''}" if more else ""
    headings = (*HEADINGS, gain_of, f"copy {gain_of}") if more else HEADINGS
    result = Table(title=title(group), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, heading in enumerate(headings):
        result.add_column(heading, justify="left" if index < 2 else "right", no_wrap=True)
    for m, following in itertools.zip_longest(group, group[1:]):
        base = bases.get(m.row) if more else None
        result.add_row(*cells(m, base), end_section=following is None or following.case != m.case)
    return result


def on_fewest_threads(measurements: Iterable[Measurement]) -> dict[Row, Measurement]:
    """Every row on the fewest threads."""
    rows: dict[Row, Measurement] = {}
    for m in sorted(measurements, key=lambda m: m.threads):
        rows.setdefault(m.row, m)
    return rows


def decisions(measurements: Sequence[Measurement]) -> Table:
    """Where ours is faster than what, a line for each op."""
    headings = ("op", "dtype", "threads", "sizes of a tensor", "vs eager", "vs compile", "faster than torch.compile")
    result = Table(title="to decide: smallest … largest size", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in headings:
        result.add_column(heading, no_wrap=True)
    ops: dict[tuple[str, str, int], list[Measurement]] = {}
    for m in measurements:
        ops.setdefault((m.case, m.dtype, m.threads), []).append(m)
    for (case, dtype, threads), rows in ops.items():
        eager, compiled = ratios(rows, "eager"), ratios(rows, "compile")
        gains = (" … ".join(quotient(points[k][1]) for k in (0, -1)) if points else "–" for points in (eager, compiled))
        sizes = " … ".join(size(eager[k][0]) for k in (0, -1)) if eager else "–"
        result.add_row(case, dtype, str(threads), sizes, *gains, verdict(compiled))
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


def show(
    measurements: Sequence[Measurement],
    overheads: Sequence[Overhead] = (),
    about: Mapping[str, Any] | None = None,
) -> None:
    """Print the tables and, below them, failures and the meaning of the columns."""
    screen = console()
    about = environment() if about is None else about
    screen.print(", ".join(f"{name} {value}" for name, value in about.items()), highlight=False)
    measurements = merged(measurements)
    bases = on_fewest_threads(measurements)
    for group in grouped(measurements):
        screen.print(table(group, bases))
    for m in measurements:
        for name, error in m.failures.items():
            screen.print(f"{m.case} {m.dtype} {m.shape}: {name} failed: {error}", highlight=False, markup=False)
    if measurements:
        screen.print(NOTES, highlight=False)
        screen.print(decisions(measurements))
    if overheads:
        screen.print(overhead_table(overheads))


def grouped(measurements: Iterable[Measurement]) -> list[list[Measurement]]:
    """Measurements by device, thread count and family, in the order in which they were made."""
    groups: dict[tuple[str, int, str], list[Measurement]] = {}
    for m in measurements:
        groups.setdefault((m.device, m.threads, m.family), []).append(m)
    return list(groups.values())
