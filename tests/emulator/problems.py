"""Sampler updates to run: inputs, coefficients and outputs for every form."""

from __future__ import annotations

import numpy as np

from .model import Problem
from .tensors import DTYPES, Tensor

Shape = tuple[int, ...]

COEFFICIENTS = {
    "affine": [0.9, -0.3, 1.7, 0.01, -2.5],
    "bdia": [1.02, -0.13, 1.01, -0.11, 0.96],
    "bdia_inverse": [1.02, -0.13, 1.01, -0.11, 0.96],
    "bcm": [3.7, 0.21, 0.5],
    "cm": [3.7, 0.002, 0.5],
    "bcm_scaled": [3.7, 0.21, 0.5],
    "cm_scaled": [3.7, 0.002, 0.5],
    "input": [3.7, 0.5],
}
NOISE = {"seed": 12345, "step": 6, "sample": 3}
PAIRS = [(dtype, dtype) for dtype in DTYPES] + [
    ("float32", "float16"),
    ("float32", "bfloat16"),
    ("bfloat16", "float32"),
    ("float16", "bfloat16"),
    ("float64", "float32"),
    ("float16", "float64"),
]


def values(seed: int, shape: Shape) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def states(
    shape: Shape, terms: int, state: str, network: str, layout: str = "contiguous", offset: int = 0
) -> list[Tensor]:
    """All inputs but the last have the state's dtype."""
    dtypes = [state] * (terms - 1) + [network]
    return [Tensor.of(values(k, shape), dtype, layout, offset) for k, dtype in enumerate(dtypes)]


def coefficients(form: str, terms: int) -> list[float]:
    return COEFFICIENTS[form][: terms if form == "affine" else None]


def affine(
    shape: Shape,
    state: str = "float32",
    network: str = "float32",
    terms: int = 2,
    form: str = "affine",
) -> Problem:
    return Problem(
        states(shape, terms, state, network), coefficients(form, terms), Tensor.empty(shape, state), form=form
    )


def denoised(shape: Shape, state: str = "float32", network: str = "float32", terms: int = 2) -> Problem:
    """With everything: clipped, noisy, scaled for the next evaluation."""
    problem = affine(shape, state, network, terms)
    problem.x0, problem.next = Tensor.empty(shape, state), Tensor.empty(shape, state)
    problem.x0_coefficients = [1.1, -0.7, 0.2, 0.5, -0.1][:terms]
    problem.x0_weight, problem.clip, problem.next_scale = 0.37, 1.0, 1.9
    problem.noise_weight, problem.key = 0.21, NOISE
    return problem
