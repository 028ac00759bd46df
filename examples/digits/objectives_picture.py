"""The plots of the comparison of objectives, and two Diracs under two couplings (GC fig. 1)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from bicm_kernels import normal
from examples.digits.objectives import METHODS, Result

SHOWN = ("iCT (GC at μ = 0)", "BCT", "batch-OT", "GC, average, μ = 0.5", "GC, average, μ = 1.0")
COLOURS = ("#2a6fbb", "#c8553d")


def save_plot(results: Mapping[str, list[Result]], path: Path) -> None:
    """Draw the Fréchet distance over training, and over μ for the three predictors; bars span the seeds."""
    figure = Figure((11, 4.2), layout="constrained")
    over_steps, over_mu = figure.subplots(1, 2)
    for name in SHOWN:
        curves = [dict(run.curve) for run in results[name]]
        steps = sorted(curves[0])
        values = [[curve[step] for curve in curves] for step in steps]
        (line,) = over_steps.plot(steps, [statistics.mean(v) for v in values], label=name)
        over_steps.fill_between(
            steps, [min(v) for v in values], [max(v) for v in values], alpha=0.15, color=line.get_color()
        )
    over_steps.set(xlabel="step", ylabel="Fréchet distance, averaged weights", yscale="log")
    over_steps.legend(fontsize=8)
    base = [run.frechet for run in results[METHODS[0].name]]
    for who in ("online", "average", "frozen"):
        chosen = [method for method in METHODS if method.predictor == who and method.kind == "gc"]
        values = [base, *([run.frechet for run in results[method.name]] for method in chosen)]
        means = [statistics.mean(v) for v in values]
        reach = [[m - min(v) for m, v in zip(means, values, strict=True)]]
        reach.append([max(v) - m for m, v in zip(means, values, strict=True)])
        over_mu.errorbar([0.0, *(method.mu for method in chosen)], means, yerr=reach, label=who, capsize=3)
    over_mu.set(xlabel="μ", ylabel="Fréchet distance at the end")
    over_mu.legend(title="predictor", fontsize=8)
    _write(figure, path)


def save_two_diracs(path: Path, *, pairs: int = 60, level: float = 3.0) -> None:
    """Draw pairs of two Diracs at ±1 and noise, joined by x + t·z: independent, and coupled by the exact flow."""
    figure = Figure((10, 4), layout="constrained")
    x = torch.where(torch.arange(pairs) % 2 == 0, 1.0, -1.0)
    z = normal((pairs, 1), seed=3)[:, 0]
    axes = figure.subplots(1, 2, sharey=True)
    for axis, moved, title in (
        (axes[0], x[:, None], "independent: paths to both points cross"),
        (axes[1], None, "generator-augmented: a path belongs to the point that its noise leads to"),
    ):
        t = torch.linspace(0.0, level, 200)
        noisy = x[:, None] + t * z[:, None]
        # f(x, t) = sign(x) is the exact consistency model; every level has its own x̂.
        clean = noisy.sign() if moved is None else moved.expand_as(noisy)
        _paths(axis, t, clean + t * z[:, None], clean)
        axis.set(xlabel="t", title=title)
        axis.title.set_fontsize(9)
    axes[0].set_ylabel("x + t·z")
    _write(figure, path)


def _paths(axis: Axes, t: Tensor, paths: Tensor, clean: Tensor) -> None:
    for k, colour in enumerate(COLOURS):
        ours = clean == (1.0, -1.0)[k]
        for path, here in zip(paths, ours, strict=True):
            axis.plot(t, torch.where(here, path, torch.nan), color=colour, linewidth=0.6, alpha=0.7)


def _write(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
