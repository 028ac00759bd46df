"""An exponential moving average of a network's parameters and buffers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from bicm_diffusion.described import described
from bicm_diffusion.samplers.checks import check_number


@torch.no_grad()
def update_average(
    average: nn.Module, network: nn.Module, *, step: int | None = None, decay: float, buffers: bool = True
) -> None:
    """Move the average towards the network: mean ← d·mean + (1 - d)·new.

    step: steps taken so far, for a warm-up: d = min(decay, (1 + step)/(10 + step)), so that the first random weights do
        not persist. None has no warm-up: d = decay from the first step on, as in BCM (0.99993).
    decay: in [0, 1].
    buffers: floating and complex buffers are averaged as parameters are, others copied; False does not change them.
    Both modules have as many parameters and buffers, of the same shapes. Each of the average keeps its dtype and
    device, independent of the network's; halves are averaged in float32 and rounded.
    Raises TypeError for other objects than modules, and ValueError for modules that differ and a decay out of range.

    >>> average, network = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    >>> update_average(average, network, decay=0.0); torch.equal(average.weight, network.weight)
    True
    """
    for name, module in (("average", average), ("network", network)):
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name}: expected a module, got {described(module)}")
    check_number("decay", decay)
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay: expected a value in [0, 1], got {decay}")
    weight = 1 - (decay if step is None else min(decay, (1 + step) / (10 + step)))
    pairs = _pairs("parameters", average.parameters(), network.parameters())
    if buffers:
        pairs += _pairs("buffers", average.buffers(), network.buffers())
    for mean, new in pairs:
        if not (mean.is_floating_point() or mean.is_complex()):
            mean.copy_(new)
        elif mean.dtype.itemsize > 2:
            mean.lerp_(new.to(mean), weight)
        else:
            mean.copy_(mean.float().lerp_(new.to(mean.device, torch.float32), weight))


def _pairs(kind: str, means: Iterable[Tensor], news: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    first, second = list(means), list(news)
    if [x.shape for x in first] != [x.shape for x in second]:
        raise ValueError(
            f"average: expected the {kind} of the network, {[tuple(x.shape) for x in second]}, "
            f"got {[tuple(x.shape) for x in first]}"
        )
    return list(zip(first, second, strict=True))
