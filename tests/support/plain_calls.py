"""Calls of numbers and tensors that nobody traces or differentiates, one for each form of a schema."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import bicm_kernels as bk

X, Y, Z = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(1)).unbind()
Q = (X * 2**20).long()
BDIA = {"a": 0.98, "b": 0.03, "a_last": 0.97, "b_last": 0.04}
MASK = torch.tensor([True, False])

#: Calls of numbers alone, by what is asked of them.
CALLS: dict[str, Callable[[], Any]] = {
    "two tensors": lambda: bk.ddim_step(X, Y, a=1.5, b=2),
    "a pair": lambda: bk.ddim_step(X, (Y, Z), a=1.5, b=2.0, guidance_scale=3.0),
    "three tensors": lambda: bk.bdia_step(X, Y, Z, **BDIA),
    "weights and noise": lambda: bk.affine_step([X, Y], (1.5, 0.5), noise_weight=0.3, seed=-4, step=2),
    "no noise": lambda: bk.affine_step([X], [1.5]),
    "three results": lambda: bk.denoised_step([X, Y], [1.5, 2.0], [0.1, 0.2], x0_weight=0.4, clip=1.0, next_scale=0.6),
    "two of three results": lambda: bk.denoised_step([X, Y], [1.5, 2.0], [0.1, 0.2], x0_weight=0.4),
    "a flag": lambda: bk.denoise(X, Y, 2.0, parameterization="cm"),
    "two results": lambda: bk.renoise(X, Y, 2.0, 1.0, 0.3, seed=1),
    "a result that is written": lambda: bk.normal((2, 5), seed=3),
    "optional tensors": lambda: bk.noisy_pair(X, 1.0, 2.0, seed=3, step=1, x_hat=Y, mask=MASK),
    "no optional tensors": lambda: bk.noisy_pair(X, 1.0, 2.0, seed=3, step=1),
    "a log-probability": lambda: bk.gaussian_step([X, Y], [1.5, 2.0], std=0.3, seed=3),
    "a dtype": lambda: bk.fixed_point_encode(X, dtype=torch.int32, fraction_bits=20),
    "a buffer": lambda: bk.bdia_exact_step(Q, Q, Y, 0 * Q, gamma=(9, 10), **BDIA),
    "no buffer": lambda: bk.bdia_exact_step(Q, Q, Y, 0 * Q, **BDIA),
    "an output": lambda: bk.ddim_step(X, Y, a=1.5, b=2.0, out=torch.empty(2, 5)),
    "three outputs": lambda: bk.denoised_step(
        [X, Y], [1.5, 2.0], [0.1, 0.2], x0_weight=0.4, next_scale=0.6, out=[torch.empty(2, 5) for _ in range(3)]
    ),
}
