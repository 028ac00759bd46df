"""``python -m benchmarks.gpu_check``: everything that needs a GPU, tests first, then one table.

Exits with status 0 only where a GPU is there, tests for it ran and passed, and every case agrees with eager.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import click
import torch
from tqdm import tqdm

from benchmarks import report
from benchmarks.cases import shape_of
from benchmarks.measurement import DTYPES, Measurement, measure
from benchmarks.registry import FAMILIES
from benchmarks.timing import EVENTS, GPU, cold_cuda
from bicm_kernels import backend

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "cuda"
#: The largest one fills a fast GPU's memory system for longer than a launch takes.
SIZES = (49_152, 786_432, 3_145_728, 50_331_648)
NO_TESTS_COLLECTED = 5


def run_tests() -> list[str]:
    """Run the tests that are marked gpu; what is wrong with them."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--junitxml=build/results/gpu.xml"]
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    if status == NO_TESTS_COLLECTED:
        return ["no test is marked gpu: nothing was tested"]
    return [f"pytest -m gpu failed with status {status}"] if status else []


def check_backend() -> list[str]:
    """Whether kernels of ours run on the GPU at all."""
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
                wrong.append(f"{case.name} {name} differs from eager by {error:.3g} times what rounding allows")
    return wrong


def measure_all(compile_too: bool) -> list[Measurement]:
    """Measure every case on the GPU, from a cold L2 cache."""
    sampler = cold_cuda(DEVICE)
    plan = [
        (family, case, dtype, shape_of(elements))
        for family, cases in FAMILIES.items()
        for case, dtype, elements in itertools.product(cases, DTYPES, SIZES)
    ]
    return [
        measure(
            family,
            case,
            shape,
            dtype,
            device=DEVICE,
            compile_too=compile_too,
            effort=GPU,
            clock=EVENTS,
            sampler=sampler,
        )
        for family, case, dtype, shape in tqdm(plan, disable=None, leave=False)
    ]


@click.command()
@click.option("--compile/--no-compile", "compile_too", default=True, help="Whether to time torch.compile too.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here.")
@click.option("--plot", "plot_path", type=click.Path(dir_okay=False), help="Draw the figures here.")
def main(compile_too: bool, json_path: Path | None, plot_path: str | None) -> None:
    """Run every test and benchmark that needs a GPU."""
    if not torch.cuda.is_available():
        click.echo(f"torch {torch.__version__} sees no GPU: nothing was checked", err=True)
        sys.exit(1)
    wrong = run_tests() + check_backend() + check_agreement()
    measurements = measure_all(compile_too)
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
