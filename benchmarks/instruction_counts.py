"""``python -m benchmarks.instruction_counts``: instructions of every op's call and loop, against limits.

Time on a shared machine varies by half; instruction counts do not, so that a slowdown is detected on any machine.
Valgrind's Callgrind counts calls and elements (``counted_calls``), a disassembly the loops it cannot run
(``disassembly``).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks import disassembly

ROOT = Path(__file__).resolve().parents[1]
LIMITS = Path(__file__).with_name("instruction_limits.json")
#: What Callgrind can run.
INSTRUCTION_SETS = ("avx2", "scalar")
UPDATE = "python -m benchmarks.instruction_counts --update"

Counts = dict[str, dict[str, float]]
Environment = dict[str, str]


@dataclass(frozen=True)
class Section:
    """A part of the table: the tolerance above a limit, and the environment that must be the same."""

    tolerance: float
    needs: tuple[str, ...]
    #: Whether a smaller count is reported too, because it need not be faster.
    both_ways: bool = False


_OF_PYTHON = ("compiler", "python", "torch", "libc")
SECTIONS = {
    "calls": Section(0.04, _OF_PYTHON),
    "calls through the dispatcher": Section(0.04, _OF_PYTHON),
    "calls on GPUs": Section(0.04, _OF_PYTHON),
    **{f"elements, {instructions}": Section(0.03, ("compiler",)) for instructions in INSTRUCTION_SETS},
    "loops, avx512": Section(0.05, ("compiler",), both_ways=True),
}

#: The relative change above which a count is printed.
NOTABLE = 0.01


@dataclass(frozen=True)
class Comparison:
    """A count and its limit; None where one of the two is missing."""

    section: str
    name: str
    limit: float | None
    count: float | None

    @property
    def change(self) -> float:
        """How much larger the count is, relative to the limit."""
        return self.count / self.limit - 1 if self.count is not None and self.limit else 0.0

    @property
    def fault(self) -> str:
        """The fault; empty where there is none."""
        if self.limit is None:
            return "has no limit"
        if self.count is None:
            return "is not counted any more"
        section = SECTIONS[self.section]
        if self.change > section.tolerance:
            return "is too high"
        return "has changed" if section.both_ways and -self.change > section.tolerance else ""


def environment(library: Path) -> Environment:
    """The environment that counts depend on, besides the sources."""
    return {
        "compiler": disassembly.compiler_of(library),
        "python": sys.version,
        "torch": importlib.metadata.version("torch"),
        "libc": " ".join(platform.libc_ver()),
    }


def totals(directory: Path) -> dict[str, int]:
    """The counts in Callgrind's dumps, by their labels."""
    found: dict[str, int] = {}
    for path in directory.glob("counts.*"):
        text = path.read_text()
        label = re.search(r"^desc: Trigger: Client Request: (.+)$", text, re.MULTILINE)
        total = re.search(r"^totals: (\d+)$", text, re.MULTILINE)
        if label and total:
            found[label[1]] = int(total[1])
    return found


def counts_of(found: Mapping[str, int]) -> Counts:
    """Instructions per call or element: the difference of two measurements, by labels "section|name|number"."""
    measured: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for label, total in found.items():
        section, name, number = label.split("|")
        measured[section, name].append((int(number), total))
    counts: Counts = {section: {} for section in SECTIONS}
    for (section, name), pair in measured.items():
        (fewer, less), (more, total) = sorted(pair)
        counts[section][name] = round((total - less) / (more - fewer), 3)
    return counts


def run_callgrind(directory: Path) -> dict[str, int]:
    """Run the calls under Callgrind, without environment variables that change their behaviour."""
    helper = directory / "callgrind.so"
    source = Path(__file__).with_name("callgrind.c")
    compile_helper = [os.environ.get("CC", "cc"), "-O2", "-shared", "-fPIC", str(source), "-o", str(helper)]
    if subprocess.run(compile_helper, check=False).returncode:
        raise click.ClickException("valgrind/callgrind.h, which comes with valgrind, could not be compiled")
    folders = [ROOT / name for name in ("benchmarks", "bicm_kernels", "python")]
    # The first run may compile modules, which changes the memory layout.
    subprocess.run([sys.executable, "-m", "compileall", "-q", *map(str, folders)], check=True)
    settings = {
        "HOME": str(directory),
        "PATH": os.defpath,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")]),
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "BICM_KERNELS_BACKEND": "native",
    }
    if "LD_LIBRARY_PATH" in os.environ:
        settings["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    command = [
        *(str(shutil.which("valgrind")), "-q", "--tool=callgrind", "--instr-atstart=no"),
        f"--callgrind-out-file={directory}/counts.%p",
        *(sys.executable, "-m", "benchmarks.counted_calls", str(helper)),
    ]
    done = subprocess.run(command, env=settings, cwd=directory, check=False)
    if done.returncode:
        raise click.ClickException("the calls failed under Callgrind; their output is above")
    return totals(directory)


def measure(library: Path) -> Counts:
    """Count everything."""
    with tempfile.TemporaryDirectory() as directory:
        counts = counts_of(run_callgrind(Path(directory)))
    counts["loops, avx512"] = dict(disassembly.of_library(library, "avx512", "%zmm"))
    return counts


def compare(counts: Counts, limits: Counts) -> list[Comparison]:
    """Every count with its limit."""
    return [
        Comparison(section, name, limits.get(section, {}).get(name), counts[section].get(name))
        for section in counts
        for name in sorted({*counts[section], *limits.get(section, {})})
    ]


def writable(row: Comparison, others: set[str]) -> bool:
    """Whether a count of an environment that differs in `others` may become a limit: a new one, or the same there."""
    return row.limit is None or not others & {*SECTIONS[row.section].needs}


def replace_rows(limits: Counts, rows: Iterable[Comparison]) -> None:
    """Take the counts of these rows as limits; remove those that are not counted any more."""
    for row in rows:
        section = limits.setdefault(row.section, {})
        if row.count is None:
            del section[row.name]
        else:
            section[row.name] = row.count


def line(row: Comparison) -> str:
    """One comparison as a line of text."""
    numbers = [f"{'—' if x is None else f'{x:,.2f}':>14}" for x in (row.limit, row.count)]
    return f"{row.section:29} {row.name:38} {' '.join(numbers)} {row.change:+8.1%} {row.fault}"


def missing_tool() -> str | None:
    """A required program that is missing."""
    tools = ("valgrind", os.environ.get("CC", "cc"), "objdump", "readelf")
    return next((name for name in tools if shutil.which(name) is None), None)


def has_avx2() -> bool:
    """Whether this processor supports the counted instruction sets. Callgrind hides AVX-512 from programs."""
    return "avx2" in Path("/proc/cpuinfo").read_text().split()


@click.command()
@click.option("--update", is_flag=True, help="Print what changed, and write today's counts as the limits.")
@click.option(
    "--only", multiple=True, help="With --update: only the rows of a section, or those named so; elsewhere new ones."
)
@click.option("--all", "show_all", is_flag=True, help="Print every count, not only the changed ones.")
def main(update: bool, only: tuple[str, ...], show_all: bool) -> None:
    """Compare the instructions of every op's call and loop with the table of limits."""
    spec = importlib.util.find_spec("bicm_kernels")
    library = Path(spec.origin).with_name("_C.abi3.so") if spec and spec.origin else Path()
    if platform.machine() != "x86_64" or not library.is_file():
        raise click.ClickException("instructions are counted on x86-64 under Linux, of the native library")
    if tool := missing_tool():
        raise click.ClickException(f"{tool} is needed: apt-get install valgrind binutils gcc")
    if not has_avx2():
        raise click.ClickException("this processor has no AVX2, for which most kernels are counted")
    today, counts = environment(library), measure(library)
    table: dict[str, Any] = json.loads(LIMITS.read_text()) if LIMITS.exists() else {"environment": today, "limits": {}}
    if only and not update:
        raise click.ClickException("--only goes with --update")
    others = {name for name, value in today.items() if value != table["environment"].get(name)}
    if update:
        changed = [row for row in compare(counts, table["limits"]) if row.count != row.limit]
        limits, made = counts, today
        if only:
            asked = [row for row in changed if any(x in row.name or x == row.section for x in only)]
            changed = [row for row in asked if writable(row, others)]
            limits, made = table["limits"], table["environment"]
            if kept := len(asked) - len(changed):
                message = f"{kept} limits are from another {', '.join(sorted(others))} and stay"
                if not changed:
                    raise click.ClickException(f"{message}: --update without --only writes all")
                click.echo(message)
            replace_rows(limits, changed)
        for row in changed:
            if row.fault or abs(row.change) > NOTABLE:
                click.echo(line(row))
        LIMITS.write_text(json.dumps({"environment": made, "limits": limits}, indent=1, sort_keys=True) + "\n")
        click.echo(f"{LIMITS.name}: {len(changed)} of {sum(map(len, limits.values()))} limits are new")
        return

    rows = compare(counts, table["limits"])
    for name in sorted(others):
        click.echo(f"another {name} than the table's: {today[name]!r}, not {table['environment'].get(name)!r}")
    for section, about in SECTIONS.items():
        if others & {*about.needs}:
            click.echo(f"{section}: printed, not compared")
    compared = [row for row in rows if not others & {*SECTIONS[row.section].needs}]
    faults = [row for row in compared if row.fault]
    shown = rows if show_all else [row for row in rows if row in faults or abs(row.change) > NOTABLE]
    click.echo(f"{'':68} {'limit':>14} {'count':>14}   change")
    for row in shown:
        click.echo(line(row))
    click.echo(f"{len(compared)} of {len(rows)} counts compared, {len(faults)} at fault")
    if faults:
        click.echo(f"If the change is intended: {UPDATE}")
        sys.exit(1)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.instruction_counts")
