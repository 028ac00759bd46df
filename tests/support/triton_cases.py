"""Calls whose kernels are compiled: what each launches, and the tensors that it has to read and to write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from bicm_kernels.triton_kernels import OPS
from bicm_kernels.triton_kernels.pseudo_huber import RESIDENT

THREADS, TILE = 128, 1024
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def states(*dtypes: torch.dtype, shape: tuple[int, ...] = (4, 3, 64, 64)) -> list[Tensor]:
    return [torch.empty(shape, dtype=dtype) for dtype in dtypes]


BDIA = [0.9, 0.1, 0.8, 0.2, 0.96]
KEY = (7, 1, 2)
NETWORKS = {"float32": (F32, F32), "bfloat16": (BF16, BF16), "mixed": (F32, BF16)}

# What is launched with Python numbers on dense tensors: kernel, call, and the tensors it must read.
Case = tuple[str, Callable[[], object], list[Tensor], list[Tensor]]


def step(name: str, tensors: list[Tensor], *arguments: Any, outs: int = 1) -> Case:
    return "multistep", lambda: OPS[name](tensors, *arguments), tensors, tensors[:1] * outs


def levels() -> tuple[float, ...]:
    """t, u and sigma_data."""
    return (2.0, 0.5, 0.5)


def preconditioning(kind: str, state: torch.dtype, network: torch.dtype) -> dict[str, Case]:
    pair, one = states(state, network), states(state)
    renoise = (*levels()[:2], 0.7, 0.6, 0.5, False, *KEY)
    noise = (None, None, 0.3, 0.5, 0.5, *KEY)
    return {
        f"scale_input {kind}": ("multistep", lambda: OPS["scale_input"](one[0], 2.0, 0.5), one, one),
        f"denoise {kind}": ("multistep", lambda: OPS["denoise"](*pair, *levels(), False, False), pair, one),
        f"denoise cm {kind}": ("multistep", lambda: OPS["denoise"](*pair, *levels(), True, True), pair, one),
        f"renoise {kind}": ("multistep", lambda: OPS["renoise"](*pair, *renoise), pair, one * 2),
        f"noisy_pair {kind}": ("pair", lambda: OPS["noisy_pair"](one[0], *noise), one, one * 2),
    }


def dense_cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for kind, (state, network) in NETWORKS.items():
        cases |= preconditioning(kind, state, network)
        cases[f"ddim {kind}"] = step("ddim_step", states(state, network), BDIA[:2], 0.0)
        cases[f"bdia {kind}"] = step("bdia_step", states(state, state, network), BDIA, 0.0)
        cases[f"inverse {kind}"] = step("bdia_inverse_step", states(state, state, network), BDIA, 0.0)
        guided = states(state, state, network, network)
        cases[f"bdia guided {kind}"] = step("bdia_step", guided, BDIA, 7.5)
        pair = states(state, network)
        cases[f"affine noisy {kind}"] = step("affine_step", pair, BDIA[:2], 0.0, 0.5, *KEY)
        everything = ([0.9, 0.1], [0.2, 0.3], 7.5, 0.5, 1.0, 0.5, 0.7, *KEY)
        cases[f"denoised {kind}"] = step("denoised_step", states(state, network, network), *everything, outs=3)
        plain = ([0.9, 0.1], [0.2, 0.3], 0.0, 0.5, None, 0.0, None, None, 0, 0)
        cases[f"denoised plain {kind}"] = step("denoised_step", states(state, network), *plain, outs=2)
        for name in ("normal", "uniform"):
            out = states(state)
            cases[f"{name} {kind}"] = ("noise", lambda name=name, out=out: OPS[name](out[0], *KEY), [], out)
    for terms in (1, 3, 4, 5):
        arguments = (BDIA[:terms], 0.0, 0.0, None, 0, 0)
        cases[f"affine of {terms}"] = step("affine_step", states(*[F32] * terms), *arguments)
    return cases


DENSE = dense_cases()


def losses() -> dict[str, Case]:
    """Forward and backward of the losses: what must be read, and what written, 128 bits at a time."""
    cases: dict[str, Case] = {}
    for kind, (state, network) in NETWORKS.items():
        pair, three = states(network, state), states(network, state, state)
        forward = torch.ones(()), torch.empty(4, dtype=F64), 1
        for name, code, c, scaled in (("vector", 0, None, 0), ("elementwise", 1, 0.1, 1), ("squared", 2, None, 0)):
            distance = (None, c, code, 0)
            consistency = (torch.empty(4), torch.empty(4), torch.empty(4), c, 0.5, 0.002, 0, scaled, code, 0)
            for op, inputs, call in (("pseudo_huber", pair, distance), ("consistency_loss", three, consistency)):
                title = f"{op} {name} {kind}"
                cases[title] = ("sums", lambda op=op, x=inputs, call=call: OPS[op](*x, *call), inputs, [])
                backward = f"{op}_backward"
                cases[f"{title} backward"] = (
                    "gradients",
                    lambda op=backward, x=inputs, call=call, forward=forward: OPS[op](*forward, *x, *call),
                    inputs,
                    inputs[:1],
                )
    kept = states(F32)
    cases["scale_gradients_"] = ("scale", lambda: OPS["scale_gradients_"](torch.ones(()), kept), kept, kept)
    return cases


LOSSES = losses()


def policies() -> dict[str, Case]:
    """Steps, densities and the gradient of the network's output."""
    cases: dict[str, Case] = {}
    numbers, upstream = (BDIA[:2], 0.0, 0.3, False), torch.empty(4)
    step, density, backward = (OPS[f"gaussian_{name}"] for name in ("step", "log_prob", "log_prob_backward"))
    for kind, (state, network) in NETWORKS.items():
        pair, three = states(state, network), states(state, state, network)
        cases |= {
            f"gaussian_step {kind}": (
                "density_sums",
                lambda x=pair: step(x, *numbers, *KEY),
                pair,
                pair[:1],
            ),
            f"gaussian_log_prob {kind}": (
                "density_sums",
                lambda x=three: density(x, *numbers),
                three,
                [],
            ),
            f"gaussian_log_prob {kind} backward": (
                "density_gradients",
                lambda x=three: backward(upstream, 4, x, *numbers),
                three,
                three[2:],
            ),
        }
    return cases


POLICIES = policies()


def resident(tiles: int | None = None) -> dict[str, Case]:
    """Losses with their gradients from one program per sample, of so many tiles, or of as many as registers hold."""
    cases: dict[str, Case] = {}
    for kind, network, state in (("float32", F32, F32), ("mixed", F32, BF16)):
        shape = (4, tiles * TILE if tiles else RESIDENT)
        pair, three = states(network, state, shape=shape), states(network, state, state, shape=shape)
        for name, code, c, scaled in (("vector", 0, None, 0), ("elementwise", 1, 0.1, 1), ("squared", 2, None, 0)):
            distance = (None, c, code, 0)
            consistency = (torch.empty(4), torch.empty(4), torch.empty(4), c, 0.5, 0.002, 0, scaled, code, 0)
            for op, x, call in (("pseudo_huber", pair, distance), ("consistency_loss", three, consistency)):
                both = f"{op}_with_gradients"
                run = lambda op=both, x=x, call=call: OPS[op](1, *x, *call)  # noqa: E731
                cases[f"{op} {name} {kind} with gradient"] = ("resident", run, x, x[:1])
    return cases


RESIDENTS = resident()


I32, I64 = torch.int32, torch.int64
EXACT_BDIA = BDIA[:4]


def exact(name: str, tensors: list[Tensor], numbers: list[float], n: int, m: int, bits: int = 32) -> Case:
    """An exact step: guided if it has a tensor more, with a buffer if it multiplies."""
    (info,) = states(I64)
    buffers = [] if n == m else [info]
    call = lambda: OPS[name](tensors, info, numbers, 7.5, n, m, bits)  # noqa: E731
    return "exact_step", call, [*tensors, *buffers], [tensors[0], *buffers]


def exact_cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for network in (F16, BF16, F32, F64):
        for name, (n, m) in (("unit", (1, 1)), ("ratio", (9, 10))):
            pair, title = states(I64, I64, network), f"{name} {network}"
            cases[f"bdia {title}"] = exact("bdia_exact_step", pair, EXACT_BDIA, n, m)
            cases[f"inverse {title}"] = exact("bdia_exact_inverse_step", pair, EXACT_BDIA, n, m)
        cases[f"bdia guided {network}"] = exact(
            "bdia_exact_step", states(I64, I64, network, network), EXACT_BDIA, 9, 10
        )
        x, code, narrow = states(network, I64, I32)
        cases[f"encode {network}"] = "exact_step", lambda x=x: OPS["fixed_point_encode"](x, 32, I64), [x], [code]
        cases[f"encode int32 {network}"] = (
            "exact_step",
            lambda x=x: OPS["fixed_point_encode"](x, 20, I32),
            [x],
            [narrow],
        )
        for q in (code, narrow):
            decode = lambda q=q, network=network: OPS["fixed_point_decode"](q, 20, network)  # noqa: E731
            cases[f"decode {q.dtype} to {network}"] = "decode_fixed_point", decode, [q], [x]
    cases["affine of 5"] = exact("exact_affine_step", states(I64, F32, I64, F32, F32, BF16), BDIA, 1, 1)
    cases["affine int32"] = exact("exact_affine_step", states(I32, F32, I32), BDIA[:2], 1, 1, 20)
    return cases


EXACT = exact_cases()


def numbers(*shape: int) -> list[Tensor]:
    return [torch.empty(shape) for _ in range(5)]


def key(*shape: int) -> list[Tensor]:
    return [torch.empty(shape, dtype=torch.int64) for _ in range(3)]


def last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


def noisy(*tensors: Tensor) -> Callable[[], object]:
    return lambda: OPS["affine_step"](list(tensors), BDIA[: len(tensors)], 0.0, 0.5, *KEY)


MIXED = states(F32, F32, BF16)
OTHERS: dict[str, tuple[str, Callable[[], object]]] = {
    "0-d tensors": ("multistep", lambda: OPS["bdia_step.tensor"](MIXED, numbers(), None)),
    "(B,) tensors": ("multistep", lambda: OPS["bdia_step.tensor"](MIXED, numbers(4), None)),
    "(B,) keys": (
        "multistep",
        lambda: OPS["affine_step.tensor"](MIXED[1:], numbers(4)[:2], None, torch.empty(4), *key(4)),
    ),
    "0-d keys": ("noise", lambda: OPS["normal.tensor"](MIXED[2], *key())),
    "float64": ("multistep", lambda: OPS["bdia_step"](states(F64, F64, F64), BDIA, 0.0)),
    "float64 to half": ("multistep", noisy(*states(F16, F64))),
    "points": ("multistep", noisy(*states(F32, shape=(9, 2)))),
    "single numbers": ("multistep", noisy(*states(F32, shape=(9,)))),
    "odd sizes": ("multistep", noisy(*states(F32, shape=(3, 7, 5)))),
    "one element": ("multistep", noisy(*states(F32, shape=(1, 1)))),
    "channels last": ("multistep", noisy(last(MIXED[0]), last(MIXED[2]))),
    "two layouts": ("multistep", lambda: OPS["ddim_step"]([MIXED[0], last(MIXED[1])], [0.9, 0.1], 0.0)),
    "slices": ("multistep", noisy(MIXED[0][:, 1:, ::2, 3:50], MIXED[2][:, 1:, ::2, 3:50])),
    "expanded": ("multistep", noisy(MIXED[0][:1].expand(4, -1, -1, -1), MIXED[2])),
    "fold_in": ("fold", lambda: OPS["fold_in"](torch.empty(9, dtype=torch.int64), torch.tensor(1))),
}


def exact_per_sample(*layout: Any) -> Callable[[], object]:
    """With a ratio, numbers and a mark for each sample, and notes of overflows."""
    last_state, q, eps = (x[layout] for x in states(I64, I64, BF16))
    n, m, mark = (x[: len(q)] for x in key(4))
    outs = {"out": torch.empty_like(q), "info_out": torch.empty_like(q), "overflow": torch.empty_like(mark)}
    coefficients = [x[: len(q)] for x in numbers(4)[:4]]
    return lambda: OPS["bdia_exact_step.tensor_out"](
        [last_state, q, eps], q, coefficients, None, n, m, 32, mark, **outs
    )


OTHERS |= {
    "exact (B,) tensors": ("exact_step", exact_per_sample()),
    "exact slices": ("exact_step", exact_per_sample(slice(None), slice(1, None), slice(None, None, 2))),
    "exact points": ("exact_step", exact_per_sample(slice(None), 0, 0, slice(2))),
}

#: Single numbers that the assembler of Triton 3.7.1 keeps on the stack, though it has registers: no element's. By
#: variant and architecture, in bytes.
ON_THE_STACK = {
    ("consistency_loss vector float32 with gradient", 120): 8,
    ("float64", 90): 8,
    ("float64", 100): 8,
    ("pseudo_huber elementwise float32", 120): 8,
}
