"""``python -m benchmarks [FAMILY]...``: medians of ours, eager, torch.compile and a copy, in one run."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import click
from tqdm import tqdm

from benchmarks import overhead, report
from benchmarks.cases import Shape, shape_of
from benchmarks.isolation import measure_apart
from benchmarks.measurement import DTYPES, Measurement, cores
from benchmarks.registry import FAMILIES
from benchmarks.shapes import shapes_given
from benchmarks.timing import CLOCKS, QUICK, Effort

SIZES = (3_072, 49_152, 786_432, 3_145_728)
OVERHEAD = "overhead"


CASE_NAMES = tuple(case.name for cases in FAMILIES.values() for case in cases)


def integers(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Positive integers separated by commas."""
    if value is None:
        return None
    items = [x.strip().replace("_", "") for x in value.split(",")]
    if not all(x.isdecimal() and int(x) > 0 for x in items):
        raise click.BadParameter(f"expected positive integers separated by commas, got {value!r}")
    return tuple(int(x) for x in items)


def names_among(choices: tuple[str, ...]) -> Callable[..., tuple[str, ...]]:
    """A callback for names separated by commas; all of the choices where none is given."""

    def names(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
        items = choices if value is None else tuple(x.strip() for x in value.split(","))
        unknown = [x for x in items if x not in choices]
        if unknown:
            raise click.BadParameter(f"expected names among {', '.join(choices)}, got {', '.join(unknown)}")
        return items

    return names


def chosen(families: tuple[str, ...], names: tuple[str, ...]) -> list[tuple[str, str]]:
    """The cases to measure, with their families."""
    return [
        (family, case.name)
        for family in families
        if family != OVERHEAD
        for case in FAMILIES[family]
        if case.name in names
    ]


@click.command()
@click.argument("families", nargs=-1, type=click.Choice([*FAMILIES, OVERHEAD]))
@click.option("--threads", callback=integers, help="Thread counts, as 1,2; default: 1 and all cores.")
@click.option("--sizes", callback=integers, help="Elements per tensor, multiples of 3072, separated by commas.")
@click.option("--shapes", callback=shapes_given, help="Shapes instead of sizes, as 1x4x64x64,16x4x128x128.")
@click.option("--dtypes", callback=names_among(tuple(DTYPES)), help=f"Default: {','.join(DTYPES)}.")
@click.option("--cases", callback=names_among(CASE_NAMES), help="Only these cases of the families.")
@click.option("--compile/--no-compile", "compile_too", default=True, help="Whether to time torch.compile too.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here.")
@click.option("--plot", "plot_path", type=click.Path(dir_okay=False), help="Draw the figures here.")
@click.option(
    "--clock",
    type=click.Choice(list(CLOCKS)),
    default="wall",
    help="processor: this thread's own time, for one thread on a busy machine.",
)
@click.option("--keep-memory", "keeps_memory", is_flag=True, help="With an allocator that keeps freed memory.")
@click.option("--quick", is_flag=True, help="A few short rounds at the two smallest sizes: a smoke test.")
def main(
    families: tuple[str, ...],
    threads: tuple[int, ...] | None,
    sizes: tuple[int, ...] | None,
    shapes: tuple[Shape, ...] | None,
    dtypes: tuple[str, ...],
    cases: tuple[str, ...],
    compile_too: bool,
    json_path: Path | None,
    plot_path: str | None,
    clock: str,
    keeps_memory: bool,
    quick: bool,
) -> None:
    """Measure FAMILIES (default: all) against eager PyTorch, torch.compile and a copy of as many bytes."""
    families = families or (*FAMILIES, OVERHEAD)
    sizes = sizes or (SIZES[:2] if quick else SIZES)
    threads = threads or ((1,) if clock == "processor" else tuple(sorted({1, cores()})))
    if clock == "processor" and threads != (1,):
        raise click.BadParameter("processor time does not measure several threads", param_hint="--clock")
    effort = QUICK if quick else Effort()
    try:
        shapes = shapes or tuple(shape_of(elements) for elements in sizes)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--sizes") from None

    plan = list(itertools.product(threads, chosen(families, cases), dtypes))
    measurements: list[Measurement] = []
    for thread_count, (family, name), dtype in (bar := tqdm(plan, disable=None, leave=False)):
        bar.set_postfix_str(f"{name} {dtype}")
        measurements += measure_apart(
            family,
            name,
            shapes,
            dtype,
            keeps_memory=keeps_memory,
            thread_count=thread_count,
            compile_too=compile_too,
            effort=effort,
            clock=clock,
        )
    overheads = overhead.measure(effort, clock) if OVERHEAD in families else []

    report.show(measurements, overheads)
    if json_path is not None:
        json_path.write_text(json.dumps(report.document(measurements, overheads), indent=1) + "\n")
    if plot_path is not None and measurements:
        report.plot(measurements, plot_path)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
