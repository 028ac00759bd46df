"""Arguments of every overload of every op, as the dispatcher takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.support.exact_calls import EPS, INFO, NEXT, Q
from tests.support.tensors import F32, F64


def state(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


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
    samples["add_noise"] = [(state(3, 4), 1.0, 0.5, 2, 3, 4, {})]
    samples["add_noise.tensor"] = [(state(3, 4), d(1.0), d(0.5), *key, {})]
    samples["add_noise_tracked"] = [
        (state(3, 4, dtype=F64).requires_grad_(), ROW.double(), ROW.double(), *key, {}),
        (state(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_(), d(0.7), d(0.5), *key, {}),
    ]
    return samples


def pair_samples() -> dict[str, list[tuple[Any, ...]]]:
    x, x_hat, mask = state(4, 3), state(4, 3, seed=1), torch.tensor([True, False, True, False])
    key = (i(1), i(2), torch.arange(4))
    return {
        name: [
            (x, None, None, d(0.5), d(2.0), None, *key, {}),
            (x, None, None, torch.rand(4), d(2.0), d(0.5), *key, {}),
            (x.clone().requires_grad_(tracked), x_hat, mask, d(0.5), d(2.0), None, *key, {}),
        ]
        for name, tracked in (("noisy_pair.tensor", False), ("noisy_pair_tracked", True))
    } | {
        "noisy_pair": [
            (x, None, None, 0.5, 2.0, None, 1, 2, 3, {}),
            (x, x_hat, mask, 0.5, 2.0, 0.5, 1, 2, 3, {}),
        ],
        "generated_pair": [
            (x, x_hat, mask, 0.5, 2.0, 0.002, 0.5, False, True, 1, 2, 3, {}),
            (x, x_hat[:2], torch.tensor([-1, 1, 0, -1]), 0.5, 2.0, 0.002, 0.5, False, True, 1, 2, 3, {}),
        ],
        "generated_pair.tensor": [
            (x, x_hat, None, d(0.5), d(2.0), d(0.002), d(0.5), False, True, *key, {}),
            (x, x_hat.half(), mask, torch.rand(4), d(2.0), d(0.002), d(0.5), True, False, *key, {}),
            (x, x_hat[:1], torch.tensor([-1, 0, 0, 0]), torch.rand(4), *[d(0.5)] * 3, True, False, *key, {}),
        ],
    }


def preconditioning_samples() -> dict[str, list[tuple[Any, ...]]]:
    x, F = state(2, 3, 5), state(2, 3, 5, seed=1)
    t, deviation, key = torch.rand(2), d(0.5), (i(1), i(2), i(3))
    tracked = [y.clone().requires_grad_() for y in (x, F)]
    return {
        "scale_input": [(x, 2.0, 0.5, {})],
        "scale_input.tensor": [(x, t, deviation, {})],
        "scale_input_tracked": [(tracked[0], t, deviation, {})],
        "denoise": [(x, F, 2.0, 1.0, 0.5, False, False, {})],
        "denoise.tensor": [(x, F, t, t, deviation, True, True, {})],
        "denoise_tracked": [(*tracked, t, t, deviation, False, True, {})],
        "denoise_gradient": [(x, t, t, deviation, False, True, True, torch.bfloat16, {})],
        "renoise": [(x, F, 2.0, 1.0, 0.3, 0.3, 0.5, False, 1, 2, 3, {})],
        "renoise.tensor": [(x, F, t, t, t, t, deviation, False, *key, {})],
        "renoise_tracked": [(*tracked, t, t, t, t, deviation, False, *key, {})],
    }


def loss_samples() -> dict[str, list[tuple[Any, ...]]]:
    """Every kind and reduction is checked beside the values."""
    pred, target, x = (state(3, 5, seed=k) for k in range(3))
    t, c, sums = torch.linspace(1, 2, 3), d(0.3), torch.ones(3, dtype=F64)
    distance, levels = (pred, target, t), (pred, target, x, t, t / 2, t)
    numbers, tensors = (0.3, 0.5, 0.002), (c, d(0.5), d(0.002))
    calls = {
        "pseudo_huber": (*distance, 0.3, 0, 2),
        "pseudo_huber.tensor": (*distance, c, 1, 2),
        "consistency_loss": (*levels, *numbers, 0, 1, 0, 2),
        "consistency_loss.tensor": (*levels, *tensors, 0, 1, 1, 2),
    }
    weighed = (pred, target, x.abs(), None, 2, 0)
    samples: dict[str, list[tuple[Any, ...]]] = {}
    for name, call in calls.items():
        packet, dot, overload = name.partition(".")
        samples[name] = [(*call, {})]
        samples[f"{packet}_backward{dot}{overload}"] = [(t, sums, 3, *call, {})]
        samples[f"{packet}_with_gradients{dot}{overload}"] = [(1, *call, {})]
    samples["pseudo_huber"].append((*weighed, {}))
    samples["pseudo_huber_backward"].append((torch.ones(()), sums, 3, *weighed, {}))
    samples["scale_gradients_"] = [(t, [state(3, 5), state(3, 5, dtype=F64)], {})]
    return samples


def gaussian_samples() -> dict[str, list[tuple[Any, ...]]]:
    x, y, z, last = (state(3, 4, seed=k) for k in range(4))
    w, row, key, keys = [0.9, -0.2], [d(0.9), ROW], (2, 3, 4), (i(2), i(3), torch.arange(3))
    samples: dict[str, list[tuple[Any, ...]]] = {
        "gaussian_step": [
            ([x, y.half()], w, 0.0, 0.3, False, *key, {}),
            ([x, y, z], w, 2.0, 0.0, True, None, 0, 0, {}),
        ],
        "gaussian_step.tensor": [
            ([x, y], row, None, ROW, True, *keys, {}),
            ([x.double(), y, z], row, ROW, d(0.3), False, torch.arange(3), i(1), i(0), {}),
        ],
    }
    tracked = [q.clone().requires_grad_() for q in (last, x, y)]
    densities = {
        "gaussian_log_prob": [([last, x, y.half()], w, 0.0, 0.3, False), ([last, x, y, z], w, 2.0, 0.3, True)],
        "gaussian_log_prob.tensor": [(tracked, row, None, ROW, False), ([last, x, y, z], row, ROW, d(0.3), True)],
        "gaussian_kl": [([x, last, x, y.half()], w, 0.0, 0.3, False)],
        "gaussian_kl.tensor": [([*tracked[1:], *tracked[1:]], row, None, ROW, True)],
    }
    for name, calls in densities.items():
        packet, dot, overload = name.partition(".")
        samples[name] = [(*call, {}) for call in calls]
        plain = [([q.detach() for q in call[0]], *call[1:]) for call in calls]
        samples[f"{packet}_backward{dot}{overload}"] = [(ROW, 3, *call, {}) for call in plain]
        samples[f"{packet}_with_gradients{dot}{overload}"] = [(2, *call, {}) for call in plain]
    return samples


def reversible_samples() -> dict[str, list[tuple[Any, ...]]]:
    samples: dict[str, list[tuple[Any, ...]]] = {}
    row, ids, empty = torch.linspace(0.5, 1.5, 3), torch.arange(3) + 1, torch.empty(0, dtype=torch.int64)
    for name, count in (("exact_affine", 1), ("bdia_exact", 4)):
        inputs = [Q, EPS] if count == 1 else [Q, NEXT, EPS]
        guided = [*inputs, -EPS]
        numbers, tensors = [0.9, 0.3, 1.1, -0.2][:count], [d(0.9), row, d(1.1), row][:count]
        for op in (f"{name}_step", f"{name}_inverse_step"):
            plain = [(inputs, INFO, numbers, 0.0, 9, 10, 32), (guided, INFO, numbers, 3.0, 1, 1, 32)]
            traced = [
                (inputs, INFO, tensors, None, ids, torch.tensor(7), 32),
                (guided, INFO, tensors, row, None, None, 32),
            ]
            samples[op], samples[f"{op}.tensor"] = ([(*args, {}) for args in flavour] for flavour in (plain, traced))
            for overload, flavour, mark in (("out", plain, 3), ("tensor_out", traced, torch.tensor(3))):
                samples[f"{op}.{overload}"] = []
                for args in flavour:
                    unit = args[4] in (1, None) if not isinstance(args[4], Tensor) else False
                    outs = {"out": Q.clone(), "info_out": empty.clone() if unit else INFO.clone()}
                    notes = {"overflow": torch.zeros(3, dtype=torch.int64)}
                    samples[f"{op}.{overload}"] += [
                        (*args, mark, outs | notes),
                        (*args, mark, outs | {"overflow": empty.clone()}),
                    ]
    samples["fixed_point_encode"] = [(EPS, 32, torch.int64, {}), (EPS.bfloat16().T, 20, torch.int32, {})]
    notes = {"out": Q.clone(), "overflow": torch.zeros(3, dtype=torch.int64)}
    samples["fixed_point_encode.out"] = [(EPS, 32, torch.int64, 2, notes)]
    samples["fixed_point_encode.tensor_out"] = [(EPS, 32, torch.int64, torch.tensor(2), notes)]
    samples["fixed_point_decode"] = [(Q, 32, torch.float16, {}), (Q.int().T, 20, torch.float64, {})]
    return samples


SAMPLES = step_samples() | noise_samples() | pair_samples()

SAMPLES |= preconditioning_samples() | loss_samples() | gaussian_samples() | reversible_samples()


def overload_of(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.bicm_kernels, packet), overload or "default")
