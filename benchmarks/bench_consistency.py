"""The loss part of a step of bidirectional consistency training, without the network, against eager code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import SEED, Case, column
from bicm_diffusion import Levels, bct_loss

T_MIN = 0.002


class PassThrough(torch.autograd.Function):
    """A stand-in for a network: it returns a stored output, and its input gets the output's gradient.

    Its one parameter, an empty tensor, makes the output differentiable; the rest of a network's backward pass
    is omitted.
    """

    @staticmethod
    def forward(ctx: Any, scaled: Tensor, stored: Tensor, parameter: Tensor) -> Tensor:
        ctx.device = parameter.device
        return stored.view_as(stored)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor]:
        return gradients[0], None, gradients[0].new_empty(0, device=ctx.device)


class Answers(nn.Module):
    """A network without cost that returns stored outputs in turn; gradients pass to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.stored: Iterator[Tensor] = iter(())
        self.parameter = nn.Parameter(torch.empty(0))

    def giving(self, *outputs: Tensor) -> Answers:
        """The network, which returns these outputs next."""
        self.stored = iter([output.detach() for output in outputs])
        return self

    def forward(self, x: Tensor, *_: Tensor) -> Tensor:
        """Return the next output."""
        result: Tensor = PassThrough.apply(x, next(self.stored), self.parameter)
        return result


NETWORK = Answers()
#: The stand-in's parameter in eager code: torch.compile makes none.
PARAMETER = nn.Parameter(torch.empty(0))


def turns(*outputs: Tensor) -> Callable[[Tensor], Tensor]:
    """The network of eager code: its outputs in turn."""
    stored = iter([output.detach() for output in outputs])

    def network(scaled: Tensor) -> Tensor:
        output: Tensor = PassThrough.apply(scaled, next(stored), PARAMETER)
        return output

    return network


def ours_bct(first: Tensor, other: Tensor, x: Tensor, *levels: Tensor, gradient: str = "auto") -> Tensor:
    """``bct_loss``; the numbers per sample serve as levels."""
    network = NETWORK.giving(other, first, first, other)
    return bct_loss(network, x, Levels(*levels), seed=SEED, step=0, gradient=gradient).total


def bct(
    first: Tensor,
    other: Tensor,
    x: Tensor,
    low: Tensor,
    high: Tensor,
    partner: Tensor,
    *,
    draw: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:
    """BCM eq. 9, 11 and 20 as written, with as few operations as possible."""
    low_weight, partner_weight = 1 / (high - low), 1 / (low - partner).abs()
    low, high, partner = (column(t, x) for t in (low, high, partner))
    network = turns(other, first, first, other)

    def leap(x_t: Tensor, t: Tensor, u: Tensor | float) -> Tensor:
        s = 0.25 + t * t
        r = s.sqrt()
        output = network((x_t / r).to(x.dtype))
        return (0.25 + t * u) / s * x_t + 0.5 * (t - u) / r * output

    def distance(a: Tensor, b: Tensor) -> Tensor:
        c = 0.00054 * a[0].numel() ** 0.5
        s = (a.float() - b.float()).flatten(1).square().sum(1)
        return s / ((s + c * c).sqrt() + c)

    noise = draw(x.float())
    x_low, x_high = (x + low * noise).to(x.dtype), (x + high * noise).to(x.dtype)
    with torch.no_grad():
        goal = leap(x_low, low, T_MIN).to(x.dtype)
    consistency = low_weight * distance(leap(x_high, high, T_MIN), goal)
    moved = leap(x_low, low, partner).to(x.dtype)
    trajectory = partner_weight * distance(leap(moved, partner, T_MIN), goal)
    return (consistency + trajectory).mean()


# Reads of the stored outputs and the clean samples, once or forward and backward; one output's gradient.
CASES = tuple(
    Case(name, ours, bct, tensors=3, reads=reads, writes=1, noise="added", trains=True, per_sample=3)
    for name, ours, reads in (
        ("bct_loss", ours_bct, 3),
        ("bct_loss_backward", partial(ours_bct, gradient="backward"), 6),
    )
)
