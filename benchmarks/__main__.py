"""``python -m benchmarks``: ours, the peers' own code, eager, torch.compile and a copy, in one run.

Without a family it is the suite by which a user decides, see `benchmarks.suite`.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from benchmarks import comparison, documents, overhead, picture, report, sizes
from benchmarks.cases import Case, Shape, shape_of
from benchmarks.isolation import measure_apart
from benchmarks.measurement import DTYPES, Measurement, cores, merged
from benchmarks.registry import FAMILIES
from benchmarks.sizes import shapes_given
from benchmarks.suite import ROWS, present
from benchmarks.timing import CLOCKS, QUICK, Effort

SIZES = (3_072, 49_152, 786_432, 3_145_728)
OVERHEAD, ALL = "overhead", "all"
SLOWER = 1  # the exit status

CASE_NAMES = tuple(case.name for cases in FAMILIES.values() for case in cases)


def integers(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Positive integers separated by commas."""
    if value is None:
        return None
    items = [x.strip().replace("_", "") for x in value.split(",")]
    if not all(x.isdecimal() and int(x) > 0 for x in items):
        raise click.BadParameter(f"expected positive integers separated by commas, got {value!r}")
    return tuple(int(x) for x in items)


def names_among(choices: tuple[str, ...]) -> Callable[..., tuple[str, ...] | None]:
    """A callback for names separated by commas."""

    def names(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...] | None:
        if value is None:
            return None
        items = tuple(x.strip() for x in value.split(","))
        unknown = [x for x in items if x not in choices]
        if unknown:
            raise click.BadParameter(f"expected names among {', '.join(choices)}, got {', '.join(unknown)}")
        return items

    return names


def chosen(families: tuple[str, ...], names: tuple[str, ...] | None) -> list[tuple[str, Case]]:
    """The cases to measure, with their families: the suite's where none is named."""
    if ALL in families:
        families = tuple(FAMILIES)
    in_suite = {name for rows in ROWS.values() for name in rows}
    return [
        (family, case)
        for family in (families or ROWS)
        if family != OVERHEAD
        for case in FAMILIES[family]
        if (case.name in names if names is not None else families or case.name in in_suite)
    ]


def contents(path: Path | None) -> dict[str, Any] | None:
    """A file that an earlier run wrote."""
    if path is None:
        return None
    try:
        return documents.read(path)
    except ValueError as error:
        raise click.ClickException(str(error)) from None


def judged(old: dict[str, Any], new: dict[str, Any]) -> int:
    """Print what changed since an earlier run; the exit status."""
    if wrong := comparison.objections(old["settings"], new["settings"]):
        raise click.ClickException(f"--compare: the runs measured something else: {', '.join(wrong)}")
    found = comparison.compare(old["measurements"], new["measurements"])
    screen = report.console()
    lines = [f"another machine: {line}" for line in comparison.moved(old["environment"], new["environment"])]
    lines += comparison.names_of(found.missing, "missing") + comparison.names_of(found.added, "not in the old file")
    for verdict in ("slower", "faster"):
        if changes := found.with_verdict(verdict):
            screen.print(comparison.table(changes, f"{verdict} than before, by more than the noise of both runs"))
    counts = [f"{len(found.with_verdict(verdict))} {verdict}" for verdict in ("slower", "faster", "same")]
    for line in [*lines, f"{len(found.changes)} rows compared: {', '.join(counts)} within the noise"]:
        screen.print(line, highlight=False, markup=False)
    return SLOWER if found.with_verdict("slower") else 0


FILE = click.Path(dir_okay=False, path_type=Path)
PRESENT = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument("families", nargs=-1, type=click.Choice([*FAMILIES, OVERHEAD, ALL]))
@click.option(
    "--threads", callback=integers, help="Thread counts, as 1,2, measured in turns; default: 1 and all cores."
)
@click.option("--sizes", "elements", callback=integers, help="Elements per tensor, multiples of 3072, as 3072,49152.")
@click.option("--shapes", callback=shapes_given, help=f"1x4x64x64,16x4x128x128 or names: {','.join(sizes.SHAPES)}.")
@click.option(
    "--dtypes",
    callback=names_among(tuple(DTYPES)),
    help=f"{','.join(DTYPES)}; default: the first two, of the suite float32.",
)
@click.option("--cases", callback=names_among(CASE_NAMES), help="Only these cases of the families.")
@click.option("--compile/--no-compile", "compile_too", default=True, help="Whether to time torch.compile too.")
@click.option("--json", "json_path", type=FILE, help="Write the figures here.")
@click.option("--plot", "plot_path", type=FILE, help="Draw time over size here.")
@click.option(
    "--compare", "old_path", type=PRESENT, help="Name the rows that left the noise since this run; 1: slower."
)
@click.option("--from", "new_path", type=PRESENT, help="Show, draw or compare these figures instead of measuring.")
@click.option(
    "--repeats", type=click.IntRange(min=1), default=1, help="Processes for each case: their noise counts too."
)
@click.option(
    "--clock",
    type=click.Choice(list(CLOCKS)),
    default="wall",
    help="processor: this thread's own time, for one thread on a busy machine.",
)
@click.option(
    "--keep-memory/--return-memory",
    "keeps_memory",
    default=None,
    help="With an allocator that keeps freed memory, as the suite does, or the C library's defaults.",
)
@click.option("--quick", is_flag=True, help="A few short rounds at the two smallest sizes: a smoke test.")
def main(
    families: tuple[str, ...],
    threads: tuple[int, ...] | None,
    elements: tuple[int, ...] | None,
    shapes: tuple[Shape, ...] | None,
    dtypes: tuple[str, ...] | None,
    cases: tuple[str, ...] | None,
    compile_too: bool,
    json_path: Path | None,
    plot_path: Path | None,
    old_path: Path | None,
    new_path: Path | None,
    repeats: int,
    clock: str,
    keeps_memory: bool | None,
    quick: bool,
) -> None:
    """Measure the suite, or FAMILIES, against eager code, torch.compile and a copy of as many bytes.

    The suite: the peers' own sampler steps, the papers' formulas and whole training losses, from one CIFAR image to
    2 GB of video latents, with an allocator that keeps its memory.
    """
    old = contents(old_path)
    suite = not families
    effort = QUICK if quick else Effort()
    threads = threads or ((1,) if clock == "processor" else tuple(sorted({1, cores()})))
    if clock == "processor" and threads != (1,):
        raise click.BadParameter("processor time does not measure several threads", param_hint="--clock")
    settings: dict[str, Any] = {
        "clock": clock,
        "keeps_memory": suite if keeps_memory is None else keeps_memory,
        "repeats": repeats,
        "effort": asdict(effort),
    }
    if old is not None and new_path is None and (wrong := comparison.objections(old["settings"], settings)):
        raise click.ClickException(f"--compare: the runs would measure something else: {', '.join(wrong)}")
    try:
        if elements is not None or not (shapes or suite):
            shapes = shapes or tuple(shape_of(n) for n in elements or (SIZES[:2] if quick else SIZES))
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--sizes") from None
    shapes = shapes or tuple(sizes.SHAPES.values())[: 2 if quick else None]

    new = contents(new_path)
    if new is None:
        dtypes = dtypes or (("float32",) if suite else ("float32", "bfloat16"))
        rows, absent = present(chosen(families, cases))
        plan = [
            (family, case, dtype, run) for run, (family, case), dtype in itertools.product(range(repeats), rows, dtypes)
        ]
        measurements: list[Measurement] = []
        skipped: list[sizes.Skipped] = []

        def save(overheads: list[overhead.Overhead]) -> dict[str, Any]:
            document = documents.document(measurements, overheads, settings, skipped)
            if json_path is not None:
                json_path.write_text(json.dumps(document, indent=1) + "\n")
            return document | {"measurements": measurements, "overhead": overheads}

        for family, case, dtype, run in (bar := tqdm(plan, disable=None, leave=False)):
            bar.set_postfix_str(f"{case.name} {dtype}")
            small, large = sizes.fitting(case, shapes, dtype, DTYPES[dtype], sizes.free_memory())
            skipped += large
            if small:
                measurements += measure_apart(
                    family,
                    case.name,
                    small,
                    dtype,
                    run=run,
                    keeps_memory=settings["keeps_memory"],
                    thread_counts=threads,
                    compile_too=compile_too,
                    effort=effort,
                    clock=clock,
                )
            save([])  # a run of an hour that is interrupted leaves what it has
        new = save(overhead.measure(effort, clock) if {OVERHEAD, ALL} & set(families) else [])
        for line in [*absent, *dict.fromkeys(map(str, skipped))]:
            click.echo(line)
    report.show(new["measurements"], new["overhead"], new["environment"])
    if plot_path is not None and new["measurements"]:
        picture.plot(merged(new["measurements"]), plot_path)
    if old is not None:
        sys.exit(judged(old, new))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
