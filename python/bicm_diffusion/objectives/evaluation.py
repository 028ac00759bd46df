"""What the objectives of this package have in common: the evaluations of a step, and what a loss returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from bicm_diffusion.consistency.frozen import asked, check_network
from bicm_diffusion.consistency.shared_draws import draws_alike, dropout_key
from bicm_diffusion.samplers.checks import check_output

Network: TypeAlias = nn.Module | Callable[..., Tensor]


@dataclass(frozen=True)
class Loss:
    """A loss and what it is made of: `total`, 0-d, which training minimises, and its terms by name."""

    total: Tensor
    terms: dict[str, Tensor]


def level_dtype(x: Tensor) -> torch.dtype:
    """Return the precision in which a network gets its levels."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def evaluator(
    network: Network,
    x: Tensor,
    *,
    seed: int | Tensor,
    step: int | Tensor,
    extra_args: Mapping[str, Any] | None,
    end: float | None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return (c_in(t)·x, t) -> F, of which all calls share the dropout mask of (seed, step).

    end: the level u that a network of two times leads to, which is called as network(c_in·x, t, u); None for one of
    one time, network(c_in·x, t).
    Raises TypeError for wrappers that cannot evaluate a network several times, see `bct_loss`.
    """
    if isinstance(network, nn.Module):
        check_network(network)
    alike = draws_alike(dropout_key(seed, step), x.device)

    def evaluate(scaled: Tensor, t: Tensor) -> Tensor:
        times = (t,) if end is None else (t, torch.full_like(t, end))
        with alike():
            output = asked(network, scaled, *times, **(extra_args or {}))
        check_output(output, x, name="network")
        return output

    return evaluate
