"""The tables and the picture of inverse problems, and the run that computes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from rich.console import Console
from rich.table import Table

from examples.digits.canvas import DPI, PAPER, Canvas, Row
from examples.digits.consistency_objective import load_network
from examples.digits.data import CLASSES, Digits, load_split, one_per_class
from examples.digits.denoising import load_denoiser
from examples.digits.inverse import ABLATIONS, SOLVERS, Models, Outcome, Problem, Size, Solver, outcome, problems

Results = dict[str, list[Outcome]]

WIDTH, HEIGHT = 17.2, 8.4
LEFT, MIDDLE, GROUP_GAP = 0.55, 9.05, 0.2
FIGURES = {
    "residual": "residual",
    "error": "error",
    "seen": "guide",
    "judged": "judge",
    "recognised": "SVM",
    "frechet": "Fréchet",
    "seconds": "s",
    "memory": "MiB",
}
FORMATS = {"residual": ".1e", "error": ".4f", "frechet": ".2f", "seconds": ".0f", "memory": ".0f"}


def run_inverse(
    output: Path, *, weights: Path, consistency_weights: Path, size: Size, seeds: int, console: Console
) -> dict[str, Results]:
    """Solve every problem by every solver, write the picture to `output`, print the tables and return the outcomes.

    Raises FileNotFoundError where weights are missing.
    """
    models = Models(load_denoiser(weights), load_network(consistency_weights))
    asked = problems(digits(size.images))
    plans: list[tuple[str, Problem, Sequence[Solver]]] = [(problem.name, problem, SOLVERS) for problem in asked]
    plans.append(("ablations", asked[-1], ABLATIONS))
    found: dict[str, Results] = {}
    for title, problem, solvers in plans:
        results = found[title] = {}
        for solver in solvers:
            with console.status(f"{title}: {solver.name}"):
                results[solver.name] = [outcome(solver, models, problem, size, seed) for seed in range(seeds)]
        console.print(table(title, problem, solvers, results, size))
    save(asked, found, output)
    console.print(f"picture: {output}", soft_wrap=True)
    return found


def digits(count: int) -> Digits:
    """Return at least ten held-out digits, the first ten one of every class."""
    held_out, first = load_split().held_out, one_per_class(load_split().held_out)
    known = {image.numpy().tobytes() for image in first.images}
    rest = [i for i, image in enumerate(held_out.images) if image.numpy().tobytes() not in known][: count - CLASSES]
    return Digits(*(torch.cat([x, y[rest]]) for x, y in zip(first, held_out, strict=True)))


def table(title: str, problem: Problem, solvers: Sequence[Solver], results: Results, size: Size) -> Table:
    """Return the means over seeds, and the spread over seeds of the quality figures."""
    first = next(iter(results.values()))
    heading = f"{title}: {len(problem.y)} images, {len(first)} seeds, {size.steps} steps or {size.iterations} per level"
    shown = Table(title=heading, title_justify="left")
    names = [name for name in FIGURES if not math.isnan(getattr(first[0], name))]
    for label in ("solver", "networks"):
        shown.add_column(label, no_wrap=True)
    for name in names:
        shown.add_column(FIGURES[name], justify="right")
    for solver in solvers:
        cells = [_cell(name, [getattr(o, name) for o in results[solver.name]]) for name in names]
        shown.add_row(solver.name, solver.base, *cells)
    return shown


def _cell(name: str, values: list[float]) -> str:
    form = FORMATS.get(name, ".2f")
    apart = (
        f" ± {(max(values) - min(values)) / 2:{form}}" if len(values) > 1 and name not in ("seconds", "memory") else ""
    )
    return f"{fmean(values):{form}}{apart}"


def save(asked: Sequence[Problem], found: dict[str, Results], path: Path) -> None:
    """Draw the measurements, every solver's results, and the original images."""
    canvas = Canvas(
        WIDTH,
        HEIGHT,
        "Images that fit a measurement",
        "Every solver samples from a model of digits and guides the sample towards the measurement of an image.",
    )
    down, half, wanted = asked
    assert down.truth is not None
    shown = [
        Row(down.truth[:CLASSES], "Real digits", "held out"),
        Row(down.operator.adjoint(down.y)[:CLASSES] * 4.0, "Measured", "means of 2×2 pixels"),  # type: ignore[attr-defined]
    ]
    left = [shown, [_row(name, results[0]) for name, results in found[down.name].items()]]
    canvas.column(LEFT, "Down-sampling ×2", "", left, GROUP_GAP)
    groups = [
        [Row(half.y[:CLASSES] - (half.y[:CLASSES] == 0).float(), "Measured", "the upper half")],
        [_row(name, found[half.name][name][0]) for name in ("DPS", "MPGD", "CM inversion")],
        [_row(name, found[wanted.name][name][0], "class 0 … 9") for name in found[wanted.name]],
    ]
    canvas.column(MIDDLE, "Inpainting, and a classifier's target", "", groups, GROUP_GAP)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.figure.savefig(path, dpi=DPI, facecolor=PAPER)


def _row(name: str, result: Outcome, note: str = "") -> Row:
    return Row(result.images[:CLASSES].clamp(-1, 1), name, note)
