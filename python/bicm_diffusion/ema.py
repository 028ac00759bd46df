"""An exponential moving average of a network's parameters."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, *, step: int, decay: float) -> None:
    """Move the average towards the network: mean ← d·mean + (1 - d)·new, d = min(decay, (1 + step)/(10 + step)).

    step: steps taken so far; a young average forgets faster, so that the first random weights do not linger.
    Both modules have the same parameters, floating; the average's are overwritten.

    >>> average, network = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    >>> update_average(average, network, step=0, decay=0.0); torch.equal(average.weight, network.weight)
    True
    """
    weight = 1 - min(decay, (1 + step) / (10 + step))
    for mean, new in zip(average.parameters(), network.parameters(), strict=True):
        mean.lerp_(new, weight)
