"""Shared by the objectives: the evaluations of a step, and the result of a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from bicm_diffusion.consistency.frozen import asked, check_network
from bicm_diffusion.consistency.levels import check_floor, check_levels
from bicm_diffusion.consistency.shared_draws import draws_alike, dropout_key
from bicm_diffusion.samplers.checks import check_arguments, check_level, check_model, check_output, check_state
from bicm_kernels import consistency_loss, denoise

Network: TypeAlias = nn.Module | Callable[..., Tensor]


@dataclass(frozen=True)
class Loss:
    """A loss: `total`, 0-d, to be minimised, and its terms by name."""

    total: Tensor
    terms: dict[str, Tensor]


def level_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of a network's levels."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def noise_key(x: Tensor, seed: int | Tensor, step: int | Tensor, sample_id: int | Tensor) -> dict[str, Any]:
    """Return the key of x's noise for the ops, with ids on x's device; levels and masks use those on the host."""
    ids = sample_id.to(x.device, non_blocking=True) if isinstance(sample_id, Tensor) else sample_id
    return {"seed": seed, "step": step, "sample_id": ids}


@dataclass(frozen=True, eq=False)  # Dynamo of torch 2.10 hashes what it calls before its fields are set
class Evaluator:
    """(c_in(t)·x, t) -> F, of which all calls share the dropout mask of one key; see `evaluator`."""

    network: Network
    alike: Callable[[], Any]
    extra_args: Mapping[str, Any]
    end: float | None
    batch: int
    name: str = "network"

    def __call__(self, scaled: Tensor, t: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return F of the batch, or of its rows with the indices `rows`."""
        times = (t,) if self.end is None else (t, torch.full_like(t, self.end))
        named = {name: self._of(rows, value) for name, value in self.extra_args.items()}
        with self.alike():
            output = asked(self.network, (scaled, *times), named, name=self.name)
        check_output(output, scaled, name=self.name)
        return output

    def _of(self, rows: Tensor | None, value: Any) -> Any:
        per_sample = isinstance(value, Tensor) and value.dim() > 0 and len(value) == self.batch
        return value[rows.to(value.device)] if rows is not None and per_sample else value


def evaluator(
    network: Network,
    x: Tensor,
    *,
    seed: int | Tensor,
    step: int | Tensor,
    sample_id: int | Tensor,
    extra_args: Mapping[str, Any] | None,
    end: float | None,
    name: str = "network",
) -> Evaluator:
    """Return (c_in(t)·x, t) -> F, of which all calls share the dropout mask of (seed, step, first sample).

    end: the target level u of a network of two times, which is called as network(c_in·x, t, u); None for one of
    one time, network(c_in·x, t).
    name: the caller's name of the network.
    Raises TypeError for an object that cannot be called, and for wrappers that cannot evaluate a network several times,
    see `bct_loss`.
    """
    check_model(network, f"{name}(c_in(t)·x, t, …)", name)
    check_arguments("extra_args", extra_args)
    if isinstance(network, nn.Module):
        check_network(network, name)
    alike = draws_alike(dropout_key(seed, step, sample_id), x.device)
    return Evaluator(network, alike, extra_args or {}, end, len(x), name)


@dataclass(frozen=True)
class Form:
    """How a network's output becomes a sample, see `bicm_kernels.denoise`; inputs are multiplied by c_in."""

    parameterization: str
    sigma_data: float
    t_min: float

    def __post_init__(self) -> None:
        check_level("sigma_data", self.sigma_data)
        check_level("t_min", self.t_min, zero=True)

    @property
    def end(self) -> float | None:
        """The target level of a network of two times; None for one of one time."""
        return self.t_min if self.parameterization == "bcm" else None

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `denoise` and `consistency_loss`."""
        return {
            "parameterization": self.parameterization,
            "sigma_data": self.sigma_data,
            "sigma_min": self.t_min,
            "scaled": True,
        }

    def sample(self, scaled: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """Return f(x, t) from c_in(t)·x and F."""
        return denoise(scaled, output, t, **self.options)


def check_pair(network: Network, x: Tensor, levels: Sequence[Tensor], t_min: float) -> None:
    """Raise unless there are a network, samples, and t_n and t_{n+1} of a table that begins at t_min."""
    check_model(network, "network(c_in(t)·x, t, …)", "network")
    check_state("x", x)
    check_levels(levels, x, ("low", "high"), made="t_n and t_{n+1}, as draw_levels gives")
    check_floor(levels, t_min)


def check_parameterization(parameterization: str) -> None:
    """Raise ValueError unless a consistency model has the parameterization."""
    if parameterization not in ("bcm", "cm"):
        raise ValueError(f"parameterization: expected one of bcm, cm, got {parameterization!r}")


def weighted_distance(
    evaluate: Evaluator,
    form: Form,
    pair: list[Tensor],
    levels: Sequence[Tensor],
    *,
    c: float | None,
    gradient: str,
    clean: Tensor | None = None,
) -> Loss:
    """Return d(f(x_high, t_high), sg f(x_low, t_low)) / (t_high - t_low), a mean, of a pair multiplied by c_in.

    pair: the samples at t_low and t_high; the list is emptied, so that the first is freed before the second evaluation.
    levels: t_low and t_high, (B,) float64. clean: the target of the samples whose t_low is 0; None where none is, or F
    does not contribute to f there. Networks are not called at 0: they take its logarithm, whose NaN would
    survive any weight.
    """
    x_high, x_low = pair.pop(), pair.pop()
    device, dtype = x_low.device, level_dtype(x_low)
    low, high = (level.to(device, dtype) for level in levels[:2])
    with torch.no_grad():
        asked = low if clean is None and form.t_min > 0 else torch.where(low > 0, low, high)
        goal = form.sample(x_low, evaluate(x_low, asked), low)
        if clean is not None:
            goal = _replaced(goal, clean, levels[0].to(low.dtype) == 0)
    del x_low
    weight = (levels[1] - levels[0]).reciprocal().to(low)
    loss = consistency_loss(
        x_high, evaluate(x_high, high), high, None, goal, c=c, weight=weight, gradient=gradient, **form.options
    )
    return Loss(loss, {"consistency": loss})


def _replaced(goal: Tensor, clean: Tensor, where: Tensor) -> Tensor:
    """Return the target with the clean samples in some rows, in place if the mask is on the host."""
    if torch.compiler.is_compiling() or where.device.type != "cpu":
        return torch.where(where.to(goal.device).reshape(-1, *[1] * (goal.dim() - 1)), clean, goal)
    rows = where.nonzero()[:, 0].to(goal.device, non_blocking=True)
    return goal.index_copy_(0, rows, clean[rows]) if len(rows) else goal
