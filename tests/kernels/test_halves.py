"""Halves in registers: every bit pattern, ties, tails below a register, memory off the lines, and staging beside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bicm_kernels as bk
from tests.support import instruction_sets
from tests.support.multistep_calls import OPS, call
from tests.support.tensors import BF16, F16, F32, Bits, random

HALVES = (F16, BF16)
#: The states' dtype and the network's.
KINDS = [(F32, F32), (BF16, BF16), (F16, F16), (F32, BF16), (BF16, F32), (F16, BF16)]
#: Below a vector, a pair of vectors and a block of every instruction set, beside them, and beyond a unit.
LENGTHS = [*range(1, 36), 47, 48, 49, *range(62, 68), 95, 97, *range(126, 132), 1023, 1025, 1089, 2111]


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int16)


def moved(x: Tensor, shift: int) -> Tensor:
    """The same in memory that begins some elements after an aligned address."""
    return torch.cat([x.new_zeros(shift), x.reshape(-1)])[shift:].view(x.shape)


def every_second(x: Tensor) -> Tensor:
    """The same with gaps between its elements: it is staged."""
    return torch.stack([x, -x], dim=-1)[..., 0]


def wild(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Numbers of every size, subnormal ones too, and some zeros, infinities and NaNs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = x * torch.randint(-30, 14, shape, generator=generator).double().exp2()
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65504.0, 6e-8, 1e-40, -3e38])
    choice = torch.randint(0, 8 * len(special), shape, generator=generator)
    return torch.where(choice < len(special), special[choice % len(special)], x).to(dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shift", [0, 1, 5])
def test_every_half_passes(dtype: torch.dtype, shift: int) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for turn in (0, 17):
        x = moved(patterns.roll(turn).view(dtype)[: 2**16 - turn].view(1, -1), shift)
        y = bk.affine_step([x], [1.0])
        assert torch.equal(y.isnan(), x.isnan())
        assert torch.equal(bits(y)[~x.isnan()], bits(x)[~x.isnan()])
        if dtype == BF16:  # of a NaN, the sign is kept
            assert torch.equal(bits(y)[x.isnan()], (bits(x) & -0x8000 | 0x7FC0)[x.isnan()])


def around_ties(dtype: torch.dtype) -> Tensor:
    """Every finite half, the midpoints to the next, and the floats beside both; what overflows; what underflows."""
    exact = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    exact = exact[exact.isfinite()].double().unique()
    middle = ((exact[1:] + exact[:-1]) / 2).float()
    beside = [x.nextafter(torch.tensor(side)) for x in (exact.float(), middle) for side in (-torch.inf, torch.inf)]
    edges = torch.tensor(
        [-0.0, 65519.996, 65520.0, 3.3895314e38, 3.3961775e38, 3.4e38, 1e-45, -1e-45, 2.98e-8, -2.99e-8]
    )
    return torch.cat([exact.float(), middle, *beside, edges, -edges])


@pytest.mark.parametrize("dtype", HALVES)
def test_rounded_to_the_nearest_half(dtype: torch.dtype, same_bits: Bits) -> None:
    floats = around_ties(dtype)[None]
    nothing = torch.full_like(floats, -0.0, dtype=dtype)  # to which every number is added unchanged
    same_bits(bk.affine_step([nothing, floats], [1.0, 1.0]), floats.to(dtype))
    halves = floats.to(dtype)
    for weight in (0.99609375, 2.0**-9, 1.5 * 2.0**-17, 3.14159, 1e-38):
        expected = halves.float() * torch.tensor(weight)
        same_bits(bk.affine_step([halves], [weight]), expected.to(dtype))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(("states", "network"), KINDS)
def test_tails_and_neighbours(name: str, states: torch.dtype, network: torch.dtype, same_bits: Bits) -> None:
    count, numbers = OPS[name]
    for length in LENGTHS:
        dtypes = [*[states] * count, network]
        tensors = [wild(2, length, dtype=dtype, seed=k) for k, dtype in enumerate(dtypes)]
        staged = call(name, [every_second(x) for x in tensors], numbers)
        for shift in (0, 1, 3):
            laid = [moved(x, shift + k) for k, x in enumerate(tensors)]
            for actual, expected in zip(call(name, laid, numbers), staged, strict=True):
                same_bits(actual, expected)
            if len(staged) > 1:
                continue
            around = torch.full((2 * length + 70,), 7.0, dtype=states)
            call(name, laid, numbers | {"out": around[shift + 32 :][: 2 * length].view(2, length)})
            same_bits(around[shift + 32 :][: 2 * length].view(2, length), staged[0])
            assert around[: shift + 32].eq(7).all()
            assert around[shift + 32 + 2 * length :].eq(7).all()


@pytest.mark.parametrize(("states", "network"), KINDS)
def test_past_the_cache(states: torch.dtype, network: torch.dtype, same_bits: Bits) -> None:
    # Written with non-temporal stores where samples begin at a line's start, otherwise not.
    for length in (2**21 + 96, 2**21 + 7):
        x, y = random(3, length, dtype=states), random(3, length, dtype=network, seed=1)
        whole = bk.denoised_step([x, y], [0.1, 0.5], [0.6, 0.0], x0_weight=0.4, next_scale=0.3)
        for part in (slice(0, 1000), slice(2**20 - 5, 2**20 + 700), slice(length - 900, length)):
            few = [x[:, part].contiguous(), y[:, part].contiguous()]
            small = bk.denoised_step(few, [0.1, 0.5], [0.6, 0.0], x0_weight=0.4, next_scale=0.3)
            for actual, expected in zip(whole, small, strict=True):
                assert actual is not None
                assert expected is not None
                same_bits(actual[:, part], expected)


LOSSES: list[dict[str, Any]] = [
    {},
    {"kind": "squared"},
    {"kind": "elementwise", "c": 0.03},
    {"kind": "elementwise", "c": 0.0},
]


@pytest.mark.parametrize("options", LOSSES)
@pytest.mark.parametrize("gradient", ["backward", "forward"])
@pytest.mark.parametrize(("states", "network"), KINDS)
def test_losses(
    options: dict[str, Any], gradient: Any, states: torch.dtype, network: torch.dtype, same_bits: Bits
) -> None:
    def results(x: Tensor, F: Tensor, target: Tensor, *, wanted: int) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_(k < wanted) for k, tensor in enumerate((F, x, target))]
        t = torch.linspace(0.1, 3, len(x))
        both = bk.consistency_loss(leaves[1], leaves[0], t, t / 2, leaves[2], gradient=gradient, **options)
        plain = bk.pseudo_huber(leaves[0], leaves[1], gradient=gradient, **options)
        return [both, plain, *torch.autograd.grad(both + plain, leaves[:wanted])]

    for length in (*LENGTHS[::3], 70_001):
        dtypes = (states, network, states)
        tensors = [random(2, length, dtype=dtype, seed=k) for k, dtype in enumerate(dtypes)]
        for wanted in (1, 3):
            staged = results(*map(every_second, tensors), wanted=wanted)
            for shift in (0, 1):
                for actual, expected in zip(
                    results(*(moved(x, shift) for x in tensors), wanted=wanted), staged, strict=True
                ):
                    same_bits(actual, expected)


DIGEST = """
import hashlib, sys, torch, bicm_kernels as bk
from tests.kernels.test_halves import KINDS, LENGTHS, moved, wild
from tests.support.multistep_calls import OPS, call
digest = hashlib.sha256()
def add(x):
    nan = x.isnan()  # its sign and payload are not part of the contract
    x = torch.where(nan, 0.0, x.detach())
    digest.update(x.contiguous().view(-1).view(torch.uint8).numpy().tobytes() + bytes(nan.view(-1).tolist()))
for states, network in KINDS:
    for length in LENGTHS:
        for name, (count, numbers) in OPS.items():
            dtypes = [*[states] * count, network]
            tensors = [moved(wild(2, length, dtype=dtype, seed=k), k) for k, dtype in enumerate(dtypes)]
            for x in call(name, tensors, numbers):
                add(x)
        x, y, z = (moved(wild(2, length, dtype=dtype, seed=k), k) for k, dtype in enumerate((states, network, states)))
        y = y.requires_grad_()
        for kind in ({}, {"kind": "elementwise", "c": 0.1}):
            loss = bk.consistency_loss(x.nan_to_num(0, 3, -3), y, 0.7, 0.3, z, reduction="none", **kind)
            add(loss)
            add(torch.autograd.grad(loss.sum(), y)[0])
print(bk.backend.describe())
print(digest.hexdigest())
"""


@pytest.mark.slow
def test_instruction_sets_agree(python: Any) -> None:
    digests = {}
    for name in instruction_sets.available():
        described, digests[name] = python(DIGEST, BICM_KERNELS_ISA=name).stdout.splitlines()
        assert described.startswith(f"cpu: native (C++, {name}")
    assert len(set(digests.values())) == 1, digests
