"""Exact reversible updates: the reference's bits for every dtype, layout and size, on every instruction set."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import bicm_kernels as bk
from bicm_kernels import reference
from tests.support import instruction_sets
from tests.support.exact_calls import states
from tests.support.tensors import BF16, F16, F32, F64, Bits, random

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "sliced": lambda x: x[:, :, 1:, ::2],
    "transposed": lambda x: x.transpose(1, 3),
}
Ratios = Sequence[tuple[Any, Any]]


def every_ratio(batch: int) -> Ratios:
    row = torch.arange(batch) + 1
    return [(1, 1), (9, 10), (torch.tensor(9), 10), (row, torch.tensor(3)), (row, row.flip(0)), (3, 2)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
def test_bits(layout: str, dtype: torch.dtype, same_bits: Bits) -> None:
    q_last, q, info = (LAYOUTS[layout](states(5, 3, 8, 8, seed=k, bits=36)) for k in range(3))
    eps, cond = (LAYOUTS[layout](random(5, 3, 8, 8, dtype=dtype, seed=k)) for k in (4, 5))
    row = torch.linspace(0.5, 1.5, 5)
    for (a, s), gamma in itertools.product([(0.9, 3.0), (row, row)], every_ratio(5)):
        numbers: dict[str, Any] = {"a": a, "b": 0.3, "a_last": 1.1, "b_last": -0.2, "gamma": gamma}
        for name in ("bdia_exact_step", "bdia_exact_inverse_step"):
            for guided in ({}, {"guidance_scale": s}):
                notes = [torch.zeros(5, dtype=torch.int64) for _ in range(2)]
                prediction = (eps, cond) if guided else eps
                ours, plain = (
                    getattr(module, name)(q_last, q, prediction, info, overflow=f, mark=3, **numbers, **guided)
                    for module, f in zip((bk, reference), notes, strict=True)
                )
                for actual, expected in zip((*ours, notes[0]), (*plain, notes[1]), strict=True):
                    same_bits(actual, expected)
                assert ours[0].stride() == torch.empty_like(q_last).stride()


@pytest.mark.parametrize("terms", range(1, 6))
def test_affine_bits(terms: int, same_bits: Bits) -> None:
    q, info = states(3, 1100, bits=40), states(3, 1100, seed=1, bits=40).abs()
    dtypes = itertools.cycle([F32, None, F16, F64, BF16])
    tensors = [
        states(3, 1100, seed=k, bits=35) if dtype is None else random(3, 1100, dtype=dtype, seed=k)
        for k, dtype in zip(range(terms), dtypes, strict=False)
    ]
    weights = [0.3, torch.linspace(-1, 1, 3), torch.tensor(1e3), -2.0, 0.0][:terms]
    for name in ("exact_affine_step", "exact_affine_inverse_step"):
        for ratio in every_ratio(3):
            ours, plain = (getattr(m, name)(q, tensors, weights, info, ratio=ratio) for m in (bk, reference))
            for actual, expected in zip(ours, plain, strict=True):
                same_bits(actual, expected)


@pytest.mark.parametrize("shape", [(1,), (3, 1), (2, 1025), (0, 3), (2, 0), (130, 63)])
def test_sizes(shape: tuple[int, ...], same_bits: Bits) -> None:
    q, x, info = states(*shape, bits=40), random(*shape), states(*shape, seed=1, bits=40)
    for ratio, op in itertools.product([(1, 1), (9, 10)], ["exact_affine_step", "exact_affine_inverse_step"]):
        ours, plain = (getattr(m, op)(q, [x, q], [0.5, -0.1], info, ratio=ratio) for m in (bk, reference))
        for actual, expected in zip(ours, plain, strict=True):
            same_bits(actual, expected)
    narrow = bk.fixed_point_encode(x, fraction_bits=20, dtype=torch.int32)
    same_bits(narrow, reference.fixed_point_encode(x, fraction_bits=20, dtype=torch.int32))
    for dtype in (F16, BF16, F32, F64):
        decoded = bk.fixed_point_decode(narrow, fraction_bits=20, dtype=dtype)
        same_bits(decoded, reference.fixed_point_decode(narrow, fraction_bits=20, dtype=dtype))
    ours, plain = (
        m.exact_affine_step(narrow, [x, narrow], [0.5, -0.1], info, fraction_bits=20) for m in (bk, reference)
    )
    same_bits(ours[0], plain[0])


@pytest.mark.parametrize("ratio", [(24, 25), (25, 24), (1, 2), (2, 1), (1, 2**20), (2**20, 1), (1021, 2**20 - 1)])
def test_quotients_at_every_size(ratio: tuple[int, int], same_bits: Bits) -> None:
    # Multiples of both parts and their neighbours, where a quotient that is off by one shows; whole parts of one size,
    # because the CPU takes another way where all are small, and parts where a few are not.
    generator, (n, m) = torch.Generator().manual_seed(0), ratio
    x = random(8, 200)
    for bits, name in itertools.product(range(1, 63), ("exact_affine_step", "exact_affine_inverse_step")):
        sizes = torch.tensor([bits] * 7 + [62])[:, None]
        q, info = (
            (torch.randint(-(2**62), 2**62, (8, 200), generator=generator) >> 62 - sizes) // d * d + offset
            for d, offset in zip((m, n), torch.randint(-1, 2, (2, 8, 200), generator=generator), strict=True)
        )
        ours, plain = (getattr(module, name)(q, [x], [2.0**-30], info, ratio=ratio) for module in (bk, reference))
        for actual, expected in zip(ours, plain, strict=True):
            same_bits(actual, expected)


def test_increments_at_every_size(same_bits: Bits) -> None:
    wide = [(states(2, 100, bits=bits), ratio, 32) for bits in (20, 40, 62) for ratio in ((1, 1), (9, 10))]
    narrow = [(states(2, 100, bits=bits).to(torch.int32), (1, 1), 20) for bits in (20, 31)]
    for power in range(-34, 34):
        x = random(2, 100) * 2.0**power
        x[0, ::7] = torch.tensor([0.5, -0.5, 1.5, -0.0, 2.5]).repeat(3) * 2.0**-32
        for (q, ratio, bits), name in itertools.product(
            wide + narrow, ("exact_affine_step", "exact_affine_inverse_step")
        ):
            ours, plain = (
                getattr(module, name)(q, [x], [1.0], q.to(torch.int64), ratio=ratio, fraction_bits=bits)
                for module in (bk, reference)
            )
            for actual, expected in zip(ours, plain, strict=True):
                same_bits(actual, expected)
        same_bits(bk.fixed_point_encode(x), reference.fixed_point_encode(x))


@pytest.mark.parametrize("count", [1, 2])
def test_batch_invariance(count: int, same_bits: Bits, threads: Callable[[int], Any]) -> None:
    q, info, eps = states(33, 3, 32, 32, bits=40), states(33, 3, 32, 32, seed=1, bits=40), random(33, 3, 32, 32)
    n = torch.arange(33) + 1
    with threads(count):
        whole = bk.exact_affine_step(q, [eps], [0.7], info, ratio=(n, 34 - n))
        for b in (0, 16, 32):
            row = slice(b, b + 1)
            alone = bk.exact_affine_step(q[row], [eps[row]], [0.7], info[row], ratio=(b + 1, 33 - b))
            for every, one in zip(whole, alone, strict=True):
                same_bits(every[row], one)


DIGEST = """
import torch, bicm_kernels as bk
g = torch.Generator().manual_seed(0)
total = 0
for bits in (20, 40, 48, 50, 52, 62):
    q, info = (torch.randint(-2**bits, 2**bits, (3, 1500), generator=g) for _ in range(2))
    x = torch.randn(3, 1500, generator=g) * 2.0 ** (bits - 32)
    for ratio in ((1, 1), (9, 10), (1, 2), (3, 1), (1023, 1048576)):
        for op in (bk.exact_affine_step, bk.exact_affine_inverse_step):
            for y in op(q, [x, q], [0.3, -1.7], info, ratio=ratio):
                total = (total * 1000003 + int((y * torch.arange(1, 4501).view(3, -1)).sum())) % 2**61
print(total, bk.backend.describe().split()[1])
"""


@pytest.mark.slow
def test_the_same_bits_on_every_instruction_set(python: Callable[..., Any]) -> None:
    runs = [python(DIGEST, BICM_KERNELS_ISA=isa).stdout for isa in instruction_sets.available()]
    runs.append(python(DIGEST, BICM_KERNELS_BACKEND="reference").stdout)
    assert len({line.split()[0] for line in runs}) == 1
