"""`--compare old.json`: the rows whose time left what both runs measured as noise.

A row is slower where two changes are each larger than their noise: that of our time, and that of our time relative to
eager code's, which was measured in turns with it. So neither a machine that became slower as a whole is taken for a
change of ours, nor noise of the eager code alone. The noise of a time is its interquartile range, over all of its
processes where there were several; noise adds in quadrature, and changes below `LEAST` are never reported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from rich import box
from rich.table import Table

from benchmarks.measurement import Measurement, Row, merged
from benchmarks.timing import Timing

#: A row, and its number of threads.
Key: TypeAlias = tuple[Row, int]
LEAST = 0.03
YARDSTICK = "eager"
#: Settings without which times mean something else, and facts that move all times.
SETTINGS = ("clock", "keeps_memory")
MACHINE = ("processor", "cores", "torch", "backend", "gpu")


@dataclass(frozen=True)
class Change:
    """A row in both runs: our times, their ratio, the ratio relative to eager code, and the noise of each."""

    key: Key
    old: float
    new: float
    noise: float
    relative: float
    relative_noise: float

    @property
    def ratio(self) -> float:
        """New time by old time."""
        return self.new / self.old

    @property
    def verdict(self) -> Literal["slower", "faster", "same"]:
        """Whether both changes left their noise, to the same side."""
        sides = {side(self.ratio, self.noise), side(self.relative, self.relative_noise)}
        return "slower" if sides == {1} else "faster" if sides == {-1} else "same"


@dataclass(frozen=True)
class Comparison:
    """Rows in both runs, and those in one only."""

    changes: list[Change]
    missing: list[Key]
    added: list[Key]

    def with_verdict(self, verdict: str) -> list[Change]:
        """The rows of one verdict, the largest change first."""
        found = [change for change in self.changes if change.verdict == verdict]
        return sorted(found, key=lambda change: -abs(math.log(change.ratio)))


def side(ratio: float, noise: float) -> int:
    """1 where a ratio is above one by more than the noise, -1 where it is below, else 0."""
    change = math.log(ratio)
    return 0 if abs(change) <= max(noise, math.log1p(LEAST)) else 1 if change > 0 else -1


def named(key: Key) -> str:
    """A row's name for people."""
    (_, case, device, dtype, shape), threads = key
    where = f"{threads} thread{'s' if threads > 1 else ''}" if device == "cpu" else device
    return f"{case} {'×'.join(map(str, shape))} {dtype}, {where}"


def rows_of(measurements: Sequence[Measurement]) -> dict[Key, dict[str, Timing]]:
    """Every row's times, over all of its processes."""
    return {(m.row, m.threads): m.times for m in merged(measurements)}


def compare(old: Sequence[Measurement], new: Sequence[Measurement]) -> Comparison:
    """Match the rows of two runs by their keys."""
    before, after = rows_of(old), rows_of(new)
    changes = [change(key, before[key], after[key]) for key in before if key in after]
    return Comparison(changes, [k for k in before if k not in after], [k for k in after if k not in before])


def change(key: Key, before: Mapping[str, Timing], after: Mapping[str, Timing]) -> Change:
    """A row's change."""
    old, new = before["ours"], after["ours"]
    noise = math.hypot(old.spread, new.spread)
    relative, relative_noise = new.median / old.median, noise
    if YARDSTICK in before and YARDSTICK in after:
        then, now = before[YARDSTICK], after[YARDSTICK]
        relative /= now.median / then.median
        relative_noise = math.hypot(noise, then.spread, now.spread)
    return Change(key, old.median, new.median, noise, relative, relative_noise)


def objections(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The settings that make two runs incomparable; each mapping is a document's "settings"."""
    return [
        f"{name} was {old.get(name)!r} and is {new.get(name)!r}" for name in SETTINGS if old.get(name) != new.get(name)
    ]


def moved(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between the machines; each mapping is a document's "environment"."""
    return [f"{name}: {old.get(name)} → {new.get(name)}" for name in MACHINE if old.get(name) != new.get(name)]


def table(changes: Sequence[Change], title: str) -> Table:
    """Rows that left the noise."""
    result = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("row", "old, µs", "new, µs", "new / old", "noise", "relative to eager", "its noise"):
        result.add_column(heading, justify="left" if heading == "row" else "right", no_wrap=True)
    for c in changes:
        numbers = (f"{c.ratio:.2f}", f"{c.noise:.0%}", f"{c.relative:.2f}", f"{c.relative_noise:.0%}")
        result.add_row(named(c.key), f"{c.old * 1e6:.2f}", f"{c.new * 1e6:.2f}", *numbers)
    return result


def names_of(keys: Sequence[Key], what: str) -> list[str]:
    """A line for every row in one run only."""
    return [f"{what}: {named(key)}" for key in keys]
