"""The float64 tables of consistency training: levels, their number over a run, the probabilities of drawing one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bicm_diffusion.described import described

P_MEAN = -1.1
P_STD = 2.0


def level_count(step: int, steps: int, *, s0: int = 10, s1: int = 1280) -> int:
    """Return N(k), the number of levels at step k = `step` of a run of K = `steps` steps (BCM eq. 13).

    N(k) = min(s0·2^⌊k/K'⌋, s1) + 1, K' = max(1, ⌊K/(log2⌊s1/s0⌋ + 1)⌋) with a real logarithm. It starts at s0 + 1 and
    ends at s1 + 1, unless ⌊s1/s0⌋ is a power of two and s1/s0 is not (10 to 25 ends at 21).
    Raises ValueError unless 0 <= step, 1 <= steps and 1 <= s0 <= s1.

    >>> [level_count(k, 8000) for k in (0, 1000, 7999)]
    [11, 21, 1281]
    """
    if step < 0 or steps < 1:
        raise ValueError(f"step, steps: expected step >= 0 and steps >= 1, got {step} and {steps}")
    if not 1 <= s0 <= s1:
        raise ValueError(f"s0, s1: expected 1 <= s0 <= s1, got {s0} and {s1}")
    interval = max(1, math.floor(steps / (math.log2(s1 // s0) + 1)))
    return min(s0 << min(step // interval, s1.bit_length()), s1) + 1


def level_probabilities(levels: Tensor, *, p_mean: float = P_MEAN, p_std: float = P_STD) -> Tensor:
    """Return p(n) for n = 1 … N-1, (N-1,) float64: lognormal mass between adjacent levels (BCM eq. 12).

    levels: (N,) float64, N >= 2, increasing; 0 is allowed first. The mass outside the levels is spread in proportion.
    Raises ValueError for fewer than two levels, and for p_mean and p_std without mass between the levels.

    >>> from bicm_diffusion import karras_levels
    >>> round(level_probabilities(karras_levels(11)).sum().item(), 12)
    1.0
    """
    if len(levels) < 2:
        raise ValueError(f"levels: expected at least 2, got {len(levels)}")
    edges = torch.special.erf((levels.double().log() - p_mean) / (math.sqrt(2.0) * p_std))
    mass = edges.diff()
    if not torch.compiler.is_compiling() and not 0.0 < float(mass.sum()) < math.inf:
        raise ValueError(f"p_mean, p_std: expected mass between the levels, got none for {p_mean} and {p_std}")
    return mass / mass.sum()


def partner_probabilities(probabilities: Tensor, n: Tensor) -> Tensor:
    """Return p̃(n'|n), (B, N-1): p(n') with n' = n excluded, renormalised (BCM Alg. 1).

    probabilities: (N-1,) float64; n: (B,) int64, counted from 0. Raises ValueError for n out of range, if it is on the
    host.

    >>> partner_probabilities(torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0]))
    tensor([[0.0000, 0.5000, 0.5000]])
    """
    count = len(probabilities)
    if not torch.compiler.is_compiling() and n.is_cpu and len(n):
        low, high = (int(end) for end in n.aminmax())
        if low < 0 or high >= count:
            raise ValueError(f"n: expected indices in [0, {count}), got {low} to {high}")
    rows = probabilities.repeat(len(n), 1).scatter_(1, n[:, None], 0.0)
    return rows / rows.sum(1, keepdim=True)


def drawn(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Return indices (B,) drawn with `probabilities`, (K,) or (B, K), by inverting their sums at uniforms in (0, 1].

    >>> drawn(torch.tensor([0.25, 0.0, 0.75]), torch.tensor([0.25, 0.26, 1.0]))
    tensor([0, 2, 2])
    """
    sums = probabilities.cumsum(-1)
    # Scaling by the last sum, which may round below 1, keeps every draw inside the table.
    return torch.searchsorted(sums, (uniforms.to(sums.dtype)[:, None] * sums[..., -1:]).contiguous()).flatten()


@dataclass(frozen=True, eq=False)
class LevelTable:
    """N levels and the probability of each as the lower end of a pair, for one stage of training.

    levels: (N,) float64, increasing, N >= 2: those of `karras_levels` in the papers. probabilities: (N-1,), made from
    them. Raises TypeError unless it is a tensor, and ValueError for fewer levels, levels that do not increase, and
    p_mean and p_std that leave a level without a partner: of N > 2 levels, two intervals have mass.

    >>> from bicm_diffusion import karras_levels
    >>> LevelTable(karras_levels(11)).probabilities.shape
    torch.Size([10])
    """

    levels: Tensor
    p_mean: float = P_MEAN
    p_std: float = P_STD
    probabilities: Tensor = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.levels, Tensor):
            raise TypeError(f"levels: expected a tensor (N,), as karras_levels(N) makes, got {described(self.levels)}")
        if self.levels.dim() != 1 or len(self.levels) < 2:
            raise ValueError(f"levels: expected (N,) with N >= 2, got shape {tuple(self.levels.shape)}")
        if not bool((self.levels.diff() > 0).all() and self.levels[0] >= 0):
            raise ValueError(f"levels: expected increasing levels of at least 0, got {self.levels.tolist()[:4]} …")
        odds = level_probabilities(self.levels, p_mean=self.p_mean, p_std=self.p_std)
        if len(odds) > 1 and int((odds > 0).sum()) < 2:
            given = f"{self.p_mean} and {self.p_std}"
            raise ValueError(f"p_mean, p_std: expected mass in two intervals of the levels, got one for {given}")
        object.__setattr__(self, "probabilities", odds)
