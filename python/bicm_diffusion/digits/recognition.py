"""A judge of samples that knows nothing of diffusion: a support vector machine of the real digits."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from sklearn.calibration import CalibratedClassifierCV
from sklearn.svm import SVC
from torch import Tensor

from bicm_diffusion.digits.data import load_split


def recognised(images: Tensor, labels: Tensor) -> np.ndarray:
    """Return the judge's probability (B,) that each image shows its label.

    images: (B, 1, 8, 8), clipped to [-1, 1] first; labels: (B,) int64 in [0, 10).

    >>> from bicm_diffusion.digits.data import one_per_class
    >>> bool((recognised(*one_per_class(load_split().held_out)) > 0.5).all())
    True
    """
    chosen: np.ndarray = probabilities(images)[np.arange(len(labels)), labels.numpy()]
    return chosen


def probabilities(images: Tensor) -> np.ndarray:
    """Return the judge's probability of every class, (B, 10), for images as in `recognised`."""
    found: np.ndarray = _judge().predict_proba(_features(images))
    return found


@lru_cache(maxsize=1)
def _judge() -> CalibratedClassifierCV:
    train = load_split().train
    judge = CalibratedClassifierCV(SVC(C=10.0, random_state=0), ensemble=False, cv=5)
    return judge.fit(_features(train.images), train.labels.numpy())


def _features(images: Tensor) -> np.ndarray:
    flat: np.ndarray = images.float().clamp(-1, 1).flatten(1).numpy()
    return flat
