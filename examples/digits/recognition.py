"""Classifiers trained on real digits, used to evaluate samples."""

from __future__ import annotations

import warnings
from functools import lru_cache

import numpy as np
import torch
from sklearn.calibration import CalibratedClassifierCV
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from sklearn.svm import SVC
from torch import Tensor

from examples.digits.data import load_split


def recognised(images: Tensor, labels: Tensor) -> np.ndarray:
    """Return the judge's probability (B,) that each image shows its label.

    images: (B, 1, 8, 8), clipped to [-1, 1] first; labels: (B,) int64 in [0, 10).

    >>> from examples.digits.data import one_per_class
    >>> bool((recognised(*one_per_class(load_split().held_out)) > 0.5).all())
    True
    """
    chosen: np.ndarray = probabilities(images)[np.arange(len(labels)), labels.numpy()]
    return chosen


def probabilities(images: Tensor) -> np.ndarray:
    """Return the judge's probability of every class, (B, 10), for images as in `recognised`."""
    found: np.ndarray = _judge().predict_proba(_features(images))
    return found


def features(images: Tensor) -> Tensor:
    """Return the hidden features of images in a small classifier of real digits, (B, 64) float64.

    images: as in `recognised`. Distances between features reflect shapes rather than single pixels.
    """
    network = _classifier()
    hidden = _features(images) @ network.coefs_[0] + network.intercepts_[0]
    return torch.from_numpy(np.maximum(hidden, 0.0).astype(np.float64))


@lru_cache(maxsize=1)
def _classifier() -> MLPClassifier:
    train = load_split().train
    network = MLPClassifier((64,), alpha=1e-2, max_iter=60, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it stops early on purpose
        return network.fit(_features(train.images), train.labels.numpy())


@lru_cache(maxsize=1)
def _judge() -> CalibratedClassifierCV:
    train = load_split().train
    judge = CalibratedClassifierCV(SVC(C=10.0, random_state=0), ensemble=False, cv=5)
    return judge.fit(_features(train.images), train.labels.numpy())


def _features(images: Tensor) -> np.ndarray:
    flat: np.ndarray = images.float().clamp(-1, 1).flatten(1).numpy()
    return flat
