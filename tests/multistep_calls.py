"""The step ops and how they are called: what the tests of the family share."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import bicm_kernels as bk

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

# Op -> how many state tensors go before the network's output, and its numbers.
BDIA = {"a": 1.013, "b": -0.21, "a_last": 0.971, "b_last": 0.13, "gamma": 0.9}
NOISE = {"noise_weight": 0.4, "seed": 5, "step": 2, "sample_id": 3}
OPS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddim_step": (1, {"a": 1.013, "b": -0.21}),
    "bdia_step": (2, BDIA),
    "bdia_inverse_step": (2, BDIA),
    "affine_step": (3, {"weights": [0.7, -1.3, 0.2, 0.9], **NOISE}),
    "denoised_step": (
        1,
        {
            "x0_weights": [1.2, -2.1],
            "weights": [0.3, 0.1],
            "x0_weight": 0.8,
            "clip": 1.0,
            "next_scale": 0.6,
            **NOISE,
        },
    ),
}
DTYPES = [(F32, F32), (F32, BF16), (F32, F16), (BF16, BF16), (F16, F16), (F64, F64), (F64, F32), (BF16, F64)]


def call(name: str, tensors: Sequence[Any], numbers: dict[str, Any], module: ModuleType = bk) -> tuple[Tensor, ...]:
    """An op's results, the way it is called: one argument per tensor, or a list of them."""
    op = getattr(module, name)
    results = op(tensors, **numbers) if "weights" in numbers else op(*tensors, **numbers)
    return results if isinstance(results, tuple) else (results,)


def random(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands(name: str, shape: Sequence[int], states: torch.dtype, network: torch.dtype) -> list[Tensor]:
    count = OPS[name][0]
    dtypes = [states] * count + [network]
    return [random(*shape, dtype=dtype, seed=k) for k, dtype in enumerate(dtypes)]
