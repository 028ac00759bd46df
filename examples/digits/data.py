"""The handwritten digits of scikit-learn: 1,797 real images of 8×8 pixels, with a fixed split."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

CLASSES = 10
SIDE = 8
HELD_OUT = 297


class Digits(NamedTuple):
    """images: (B, 1, 8, 8) float32 in [-1, 1], -1 = paper, 1 = ink; labels: (B,) int64 in [0, 10)."""

    images: Tensor
    labels: Tensor


class Split(NamedTuple):
    """The 1,500 training images and the 297 held-out ones."""

    train: Digits
    held_out: Digits


@lru_cache(maxsize=1)
def load_split() -> Split:
    """Return the fixed, class-balanced split of the digits.

    >>> [tuple(part.images.shape) for part in load_split()]
    [(1500, 1, 8, 8), (297, 1, 8, 8)]
    """
    raw = load_digits()
    order = np.arange(len(raw.target))
    train, held_out = train_test_split(order, test_size=HELD_OUT, random_state=0, stratify=raw.target)
    images = torch.from_numpy(raw.images).float().reshape(-1, 1, SIDE, SIDE) / 8 - 1  # stored as 0 … 16
    labels = torch.from_numpy(raw.target).long()
    train_part, held_out_part = (
        Digits(images[torch.from_numpy(i)], labels[torch.from_numpy(i)]) for i in (train, held_out)
    )
    return Split(train_part, held_out_part)


def one_per_class(digits: Digits, *, rank: int = 0) -> Digits:
    """Return the image number `rank` of every class, in the order of the classes: (10, 1, 8, 8) and (10,).

    Raises ValueError where a class has too few images.

    >>> one_per_class(load_split().held_out).labels.tolist()
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    members = [torch.nonzero(digits.labels == label).flatten() for label in range(CLASSES)]
    fewest = min(len(m) for m in members)
    if not 0 <= rank < fewest:
        raise ValueError(f"rank: expected a value in [0, {fewest}), got {rank}")
    chosen = torch.stack([m[rank] for m in members])
    return Digits(digits.images[chosen], digits.labels[chosen])
