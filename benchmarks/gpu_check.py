"""``python -m benchmarks.gpu_check``: everything that needs a GPU, tests first, then one table.

Exits with status 0 only where a GPU is there, tests for it ran and passed, and every case agrees with eager.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import click
import torch
from tqdm import tqdm

from benchmarks import report
from benchmarks.__main__ import integers
from benchmarks.cases import shape_of
from benchmarks.measurement import DTYPES, Measurement, compiled, cores, measure
from benchmarks.registry import FAMILIES
from benchmarks.timing import EVENTS, GPU, cold_cuda
from bicm_kernels import backend

ROOT = Path(__file__).resolve().parents[1]
#: The folder of tests that need a GPU. Others may need parts that `make gpu-check` does not build.
TESTS = "tests/gpu"
PYTEST = (sys.executable, "-m", "pytest", TESTS, "-m", "gpu")
DEVICE = "cuda"
#: The largest one fills a fast GPU's memory system for longer than a launch takes.
SIZES = (49_152, 786_432, 3_145_728, 50_331_648)
NO_TESTS_COLLECTED = 5


#: Processes that run tests or compile: each has a context on the GPU, of about half a gigabyte.
JOBS = min(8, cores())

#: A family, the name of one of its cases, a dtype and a number of elements.
Row = tuple[str, str, str, int]


def run_tests(jobs: int) -> list[str]:
    """Run the tests that are marked gpu; returns the failures."""
    command = [*PYTEST, "-n", str(jobs), "--junitxml=build/results/gpu.xml"]
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    if status == NO_TESTS_COLLECTED:
        return [f"no test of {TESTS} is marked gpu: nothing was tested"]
    return [f"pytest {TESTS} -m gpu failed with status {status}"] if status else []


def check_backend() -> list[str]:
    """Check that this library's kernels run on the GPU."""
    if backend.running(DEVICE) == "reference":
        return [f"no kernel runs on the GPU, the figures would be the reference's: {backend.describe()}"]
    return []


def check_agreement() -> list[str]:
    """Run every case once at a middle size and compare it with eager PyTorch."""
    wrong = []
    for cases, (name, dtype) in itertools.product(FAMILIES.values(), DTYPES.items()):
        for case in cases:
            error = case.error(shape_of(SIZES[0]), dtype, DEVICE)
            if not error <= 1:
                wrong.append(f"{case.name} {name} differs from eager by {error:.3g} times the rounding tolerance")
    return wrong


def compile_row(row: Row, device: str) -> bool:
    """Compile one row's eager function into the compiler's cache on disk; failures are retried and reported later."""
    family, name, dtype, elements = row
    case = next(case for case in FAMILIES[family] if case.name == name)
    try:
        compiled(case, case.inputs(shape_of(elements), DTYPES[dtype], device))
    except Exception:
        return False
    return True


def compile_ahead(rows: Sequence[Row], jobs: int) -> int:
    """Compile all rows in several processes, because one would take longer than measuring; returns their number."""
    with ProcessPoolExecutor(max_workers=jobs, mp_context=get_context("spawn")) as pool:
        done = pool.map(partial(compile_row, device=DEVICE), rows)
        return sum(tqdm(done, total=len(rows), desc="compiling", disable=None, leave=False))


def measure_all(rows: Sequence[Row], compile_too: bool) -> list[Measurement]:
    """Measure every row on the GPU, from a cold L2 cache."""
    sampler = cold_cuda(DEVICE)
    cases = {(family, case.name): case for family, cases in FAMILIES.items() for case in cases}
    return [
        measure(
            family,
            cases[family, name],
            shape_of(elements),
            dtype,
            device=DEVICE,
            compile_too=compile_too,
            effort=GPU,
            clock=EVENTS,
            sampler=sampler,
        )
        for family, name, dtype, elements in tqdm(rows, disable=None, leave=False)
    ]


@click.command()
@click.argument("families", nargs=-1, type=click.Choice(list(FAMILIES)))
@click.option("--tests/--no-tests", "tests_too", default=True, help="Whether to run the tests that need a GPU.")
@click.option("--sizes", callback=integers, help="Elements per tensor, multiples of 3072, separated by commas.")
@click.option("--compile/--no-compile", "compile_too", default=True, help="Whether to time torch.compile too.")
@click.option("--jobs", default=JOBS, show_default=True, help="Processes for the tests and for compiling.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here.")
@click.option("--plot", "plot_path", type=click.Path(dir_okay=False), help="Draw the figures here.")
def main(
    families: tuple[str, ...],
    tests_too: bool,
    sizes: tuple[int, ...] | None,
    compile_too: bool,
    jobs: int,
    json_path: Path | None,
    plot_path: str | None,
) -> None:
    """Run every test and benchmark of the FAMILIES (default: all) that needs a GPU."""
    if not torch.cuda.is_available():
        click.echo(f"torch {torch.__version__} finds no GPU: nothing was checked", err=True)
        sys.exit(1)
    wrong = [*(run_tests(jobs) if tests_too else []), *check_backend(), *check_agreement()]
    rows = [
        (family, case.name, dtype, elements)
        for family in families or FAMILIES
        for case, dtype, elements in itertools.product(FAMILIES[family], DTYPES, sizes or SIZES)
    ]
    if compile_too:
        compile_ahead(rows, jobs)
    measurements = measure_all(rows, compile_too)
    report.show(measurements)
    if json_path is not None:
        json_path.write_text(json.dumps(report.document(measurements), indent=1) + "\n")
    if plot_path is not None:
        report.plot(measurements, plot_path)
    for line in wrong:
        click.echo(f"FAILED: {line}", err=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.gpu_check")
