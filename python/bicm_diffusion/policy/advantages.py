"""Advantages relative to a group: a sample's reward compared with the others of its prompt."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from bicm_diffusion.described import described
from bicm_diffusion.samplers.checks import check_number


def group_advantages(
    rewards: Tensor,
    groups: int | Tensor,
    *,
    scale: Literal["group", "batch", "none"] = "group",
    floor: float = 1e-4,
) -> Tensor:
    """Return (r - mean of its group)/(s + floor), s the standard deviation of the group or of all rewards (GRPO).

    rewards: (B,), floating. groups: the group of each sample, (B,) int64 of any numbers; or the size of contiguous
    groups. scale: "group" divides by each group's deviation, "batch" by that of all rewards, "none" does
    not divide. A group of equal rewards, such as a group of one, has advantages of 0.
    The result is (B,), in the dtype of the rewards. With "group" and "none" a sample's advantage is the same bits
    for any position and order of its group in the batch.
    Raises TypeError, ValueError for an argument of another type, shape or range.

    >>> group_advantages(torch.tensor([1.0, 3.0, 5.0, 5.0]), 2, scale="none").tolist()
    [-1.0, 1.0, 0.0, 0.0]
    """
    if not isinstance(rewards, Tensor) or not rewards.is_floating_point():
        raise TypeError(f"rewards: expected a floating tensor (B,), got {described(rewards)}")
    if rewards.dim() != 1:
        raise ValueError(f"rewards: expected shape (B,), got {tuple(rewards.shape)}")
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale: expected 'group', 'batch' or 'none', got {scale!r}")
    check_number("floor", floor)
    if not floor >= 0.0:
        raise ValueError(f"floor: expected a value of at least 0, got {floor}")
    wide, place = rewards.detach().double(), _places(rewards, groups)
    count = int(place.max()) + 1 if len(place) else 0
    # Sorted within their groups, rewards are summed in one order, independent of their order in the batch.
    order = wide.argsort(stable=True)
    order = order[place[order].argsort(stable=True)]
    sizes = place.bincount(minlength=count)
    member = torch.arange(len(place), device=place.device) - (sizes.cumsum(0) - sizes)[place[order]]

    def per_group(values: Tensor) -> Tensor:
        total = values.new_zeros(count)
        for k in range(int(sizes.max()) if count else 0):
            there = order[member == k]
            total[place[there]] += values[there]
        return (total / sizes)[place]

    centred = wide - per_group(wide)
    if scale == "none":
        return centred.to(rewards.dtype)
    if scale == "group":
        # The standard deviation does not depend on the order either: the squares are summed in the order of the
        # rewards.
        spread = per_group(centred * centred).sqrt()
    else:
        spread = wide.std(correction=0) if len(wide) else wide
    divisor = spread + floor
    return torch.where(centred == 0.0, 0.0, centred / torch.where(divisor == 0.0, 1.0, divisor)).to(rewards.dtype)


def _places(rewards: Tensor, groups: int | Tensor) -> Tensor:
    """The index of every sample's group, from 0."""
    batch = len(rewards)
    if isinstance(groups, Tensor):
        if groups.dtype != torch.int64 or groups.shape != rewards.shape:
            got = f"a {groups.dtype} tensor of shape {tuple(groups.shape)}"
            raise ValueError(f"groups: expected a size, or a ({batch},) int64 tensor, got {got}")
        found: Tensor = groups.to(rewards.device).unique(return_inverse=True)[1]
        return found
    if not isinstance(groups, int):
        raise TypeError(f"groups: expected a size, or a ({batch},) int64 tensor, got {described(groups)}")
    if int(groups) < 1 or batch % int(groups):
        raise ValueError(f"groups: expected a size that divides the batch of {batch}, got {groups}")
    return torch.arange(batch, device=rewards.device) // int(groups)
