"""Measurements of idempotent networks: samples, repeated application, edits with a mask, corrupted digits."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bicm_diffusion import ddim_sample, sign_masked, sign_recursive, vp_schedule
from bicm_kernels import add_noise, fold_in, normal
from examples.digits.consistency_measurements import SAMPLING, SETS, judge, squared_error
from examples.digits.consistency_measurements import draw as draw_consistency
from examples.digits.consistency_objective import load_network as load_consistency
from examples.digits.data import CLASSES, SIDE, load_split
from examples.digits.denoising import load_denoiser
from examples.digits.idempotent_objective import METHODS, Teacher, load_network
from examples.digits.network import NO_LABEL
from examples.digits.recognition import probabilities

Network = Callable[[Tensor], Tensor]
# Purposes with separate random numbers: each gets its key from the seed.
SAMPLES, CORRUPTED = 34, 35
APPLICATIONS = (1, 2, 4, 8)
#: Levels of the masked sampler, of which the last is not used (SIGN Alg. 3).
LEVELS = (0.6, 0.3, 0.0)
#: Noise of corrupted digits, in units where paper is -1 and ink 1.
NOISE = 0.5
DDIM_STEPS = (1, 5, 20)


@dataclass(frozen=True)
class Figures:
    """Figures of `SETS` times as many samples as held-out digits, by one application unless noted.

    frechet: to the training images, means of sets. variance: summed over pixels. recognised: share with p >= .9.
    least: fraction of the rarest class, by a classifier. idempotence: mean over samples of
    ‖f^(k+1)(z) - f^k(z)‖/‖f^k(z)‖ by k; of None for models that are not idempotent. reconstruction: mean squared error
    of held-out digits, as if their range were [0, 1].
    """

    frechet: float
    variance: float
    recognised: float
    least: float
    idempotence: dict[int, float] | None = None
    again: dict[int, float] | None = None
    reconstruction: float | None = None


def latents(seed: int, *, count: int | None = None) -> Tensor:
    """Return z of all samples, (count, 1, 8, 8), N(0, I)."""
    count = SETS * len(load_split().held_out.images) if count is None else count
    return normal((count, 1, SIDE, SIDE), seed=fold_in(seed, SAMPLES))


def sample_figures(images: Tensor) -> Figures:
    """Return the figures of samples; several, because the confident fraction alone rewards collapse."""
    found = judge(images, torch.full((len(images),), NO_LABEL))
    images = images.clamp(-1, 1)
    taken = np.bincount(probabilities(images).argmax(axis=1), minlength=CLASSES) / len(images)
    variance = images.flatten(1).double().var(dim=0).sum().item()
    return Figures(found.pixels, variance, found.confident, float(taken.min()))


@torch.no_grad()
def measure(network: Network, seed: int) -> Figures:
    """Return all figures of an idempotent network."""
    z, held_out = latents(seed), load_split().held_out.images
    first = sample_figures(sign_recursive(network, z))
    moved: dict[int, float] = {}
    again: dict[int, float] = {}
    x = sign_recursive(network, z)
    for k in range(1, max(APPLICATIONS) + 1):
        following = sign_recursive(network, x)
        if k in APPLICATIONS:
            moved[k] = relative(following, x)
            again[k] = sample_figures(x).frechet
        x = following
    back = squared_error(network(held_out), held_out)
    return Figures(first.frechet, first.variance, first.recognised, first.least, moved, again, back)


def relative(moved: Tensor, x: Tensor) -> float:
    """Return the mean over samples of ‖moved - x‖/‖x‖."""
    lengths = [y.flatten(1).double().norm(dim=1) for y in (moved - x, x)]
    return (lengths[0] / lengths[1]).mean().item()


@torch.no_grad()
def others(seed: int) -> dict[str, Figures]:
    """Return the figures for comparison: of the noise predictor, the consistency model and real digits."""
    z, teacher = latents(seed), Teacher(load_denoiser())
    found = {
        f"DDIM, {steps} evaluation{'s' if steps > 1 else ''}": sample_figures(
            ddim_sample(teacher, z, vp_schedule(steps))
        )
        for steps in DDIM_STEPS
    }
    labels = torch.full((len(z),), NO_LABEL)
    one_step = draw_consistency(load_consistency(), labels, SAMPLING["1 evaluation"], seed=seed)
    found["consistency model, 1 evaluation"] = sample_figures(one_step)
    found["real digits, held out"] = sample_figures(load_split().held_out.images)
    return found


def checkerboard(size: int = 2) -> Tensor:
    """Return a mask (1, 1, 8, 8) that is True on every other square of so many pixels.

    >>> int(checkerboard().sum())
    32
    """
    rows = torch.arange(SIDE) // size
    return ((rows[:, None] + rows) % 2 == 1)[None, None]


def occluded() -> Tensor:
    """Return a mask (1, 1, 8, 8) that is True on the lower half."""
    mask = torch.zeros(1, 1, SIDE, SIDE, dtype=torch.bool)
    mask[..., SIDE // 2 :, :] = True
    return mask


def edited(network: Network, images: Tensor, mask: Tensor, *, seed: int) -> Tensor:
    """Return images whose masked pixels, noise at first, are filled in by Alg. 3."""
    noise = normal(images.shape, seed=fold_in(seed, CORRUPTED), step=1)
    return sign_masked(network, torch.where(mask, noise, images), LEVELS[:-1], mask=mask, seed=seed)


CORRUPTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "noise": lambda x, seed: add_noise(x, NOISE, seed=fold_in(seed, CORRUPTED)),
    "occlusion": lambda x, seed: torch.where(occluded(), -1.0, x),
}


@dataclass(frozen=True)
class Projection:
    """Corrupted held-out digits: mean squared error before and after f, and fractions classified correctly."""

    error_before: float
    error_after: float
    right_before: float
    right_after: float


@torch.no_grad()
def project(network: Network, corruption: str, seed: int) -> Projection:
    """Corrupt held-out digits, apply the network once, and compare with the originals."""
    digits = load_split().held_out
    corrupted = CORRUPTIONS[corruption](digits.images, seed)
    projected = sign_recursive(network, corrupted)
    errors = [squared_error(x, digits.images) for x in (corrupted, projected)]
    right = [_right(x, digits.labels) for x in (corrupted, projected)]
    return Projection(*errors, *right)


@torch.no_grad()
def fill(network: Network, mask: Tensor, seed: int) -> Projection:
    """The same of masked pixels: noise before, filled in after."""
    digits = load_split().held_out
    noise = normal(digits.images.shape, seed=fold_in(seed, CORRUPTED), step=1)
    before = torch.where(mask, noise, digits.images)
    after = edited(network, digits.images, mask, seed=seed)
    errors = [squared_error(x, digits.images) for x in (before, after)]
    return Projection(*errors, *(_right(x, digits.labels) for x in (before, after)))


def _right(images: Tensor, labels: Tensor) -> float:
    return float((probabilities(images).argmax(axis=1) == labels.numpy()).mean())


def table(runs: Mapping[str, Sequence[tuple[int, nn.Module]]]) -> str:
    """Return all figures as Markdown; runs: (seed, network) of every method, means and halves of ranges over them."""
    lines = [
        "One application unless noted; mean ± half the range over the seeds. Idempotence is ‖f(y) − y‖/‖y‖ for",
        "y = f(z), then after 2, 4 and 8 applications; so is the Fréchet distance.",
        "",
        "| model | runs | Fréchet | total variance | p ≥ .9 | least class | reconstruction | idempotence | "
        "Fréchet again |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, networks in runs.items():
        if networks:
            lines.append(_row(METHODS[name].name, [measure(network, seed) for seed, network in networks]))
    lines += [_row(name, [figures]) for name, figures in others(0).items()]
    lines += ["", "Held-out digits corrupted, and projected by one application or filled in by Alg. 3.", ""]
    lines += [
        "| model | corruption | error before | after | recognised before | after |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, networks in runs.items():
        for what in (*CORRUPTIONS, *MASKS):
            if networks:
                found = [
                    project(network, what, seed) if what in CORRUPTIONS else fill(network, MASKS[what](), seed)
                    for seed, network in networks
                ]
                cells = [
                    _cell([getattr(p, part) for p in found], digits)
                    for part, digits in (
                        ("error_before", 4),
                        ("error_after", 4),
                        ("right_before", 3),
                        ("right_after", 3),
                    )
                ]
                lines.append(f"| {METHODS[name].name} | {what} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


MASKS: dict[str, Callable[[], Tensor]] = {"checkerboard mask": checkerboard, "lower half masked": occluded}


def _row(name: str, found: Sequence[Figures]) -> str:
    cells = [
        _cell([f.frechet for f in found], 2),
        _cell([f.variance for f in found], 1),
        _cell([f.recognised for f in found], 3),
        _cell([f.least for f in found], 3),
        _cell([f.reconstruction for f in found], 5),
        ", ".join(_by_application([f.idempotence for f in found], 3)),
        ", ".join(_by_application([f.again for f in found], 2)),
    ]
    return f"| {name} | {len(found)} | {' | '.join(cells)} |"


def _by_application(found: Sequence[dict[int, float] | None], digits: int) -> list[str]:
    known = [values for values in found if values is not None]
    return [f"{statistics.mean(v[k] for v in known):.{digits}f}" for k in APPLICATIONS] if known else ["–"]


def _cell(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    reach = f" ± {(max(known) - min(known)) / 2:.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.{digits}f}{reach}"


def networks_in(folder: Path) -> dict[str, list[tuple[int, nn.Module]]]:
    """Return the trained networks of a folder, by method and seed, in the order of `METHODS`."""
    found: dict[str, list[tuple[int, nn.Module]]] = {name: [] for name in METHODS}
    for name, networks in found.items():
        for path in sorted(folder.glob(f"{name}-seed-*.safetensors")):
            networks.append((int(path.stem.rpartition("-")[2]), load_network(path)))
    return found
