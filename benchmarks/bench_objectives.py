"""The loss part of a step of iCT, GC and ECT, without the network, against eager code."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_consistency import T_MIN
from benchmarks.cases import SEED, Case, column
from bicm_diffusion import ect_loss, gc_loss, ict_loss
from bicm_diffusion.objectives.gc import generated

MU = 0.5
KEY: dict[str, Any] = {"seed": SEED, "step": 0}
Draw = Callable[[Tensor], Tensor]


def answering(*outputs: Tensor) -> Callable[..., Tensor]:
    """Return a network without cost: its outputs in turn."""
    turns = iter(outputs)
    return lambda scaled, *_: next(turns)


@cache
def rows(batch: int) -> Tensor:
    """Return the samples that GC replaces; eager code gets them without cost."""
    return generated(batch, MU, **KEY)


@lru_cache(maxsize=1)
def answers(third: Tensor) -> Tensor:
    """Return the outputs for the replaced samples: a network gives them without cost, as it does the others."""
    return third[rows(len(third))]


def ours_ict(first: Tensor, other: Tensor, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`ict_loss` with a network that returns `other` at the low level."""
    return ict_loss(answering(other, first), x, (low.double(), high.double()), **KEY, t_min=T_MIN).total


def ours_gc(first: Tensor, other: Tensor, x: Tensor, third: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`gc_loss` with a predictor that returns the outputs of the replaced samples."""
    network, predictor = answering(other, first), answering(answers(third))
    return gc_loss(network, x, (low.double(), high.double()), mu=MU, predictor=predictor, **KEY, t_min=T_MIN).total


def ours_ect(first: Tensor, other: Tensor, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`ect_loss` of a late stage, where no r is 0."""
    return ect_loss(answering(other, first), x, (high.double(), low.double()), **KEY).total


def ict(first: Tensor, other: Tensor, x: Tensor, low: Tensor, high: Tensor, draw: Draw = torch.randn_like) -> Tensor:
    """BCM eq. 5 and 20 as written, with as few operations as possible."""
    return pair_loss(first, other, x, draw(x.float()), low, high, sample_of_bcm, 0.00054 * x[0].numel() ** 0.5)


def gc(
    first: Tensor,
    other: Tensor,
    x: Tensor,
    third: Tensor,
    low: Tensor,
    high: Tensor,
    draw: Draw = torch.randn_like,
) -> Tensor:
    """GC eq. 13 to 15 and 21: the predictor's samples replace some of x."""
    noise = draw(x.float())
    with torch.no_grad():
        t = column(low, x)
        x_low = (x + t * noise).to(x.dtype)
        scaled(x_low, t)
        mixed = torch.where(column(rows(len(x)), x), sample_of_bcm(x_low, third, t), x)
    return pair_loss(first, other, mixed, noise, low, high, sample_of_bcm, 0.00054 * x[0].numel() ** 0.5)


def ect(first: Tensor, other: Tensor, x: Tensor, low: Tensor, high: Tensor, draw: Draw = torch.randn_like) -> Tensor:
    """ECT's loss of a denoiser with the plain norm."""
    return pair_loss(first, other, x, draw(x.float()), low, high, sample_of_edm, 0.0)


Sample = Callable[[Tensor, Tensor, Tensor], Tensor]


def pair_loss(
    first: Tensor, other: Tensor, x: Tensor, noise: Tensor, low: Tensor, high: Tensor, sample: Sample, c: float
) -> Tensor:
    """Return the weighted distance of two levels, whose networks' inputs are formed and not used."""
    weight = 1 / (high - low)
    low, high = column(low, x), column(high, x)
    x_low, x_high = (x + low * noise).to(x.dtype), (x + high * noise).to(x.dtype)
    scaled(x_low, low)
    scaled(x_high, high)
    with torch.no_grad():
        goal = sample(x_low, other, low)
    apart = (sample(x_high, first, high).float() - goal.float()).flatten(1).square().sum(1)
    return (weight * ((apart + c * c).sqrt() - c)).mean()


def scaled(x_t: Tensor, t: Tensor) -> Tensor:
    """Return c_in·x."""
    return (x_t / (0.25 + t * t).sqrt()).to(x_t.dtype)


def sample_of_bcm(x_t: Tensor, output: Tensor, t: Tensor) -> Tensor:
    """BCM eq. 20."""
    s = 0.25 + t * t
    return ((0.25 + t * T_MIN) / s * x_t + 0.5 * (t - T_MIN) / s.sqrt() * output).to(x_t.dtype)


def sample_of_edm(x_t: Tensor, output: Tensor, t: Tensor) -> Tensor:
    """EDM eq. 7."""
    s = 0.25 + t * t
    return (0.25 / s * x_t + 0.5 * t / s.sqrt() * output).to(x_t.dtype)


# Reads of the stored outputs and the clean samples, once forward and backward; one output's gradient.
CASES = tuple(
    Case(name, ours, eager, tensors=tensors, reads=tensors, writes=1, noise="added", trains=True, per_sample=2)
    for name, ours, eager, tensors in (
        ("ict_loss", ours_ict, ict, 3),
        ("gc_loss", ours_gc, gc, 4),
        ("ect_loss", ours_ect, ect, 3),
    )
)
