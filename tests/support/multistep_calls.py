"""The step ops and how they are called: what the tests of the family share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import bicm_kernels as bk
from tests.support.tensors import BF16, F16, F32, F64, random

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


def operands(name: str, shape: Sequence[int], states: torch.dtype, network: torch.dtype) -> list[Tensor]:
    count = OPS[name][0]
    dtypes = [states] * count + [network]
    return [random(*shape, dtype=dtype, seed=k) for k, dtype in enumerate(dtypes)]


def as_tensors(numbers: dict[str, Any], convert: Callable[[float], Any]) -> dict[str, Any]:
    def deep(value: Any) -> Any:
        if isinstance(value, list):
            return [deep(x) for x in value]
        return convert(value) if isinstance(value, float) else value

    return {name: deep(value) for name, value in numbers.items()}


ARGUMENTS: dict[str, Callable[[float], Any]] = {
    "float64 0-d": lambda x: torch.tensor(x, dtype=F64),
    "float32 0-d": lambda x: torch.tensor(x),
    "per sample": lambda x: x * torch.linspace(0.9, 1.1, 4),
    "per sample, float64": lambda x: x * torch.linspace(0.9, 1.1, 4, dtype=F64),
    "per sample, half": lambda x: (x * torch.linspace(0.9, 1.1, 4)).to(F16),
    "per sample, bfloat16, strided": lambda x: (x * torch.linspace(0.9, 1.1, 8)).to(BF16)[::2],
    "per sample, expanded": lambda x: torch.tensor(x).expand(4),
    "now one, now the other": lambda x: x if int(x * 100) % 2 else x * torch.linspace(0.9, 1.1, 4),
}
