"""Editing a real digit's class: inverted under its own label, sampled under another, by every suitable method."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from bicm_diffusion.extras import extra
from bicm_diffusion.samplers import (
    InexactInversionWarning,
    bdia_invert,
    bdia_sample,
    ddim_invert,
    ddim_sample,
    edict_invert,
    edict_sample,
    obelm_invert,
    obelm_sample,
)
from bicm_diffusion.schedules import Schedule
from examples.digits.data import CLASSES, Digits
from examples.digits.network import Denoiser
from examples.digits.recognition import recognised

#: The target of each class: a similar digit.
TARGETS = (8, 7, 3, 8, 9, 6, 0, 1, 3, 4)
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Method:
    """A sampler and its inversion; those that are inverted exactly take `exact`."""

    name: str
    invert: Callable[..., Any]
    sample: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    evaluations: int = 1

    @property
    def has_exact_inverse(self) -> bool:
        """Whether the inversion can return every bit."""
        return self.sample is not ddim_sample


def _bdia(gamma: float) -> Method:
    return Method(f"BDIA, γ = {gamma:g}", bdia_invert, bdia_sample, {"gamma": gamma})


DDIM = Method("DDIM inversion", ddim_invert, ddim_sample)
EDICT = Method("EDICT, p = 0.93", edict_invert, edict_sample, {"p": 0.93}, evaluations=2)
EDITORS = (DDIM, EDICT, _bdia(0.96), _bdia(1.0))
METHODS = (DDIM, *map(_bdia, (1.0, 0.96, 0.9, 0.5)), EDICT, Method("O-BELM", obelm_invert, obelm_sample))


@dataclass(frozen=True)
class Edit:
    """Real digits (B, 1, 8, 8) under another label, and the errors of the round trip under their own label."""

    method: Method
    images: Tensor
    error: Tensor


def edit(method: Method, network: Denoiser, digits: Digits, targets: Tensor, schedule: Schedule) -> Edit:
    """Invert the digits under their labels, then sample under `targets` (B,), and under their own labels again."""
    run = partial(_ends, network, schedule=schedule, options=method.options)
    latent = run(method.invert, digits.images, labels=digits.labels)
    edited, returned = (_image(run(method.sample, latent, labels=x)) for x in (targets, digits.labels))
    return Edit(method, edited, (returned.double() - digits.images.double()).abs())


def targets_of(digits: Digits) -> Tensor:
    """Return the target label of each digit."""
    return torch.tensor(TARGETS)[digits.labels]


def edit_table(edits: Sequence[Edit], digits: Digits, schedule: Schedule) -> Table:
    """Return how many edited digits show their new class, and the errors of a round trip under the old one."""
    way = f"{len(digits.labels)} real digits given another class, {schedule.steps} steps each way, no guidance"
    table = Table(title=way, title_justify="left")
    for heading in ("method", "evaluations\na step", "recognised as\nthe new class", "back as itself:\nmax error"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for done in edits:
        share = (recognised(done.images, targets_of(digits)) > 0.5).mean()
        error = done.error.max().item()
        table.add_row(done.method.name, str(done.method.evaluations), f"{share:.1%}", _shown(error))
    return table


def round_trip(
    method: Method, networks: Mapping[torch.dtype, Denoiser], digits: Digits, schedule: Schedule, *,
    dtype: torch.dtype, from_noise: bool, exact: bool,
) -> float:  # fmt: skip
    """Return max |error| of digits inverted to noise and back, or of noise sampled to digits and back.

    networks: by the dtype in which they compute, float64 for such a state and float32 otherwise. inf denotes a state
    that left its range.
    """
    network = networks[torch.float64 if dtype == torch.float64 else torch.float32]
    options = {**method.options, "exact": exact} if method.has_exact_inverse else method.options
    noise = torch.randn(digits.images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # Numbers on a grid of 2^-20, which the exact state's finer grid represents exactly.
    start = ((noise * 2**20).round() / 2**20 if from_noise else digits.images).to(dtype)
    order = (method.sample, method.invert) if from_noise else (method.invert, method.sample)
    state: Any = start
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InexactInversionWarning)  # the error is measured here
        try:
            for sampler in order:
                state = _ends(network, sampler, state, schedule=schedule, options=options, labels=digits.labels)
        except OverflowError:
            return float("inf")
    error = (_image(state).double() - start.double()).abs().max().item()
    return float("inf") if error != error else error


def round_trip_table(
    networks: Mapping[torch.dtype, Denoiser], digits: Digits, schedule: Schedule, *, from_noise: bool
) -> Table:
    """Return the error of a round trip by method, gamma and dtype of the state."""
    way = "noise → digits → noise" if from_noise else "digits → noise → digits"
    table = Table(title=f"{way}, {schedule.steps} steps each way: largest error", title_justify="left")
    table.add_column("method", no_wrap=True)
    kinds = [(dtype, False) for dtype in DTYPES] + [(torch.float32, True)]
    for dtype, exact in kinds:
        table.add_column("exact" if exact else str(dtype).removeprefix("torch."), justify="right")
    for method in METHODS:
        cells = []
        for dtype, exact in kinds:
            if exact and not method.has_exact_inverse:
                cells.append("")
                continue
            error = round_trip(method, networks, digits, schedule, dtype=dtype, from_noise=from_noise, exact=exact)
            cells.append(_shown(error))
        table.add_row(method.name, *cells)
    return table


def save_edits(edits: Sequence[Edit], digits: Digits, path: Path) -> None:
    """Draw the first ten digits, each method's edits and its round-trip errors; the suffix determines the format."""
    from examples.digits.canvas import ERRORS, INK, Row

    with extra("diffusion"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    rows = [Row(digits.images, "Real digits", "")]
    for done in edits:
        lost = f"lost on the way back: {_shown(done.error.max().item())}"
        rows += [Row(done.images, done.method.name, "another class"), Row(done.error, "", lost, ERRORS)]
    figure = Figure(figsize=(8.4, 0.62 * len(rows) + 0.7))
    FigureCanvasAgg(figure)
    figure.suptitle("Real digits given another class, and what each loses on the way back as itself", color=INK)
    grid = figure.subplots(len(rows), CLASSES, gridspec_kw={"left": 0.3, "right": 0.99, "top": 0.93, "bottom": 0.02})
    for line, row in zip(grid, rows, strict=True):
        label = f"{row.name}\n{row.note}".strip()
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9, color=INK)
        for k, axes in enumerate(line):
            axes.imshow(row.images[k, 0].double().numpy(), cmap=row.look.colours, norm=row.look.scale)
            axes.set(xticks=[], yticks=[])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _ends(
    network: Denoiser,
    sampler: Callable[..., Any],
    z: Any,
    *,
    schedule: Schedule,
    options: Mapping[str, Any],
    labels: Tensor,
) -> Any:
    return sampler(network, z, schedule, extra_args={"labels": labels}, **options)


def _image(end: Any) -> Tensor:
    image: Tensor = end if isinstance(end, Tensor) else end.z
    return image


def _shown(error: float) -> str:
    return "0" if error == 0.0 else "lost" if error == float("inf") else f"{error:.0e}"
