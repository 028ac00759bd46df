"""Every overload of every op under torch's own opcheck: schema, fake, aliasing and autograd registration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_tracing import state
from torch import Tensor

F64 = torch.float64


def d(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


def i(value: int) -> Tensor:
    return torch.tensor(value)


def one_out() -> dict[str, Tensor]:
    return {"out": torch.empty(3, 4)}


def three_outs() -> dict[str, Tensor]:
    return {"out": torch.empty(3, 4), "x0": torch.empty(3, 4), "next": torch.empty(3, 4)}


ROW = torch.linspace(0.5, 1.5, 3)
FORMS = {"ddim_step": (2, [1.1, -0.2]), "bdia_step": (3, [1.1, -0.2, 0.9, 0.1, 0.8])}
FORMS["bdia_inverse_step"] = FORMS["bdia_step"]


def step_samples() -> dict[str, list[tuple[Any, ...]]]:
    samples: dict[str, list[tuple[Any, ...]]] = {}

    def add(name: str, numbers: list[Any], tensors: list[Any], outs: Callable[[], dict[str, Tensor]]) -> None:
        samples[name], samples[f"{name}.tensor"] = (
            [(*args, {}) for args in numbers],
            [(*args, {}) for args in tensors],
        )
        samples[f"{name}.out"] = [(*args, outs()) for args in numbers]
        samples[f"{name}.tensor_out"] = [(*args, outs()) for args in tensors]

    for name, (count, numbers) in FORMS.items():
        states = [state(3, 4, seed=k) for k in range(count)]
        half = [*states[:-1], states[-1].bfloat16()]
        cases = [(states, numbers, 0.0), (half, numbers, 0.0), ([*states, state(3, 4, seed=9)], numbers, 3.0)]
        weights = [d(x) for x in numbers]
        per_sample = [(ROW * x).to(F64) for x in numbers]
        traced = [
            (states, weights, None),
            (half, per_sample, None),
            ([*states, state(3, 4, seed=9)], weights, ROW),
        ]
        add(name, cases, traced, one_out)
    pair = [state(3, 4), state(3, 4, seed=1).bfloat16()]
    last = [state(3, 4).mT.contiguous().mT]
    key, keys = (2, 3, 4), (i(2), i(3), i(4))
    add(
        "affine_step",
        [
            (pair, [0.5, 0.6], 0.0, 0.7, *key),
            (last, [0.5], 0.0, 0.0, None, 0, 0),
            (pair, [0.5], 2.0, 0.0, None, 0, 0),
        ],
        [
            (pair, [d(0.5), ROW], None, d(0.7), *keys),
            (last, [d(0.5)], None, ROW, torch.arange(3), torch.arange(3), i(0)),
            (pair, [d(0.5)], ROW, None, None, None, None),
        ],
        one_out,
    )
    weights = [d(0.5), ROW]
    add(
        "denoised_step",
        [(pair, [0.5, 0.6], [0.7, 0.8], 0.0, 0.9, 1.0, 0.3, 1.1, *key)],
        [(pair, weights, weights, None, d(0.9), d(1.0), d(0.3), d(1.1), i(2), i(3), torch.arange(3))],
        three_outs,
    )
    # Without next_scale the third result is a placeholder.
    samples["denoised_step"] += [(pair, [0.5, 0.6], [0.7, 0.8], 0.0, 0.9, None, 0.0, None, None, 0, 0, {})]
    samples["denoised_step.tensor"] += [(pair, weights, weights, None, d(0.9), None, None, None, None, None, None, {})]
    return samples


def noise_samples() -> dict[str, list[tuple[Any, ...]]]:
    samples: dict[str, list[tuple[Any, ...]]] = {}
    for name in ("normal", "uniform"):
        samples[name] = [
            (torch.empty(3, 5), -2, 3, 4, {}),
            (torch.empty(5, 3, dtype=torch.float16).T, 1, 0, 0, {}),
        ]
        seeds = (torch.empty(3, 5), torch.arange(3), i(1), i(0), {})
        samples[f"{name}.tensor"] = [(torch.empty(3, 5), i(-2), i(3), torch.arange(3), {}), seeds]
    samples["fold_in"] = [(i(1), i(2), {}), (torch.arange(4), i(2), {}), (i(1), torch.arange(4), {})]
    key = (i(2), i(3), i(4))
    samples["add_noise"] = [
        (state(3, 4), d(0.5), d(1.0), *key, {}),
        (state(3, 4, dtype=F64).requires_grad_(), ROW.double(), ROW.double(), *key, {}),
        (state(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_(), d(0.5), d(0.7), *key, {}),
    ]
    return samples


SAMPLES = step_samples() | noise_samples()


# Checked beside their values, in test_noisy_pair, test_preconditioning, test_pseudo_huber_derivatives and
# test_reversible_calls.
ELSEWHERE = [
    "bdia_exact_inverse_step",
    "bdia_exact_step",
    "consistency_loss",
    "denoise",
    "denoise_gradient",
    "exact_affine_inverse_step",
    "exact_affine_step",
    "fixed_point_decode",
    "fixed_point_encode",
    "noisy_pair",
    "pseudo_huber",
    "renoise",
    "scale_input",
    "consistency_loss_backward",
    "consistency_loss_with_gradients",
    "denoise_tracked",
    "noisy_pair_tracked",
    "pseudo_huber_backward",
    "pseudo_huber_with_gradients",
    "scale_gradients_",
    "scale_input_tracked",
]


def test_every_overload_is_checked() -> None:
    names = {
        name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("bicm_kernels::")
    }
    assert {name for name in names if name.partition(".")[0] not in ELSEWHERE} == set(SAMPLES)


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name: str) -> None:
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.bicm_kernels, packet), overload or "default")
    for *positional, keywords in SAMPLES[name]:
        torch.library.opcheck(op, tuple(positional), keywords)
