"""Shared by the samplers' loops: levels, evaluations, churn and callbacks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bicm_diffusion.adapters.arithmetic import joined, weighted_sum
from bicm_diffusion.adapters.k_diffusion.noise import NoiseSampler
from bicm_diffusion.adapters.noise import randn_like
from bicm_diffusion.described import described
from bicm_diffusion.extras import extra
from bicm_diffusion.samplers.checks import check_model

Network = Callable[..., Tensor]
Callback = Callable[[dict[str, Any]], object]

#: The largest relative increase of a level by churn.
MOST_LIFT = math.sqrt(2.0) - 1.0


class Churn(NamedTuple):
    """EDM's churn: its strength, the levels that it raises, and its noise's scale."""

    strength: float
    low: float
    high: float
    deviation: float | Tensor
    noise_sampler: NoiseSampler | None


class Run:
    """A run over `sigmas`, which are read once, before its first step."""

    def __init__(
        self,
        model: Network,
        x: Tensor,
        sigmas: Tensor,
        extra_args: Mapping[str, Any] | None,
        callback: Callback | None,
        disable: bool | None,
    ) -> None:
        check_model(model, "model(x, sigma)")
        for name, given in (("x", x), ("sigmas", sigmas)):
            if not isinstance(given, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {described(given)}")
        if sigmas.dim() != 1:
            raise ValueError(f"sigmas: expected the levels (N + 1,), got shape {tuple(sigmas.shape)}")
        self.model, self.sigmas, self.extra_args, self.callback = model, sigmas, extra_args or {}, callback
        self.disable = disable
        self.ones = x.new_ones([x.shape[0]])
        self.levels: list[float] = sigmas.tolist()
        if 0.0 in self.levels[:-1]:
            _check(self.levels)

    def steps(self) -> Iterable[int]:
        """The steps' numbers, with a progress bar."""
        indices = range(len(self.levels) - 1)
        if self.disable:
            return indices
        with extra("diffusion", "or pass disable=True"):
            from tqdm.auto import trange

        return trange(len(indices), disable=self.disable)

    def ask(self, x: Tensor, level: float) -> Tensor:
        """The denoised sample. The network gets its level in the initial dtype of the state."""
        return self.model(x, self.ones * level, **self.extra_args)

    def show(self, i: int, x: Tensor, denoised: Tensor, sigma_hat: Tensor) -> None:
        if self.callback is not None:
            self.callback({"x": x, "i": i, "sigma": self.sigmas[i], "sigma_hat": sigma_hat, "denoised": denoised})


class ChurnedRun(Run):
    """A run whose levels may be raised by noise before each step."""

    def __init__(self, churn: Churn, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.churn, self.raised = churn, self.levels
        self.lifts = [0.0] * len(self.levels)
        # k-diffusion's state is promoted by sigmas and denoised samples, which affects the numbers it draws.
        self.drawn = self.ones.dtype
        self.beside = self.sigmas.dtype if self.sigmas.is_floating_point() else torch.get_default_dtype()
        if churn.strength != 0.0:
            lift = min(float(churn.strength) / max(len(self.levels) - 1, 1), MOST_LIFT)
            # In the dtype of sigmas, where k-diffusion compares and raises them.
            grid = self.sigmas.detach().cpu()
            chosen = (grid >= float(churn.low)) & (grid <= float(churn.high))
            self.raised = torch.where(chosen, grid * (lift + 1.0), grid).tolist()
            self.lifts = [lift if is_chosen else 0.0 for is_chosen in chosen.tolist()]

    def ask(self, x: Tensor, level: float) -> Tensor:
        denoised = super().ask(x, level)
        self.drawn = torch.promote_types(self.drawn, self.beside)
        if isinstance(denoised, Tensor) and denoised.dim():
            self.drawn = torch.promote_types(self.drawn, denoised.dtype)
        return denoised

    def churned(self, x: Tensor, i: int) -> tuple[Tensor, float]:
        """The state and its level before step i, raised where churn acts.

        Torch's own noise is drawn even where churn does not act, as in k-diffusion.
        """
        level, raised, acts = self.levels[i], self.raised[i], self.lifts[i] > 0.0
        deviation, noise_sampler = self.churn.deviation, self.churn.noise_sampler
        if noise_sampler is None:
            noise = randn_like(x if x.dtype is self.drawn else torch.empty_like(x, dtype=self.drawn))
        elif acts:
            noise = noise_sampler(self.sigmas[i], self.sigmas[i + 1])
        if not acts:
            return x, raised
        if isinstance(deviation, Tensor):
            noise, deviation = noise * deviation, 1.0
        return weighted_sum(joined(x, noise), [1.0, deviation * math.sqrt(raised**2 - level**2)]), raised

    def told(self, i: int, x: Tensor, denoised: Tensor, *moved: Tensor) -> Sequence[Tensor]:
        """The step's result, computed before the callback: what the callback writes to x is added to it.

        With a callback that writes nothing, the bits are those without one.
        """
        if self.callback is None:
            return moved
        before = x.clone()
        self.show(i, x, denoised, self.sigmas[i] * (self.lifts[i] + 1.0))
        return [shifted(result, x, before) for result in moved]


def shifted(moved: Tensor, x: Tensor, before: Tensor) -> Tensor:
    """The step's result, plus the change of x since it was copied."""
    return weighted_sum(joined(x, before, moved), [1.0, -1.0, 1.0])


def _check(levels: list[float]) -> None:
    for level, below in pairwise(levels):
        if level == 0.0 and below != 0.0:
            raise ValueError(f"sigmas: expected no step that leaves 0, got one to {below}")
