"""The loss part of a step of an idempotent network, without the networks, against eager code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_consistency import NETWORK, Answers, turns
from benchmarks.cases import SEED, Case, column
from bicm_diffusion import Schedule, ign_loss, sign_loss

#: One step, so that every sample has the same level however it is drawn.
SCHEDULE = Schedule((0.3, 0.7), (0.9, 0.6), (0.3, 0.8))
NONE: dict[str, Any] = {"recon": 0.0, "idem": 0.0, "flow": 0.0}


TEACHER, LEARNED = Answers(), Answers()


def squared(a: Tensor, b: Tensor) -> Tensor:
    """‖a - b‖² of every sample."""
    return (a.float() - b.float()).flatten(1).square().sum(1)


def ours_ign(first: Tensor, other: Tensor, x: Tensor) -> Tensor:
    """``ign_loss``."""
    return ign_loss(NETWORK.giving(first, other, first, first), x, seed=SEED, step=0).total


def ign(first: Tensor, other: Tensor, x: Tensor, *, draw: Callable[[Tensor], Tensor] = torch.randn_like) -> Tensor:
    """SIGN eq. 3 to 5 with the bound of tanh, as written."""
    f = turns(first, other, first, first)
    recon = squared(f(x), x)
    sample = f(draw(x))
    idem = squared(sample, f(sample))
    start = sample.detach()
    reach = 1.5 * recon.detach()
    tight = reach * (-squared(f(start), start) / reach).tanh()
    return (20 * recon + 20 * idem + 2.5 * tight).mean()


def ours_sign(first: Tensor, other: Tensor, x: Tensor) -> Tensor:
    """``sign_loss`` with the empirical pair."""
    f = NETWORK.giving(first, other, first, other, first)
    return sign_loss(f, x, seed=SEED, step=0, schedule=SCHEDULE, idem=0.1, denoise=0.1).total


def levels(x: Tensor) -> tuple[Tensor, ...]:
    """Alpha and sigma of n and of n - 1, n uniform, shaped to broadcast against x."""
    n = torch.randint(1, SCHEDULE.steps + 1, (len(x),))
    return tuple(column(t, x).to(x) for k in (n, n - 1) for t in SCHEDULE.table[1:, k])


def sign(first: Tensor, other: Tensor, x: Tensor, *, draw: Callable[[Tensor], Tensor] = torch.randn_like) -> Tensor:
    """SIGN eq. 3, 4 and 8 and denoising, as written."""
    f = turns(first, other, first, other, first)
    recon = squared(f(x), x)
    sample = f(draw(x))
    idem = squared(sample, f(sample))
    alpha, sigma, alpha_low, sigma_low = levels(x)
    noise = draw(x)
    answer = f(alpha * x + sigma * noise)
    with torch.no_grad():
        goal = f(alpha_low * x + sigma_low * noise)
    flow, denoise = squared(answer, goal), squared(answer, x)
    return (recon + 0.1 * idem + flow + 0.1 * denoise).mean()


def ours_dmd(first: Tensor, other: Tensor, x: Tensor) -> Tensor:
    """``sign_loss`` with dmd only, and the learned model's loss."""
    models: dict[str, Any] = {"teacher": TEACHER.giving(other), "learned": LEARNED.giving(first, first)}
    options: dict[str, Any] = {"schedule": SCHEDULE, "dmd": 1.0, "prediction": "x0", **NONE, **models}
    return sign_loss(NETWORK.giving(x), x, seed=SEED, step=0, **options).total


def dmd(first: Tensor, other: Tensor, x: Tensor, *, draw: Callable[[Tensor], Tensor] = torch.randn_like) -> Tensor:
    """SIGN eq. 7 by the usual surrogate, and denoising score matching of the sample."""
    f, teacher, learned = turns(x), turns(other), turns(first, first)
    sample = f(draw(x))
    alpha, sigma, _, _ = levels(x)
    with torch.no_grad():
        y = alpha * sample + sigma * draw(x)
        g = alpha * (learned(y) - teacher(y)) / sigma.square()
        goal = sample - g
    alpha, sigma, _, _ = levels(x)
    start = sample.detach()
    own = squared(learned(alpha * start + sigma * draw(x)), start) / x[0].numel()
    return (0.5 * squared(sample, goal) + own).mean()


# Reads of the stored outputs and the clean samples, once; one output's gradient. Not compiled: the noise goes to the
# stand-in network alone, which does not read it, and torch.compile would not draw it.
CASES = tuple(
    Case(name, ours, eager, tensors=3, reads=3, writes=1, noise="added", trains=True, compiles=False)
    for name, ours, eager in (
        ("ign_loss", ours_ign, ign),
        ("sign_loss", ours_sign, sign),
        ("sign_loss_dmd", ours_dmd, dmd),
    )
)
