"""Exact steps from the Triton kernels: the reference's integers, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from bits import assert_same, random
from torch import Tensor

import bicm_kernels as bk
from bicm_kernels import backend, reference

pytest.importorskip("triton")

from bicm_kernels.triton_kernels import OPS, operands

# Some tests divide by zero, and so do the rows of a tile that lie behind the batch.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
SHAPE = (3, 2, 5, 7)
MISSING = -(2**63)
BDIA = [0.9, 0.3, 1.1, -0.2]
NAMES = ("a", "b", "a_last", "b_last")
RATIOS = [(1, 1), (24, 25), (9, 10), (1, 2), (3, 2), (1023, 2**20)]
DIRECTIONS = ["bdia_exact_step", "bdia_exact_inverse_step"]


def states(shape: tuple[int, ...], seed: int = 0, bits: int = 36) -> Tensor:
    """Some of them are missing."""
    q = torch.randint(-(2**bits), 2**bits, shape, generator=torch.Generator().manual_seed(seed))
    q.view(-1)[11 + seed :: 37] = MISSING
    return q


def problem(shape: tuple[int, ...], dtype: torch.dtype = F32, bits: int = 36) -> tuple[Tensor, ...]:
    """The last state, the state, two predictions and the buffer."""
    last, q, info = (states(shape, seed, bits) for seed in range(3))
    return last, q, random(shape, dtype, 3), random(shape, dtype, 4), info


def same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], unit: bool = False) -> None:
    """A ratio of 1 returns no buffer."""
    assert_same(actual[0], expected[0])
    if unit:
        assert actual[1].shape == (0,)
    else:
        assert_same(actual[1], expected[1])


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
@pytest.mark.parametrize("ratio", RATIOS, ids=str)
def test_bdia(ratio: tuple[int, int], dtype: torch.dtype) -> None:
    last, q, eps, cond, info = problem(SHAPE, dtype)
    numbers, unit = dict(zip(NAMES, BDIA, strict=True)), ratio == (1, 1)
    for name in DIRECTIONS:
        expected = getattr(reference, name)(last, q, eps, info, **numbers, gamma=ratio)
        same(OPS[name]([last, q, eps], info, BDIA, 0.0, *ratio, 32), expected, unit)
        expected = getattr(reference, name)(last, q, (eps, cond), info, **numbers, gamma=ratio, guidance_scale=7.5)
        same(OPS[name]([last, q, eps, cond], info, BDIA, 7.5, *ratio, 32), expected, unit)


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5])
def test_affine(terms: int) -> None:
    last, q, _, _, info = problem(SHAPE)
    tensors = [q, random(SHAPE, F16), random(SHAPE, F64, 1), last, random(SHAPE, BF16, 2)][:terms]
    weights = [0.3, -1.7, 1e3, -2.0, 0.5][:terms]
    for name, ratio in product(("exact_affine_step", "exact_affine_inverse_step"), [(1, 1), (9, 10)]):
        expected = getattr(reference, name)(last, tensors, weights, info, ratio=ratio)
        same(OPS[name]([last, *tensors], info, weights, 0.0, *ratio, 32), expected, ratio == (1, 1))


@pytest.mark.parametrize("bits", [20, 50, 62])
@pytest.mark.parametrize("kind", [F16, F32, F64], ids=str)
def test_ratios_and_numbers_per_sample(kind: torch.dtype, bits: int) -> None:
    """A ratio of 1 among others, and two that are none."""
    shape = (6, 33)
    last, q, eps, cond, info = problem(shape, F32, bits)
    n, m = torch.tensor([1, 9, 5, 2**20, 0, 3]), torch.tensor([2, 10, 5, 2**20 - 1, 3, 2**20 + 1])
    row, one = torch.linspace(0.5, 1.5, 6).to(kind), torch.tensor(0.3, dtype=F64)
    numbers, marks = [row, one, row, one], torch.arange(6) + 10
    for name in DIRECTIONS:
        ours, plain = torch.zeros(6, dtype=torch.int64), torch.zeros(6, dtype=torch.int64)
        expected = getattr(reference, name)(
            last, q, (eps, cond), info, **dict(zip(NAMES, numbers, strict=True)), gamma=(n, m), guidance_scale=row,
            overflow=plain, mark=marks,
        )  # fmt: skip
        out, kept = torch.empty_like(last), torch.empty_like(info)
        tensors = [last, q, eps, cond]
        outs = {"out": out, "info_out": kept, "overflow": ours}
        OPS[f"{name}.tensor_out"](tensors, info, numbers, row, n, m, 32, marks, **outs)
        same((out, kept), expected)
        assert torch.equal(ours, plain)
        assert plain[4:].tolist() == [14, 15]


DIVISORS = [1, 2, 3, 5, 641, 1000, 65537, 2**19 + 1, 2**20 - 1, 2**20]


@pytest.mark.parametrize("divisor", DIVISORS)
def test_division_rounds_down(divisor: int) -> None:
    """Multiples and their neighbours up to the ends of int64, where Triton's own division truncates."""
    wholes = [0, 1, 2, 3, 2**31, 2**52, 2**53, (2**63 - 1) // divisor - 1, (2**63 - 1) // divisor]
    z = [sign * whole * divisor + k for whole in wholes for sign in (1, -1) for k in (-2, -1, 0, 1, 2)]
    q = torch.tensor([[x for x in z if abs(x) < 2**63]])
    info, zero = torch.arange(q.shape[1]).view(1, -1) - 5, torch.zeros(q.shape)
    for n, m in ((1, divisor), (divisor, 1), (divisor, 3)):
        if n != m:
            expected = reference.exact_affine_step(q, [zero], [1.0], info, ratio=(n, m))
            same(OPS["exact_affine_step"]([q, zero], info, [1.0], 0.0, n, m, 32), expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_encoding_rounds_to_even(dtype: torch.dtype) -> None:
    ties = [0.5, 1.5, 2.5, -0.5, -1.5, -0.0, 2.0**52 + 0.5, 2.0**51 + 0.5, -(2.0**51) - 1.5, 0.5 - 2.0**-54, 1e300]
    ends = [2.0**63, -(2.0**63), 2.0**63 - 1024, 1024 - 2.0**63, 2.0**31 - 0.5, torch.inf, -torch.inf, torch.nan]
    for x in (torch.tensor([[*ties, *ends]], dtype=F64), random((4, 300), F16, 2) * 100):
        ours, plain = torch.zeros(len(x), dtype=torch.int64), torch.zeros(len(x), dtype=torch.int64)
        expected = reference.fixed_point_encode(x, fraction_bits=0, dtype=dtype, overflow=plain, mark=3)
        assert_same(OPS["fixed_point_encode"](x, 0, dtype), expected)
        out = torch.empty_like(x, dtype=dtype)
        OPS["fixed_point_encode.out"](x, 0, dtype, 3, out=out, overflow=ours)
        assert_same(out, expected)
        assert torch.equal(ours, plain)
    x = random(SHAPE).to(memory_format=torch.channels_last)
    assert_same(OPS["fixed_point_encode"](x, 20, dtype), reference.fixed_point_encode(x, fraction_bits=20, dtype=dtype))


@pytest.mark.parametrize("result", [F16, BF16, F32, F64], ids=str)
def test_decoding_rounds_once(result: torch.dtype) -> None:
    """Among them integers halfway between two float64 numbers."""
    ties = torch.tensor([[2**53 + 1, 2**53 + 3, -(2**53) - 1, 2**54 + 2, 2**63 - 1, MISSING, 2**62 + 257, 0, 1]])
    narrow = torch.tensor([[-(2**31), 2**31 - 1, -5, 0]], dtype=torch.int32)
    for q, bits in ((ties, 30), (states(SHAPE, bits=40), 32), (states(SHAPE).transpose(1, 3), 24), (narrow, 16)):
        expected = reference.fixed_point_decode(q, fraction_bits=bits, dtype=result)
        assert_same(OPS["fixed_point_decode"](q, bits, result), expected)


def test_int32_states() -> None:
    last, q = (torch.randint(-(2**30), 2**30, SHAPE, generator=torch.Generator().manual_seed(k)).int() for k in (0, 1))
    last.view(-1)[3::7], q.view(-1)[5::11] = -(2**31), -(2**31)
    eps, info = random(SHAPE), torch.zeros(SHAPE, dtype=torch.int64)
    for name in ("exact_affine_step", "exact_affine_inverse_step"):
        expected = getattr(reference, name)(last, [q, eps], [1.7, 30.0], info, fraction_bits=24)
        same(OPS[name]([last, q, eps], info, [1.7, 30.0], 0.0, 1, 1, 24), expected, unit=True)
        assert (expected[0] == -(2**31)).sum() > 40


@pytest.mark.parametrize("shape", [(1, 1), (3,), (5, 2), (300, 3), (1, 3, 17, 19), (2, 1025), (0, 3), (2, 0)], ids=str)
def test_sizes(shape: tuple[int, ...]) -> None:
    last, q, eps, _, info = problem(shape)
    expected = reference.bdia_exact_step(last, q, eps, info, **dict(zip(NAMES, BDIA, strict=True)), gamma=(9, 10))
    same(OPS["bdia_exact_step"]([last, q, eps], info, BDIA, 0.0, 9, 10, 32), expected)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "sliced": lambda x: x[:, :, 1:, ::2],
    "transposed": lambda x: x.transpose(1, 3),
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
}


@pytest.mark.parametrize("wide", [False, True], ids=["", "64-bit indices"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if wide:
        monkeypatch.setattr(operands, "WIDE", 1)
    last, q, eps, _, info = (LAYOUTS[layout](x) for x in problem(SHAPE))
    eps = eps.contiguous()
    for gamma in ((9, 10), (torch.tensor([9, 5, 1]), torch.tensor(10))):
        expected = reference.bdia_exact_step(last, q, eps, info, **dict(zip(NAMES, BDIA, strict=True)), gamma=gamma)
        if isinstance(gamma[0], Tensor):
            numbers = [torch.tensor(x, dtype=F64) for x in BDIA]
            same(OPS["bdia_exact_step.tensor"]([last, q, eps], info, numbers, None, *gamma, 32), expected)
        else:
            same(OPS["bdia_exact_step"]([last, q, eps], info, BDIA, 0.0, *gamma, 32), expected)


def test_results_may_replace_inputs() -> None:
    last, q, eps, _, info = problem(SHAPE)
    empty = torch.empty(0, dtype=torch.int64)
    for swapped in (False, True):
        tensors, buffer = [last.clone(), q, eps], info.clone()
        expected = OPS["bdia_exact_step"](tensors, buffer, BDIA, 0.0, 9, 10, 32)
        outs = (buffer, tensors[0]) if swapped else (tensors[0], buffer)
        named = {"out": outs[0], "info_out": outs[1], "overflow": empty}
        assert OPS["bdia_exact_step.out"](tensors, buffer, BDIA, 0.0, 9, 10, 32, 1, **named) is None
        same(outs, expected)


def test_the_first_mark_stays() -> None:
    for place in (0, 1500, 2999):
        last, x = states((4, 3000)).clamp(-(2**40)), random((4, 3000))
        x[1:, place] = torch.nan
        notes = torch.tensor([0, 0, 5, 0, 9])[:4]
        outs = {"out": torch.empty_like(last), "info_out": last.new_empty(0), "overflow": notes}
        marks = torch.tensor([11, 12, 13, 14])
        OPS["exact_affine_step.tensor_out"](
            [last, x], last, [torch.tensor(1.0)], None, None, None, 32, marks, **outs
        )  # fmt: skip
        assert notes.tolist() == [0, 12, 5, 14]


Q, EPS = torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, 4)
ONE = torch.ones(())
OUTS = {"out": Q.clone(), "info_out": Q.clone(), "overflow": Q[:, 0].clone()}
NUMBERS = ([1.0], 0.0, 9, 10, 32)


def write(**changes: Any) -> object:
    return OPS["exact_affine_step.out"]([Q, EPS], Q, *NUMBERS, 1, **{**OUTS, **changes})


WRONG: dict[str, Callable[[], object]] = {
    "nothing": lambda: OPS["exact_affine_step"]([], Q, *NUMBERS),
    "shape": lambda: OPS["exact_affine_step"]([Q, EPS[:2]], Q, *NUMBERS),
    "buffer's shape": lambda: OPS["exact_affine_step"]([Q, EPS], Q[:2], *NUMBERS),
    "buffer's dtype": lambda: OPS["exact_affine_step"]([Q, EPS], EPS, *NUMBERS),
    "floating state": lambda: OPS["exact_affine_step"]([EPS, EPS], Q, *NUMBERS),
    "two kinds of state": lambda: OPS["exact_affine_step"]([Q, Q.int()], Q, *NUMBERS),
    "integer eps": lambda: OPS["bdia_exact_step"]([Q, Q, Q], Q, BDIA, 0.0, 9, 10, 32),
    "coefficients": lambda: OPS["bdia_exact_step"]([Q, Q, EPS], Q, [1.0], 0.0, 9, 10, 32),
    "six terms": lambda: OPS["exact_affine_step"]([Q, *[EPS] * 6], Q, [1.0] * 6, 0.0, 9, 10, 32),
    "ratio": lambda: OPS["exact_affine_step"]([Q, EPS], Q, [1.0], 0.0, 0, 10, 32),
    "int32 and a ratio": lambda: OPS["exact_affine_step"]([Q.int(), EPS], Q, [1.0], 0.0, 9, 10, 20),
    "fraction bits": lambda: OPS["exact_affine_step"]([Q, EPS], Q, [1.0], 0.0, 9, 10, 63),
    "half a ratio": lambda: OPS["exact_affine_step.tensor"]([Q, EPS], Q, [ONE], None, ONE.long(), None, 32),
    "guidance": lambda: OPS["exact_affine_step.tensor"]([Q, EPS, EPS], Q, [ONE], None, None, None, 32),
    "out's shape": lambda: write(out=Q[:2]),
    "out's dtype": lambda: write(out=EPS),
    "one memory twice": lambda: write(out=OUTS["info_out"]),
    "overflow's shape": lambda: write(overflow=Q[:2, 0]),
    "overflow in one place": lambda: write(overflow=Q[:1, 0].expand(3)),
    "decoded float": lambda: OPS["fixed_point_decode"](EPS, 20, F32),
    "encoded as float": lambda: OPS["fixed_point_encode"](EPS, 20, F32),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_wrong_arguments_raise(wrong: Callable[[], object]) -> None:
    with pytest.raises(RuntimeError, match="bicm_kernels: "):
        wrong()


@pytest.mark.slow
def test_the_public_functions_run_on_the_kernels() -> None:
    """Sixty steps at 1/2 there and back return every bit."""
    first = reference.fixed_point_encode(random((2, 9)))
    numbers = {"a": 0.98, "b": 0.1, "a_last": 1.01, "b_last": -0.05, "gamma": (1, 2)}
    with backend.use("triton"):
        assert backend.running("cpu") == "triton"
        last, q, info, overflow = first, first + 1000, torch.zeros_like(first), torch.zeros(2, dtype=torch.int64)
        for k in range(60):
            eps = torch.tanh(bk.fixed_point_decode(q, dtype=F16))
            state, info = bk.bdia_exact_step(last, q, eps, info, **numbers, overflow=overflow, mark=k + 1)
            last, q = q, state
        assert info.abs().max() > 2**50
        for _ in range(60):
            eps = torch.tanh(bk.fixed_point_decode(last, dtype=F16))
            state, info = bk.bdia_exact_inverse_step(q, last, eps, info, **numbers, overflow=overflow)
            last, q = state, last
        with pytest.raises(ValueError, match="info must have the shape of q_last"):
            bk.bdia_exact_step(last, q, eps, info[:1], **numbers)
    assert torch.equal(last, first)
    assert torch.equal(q, first + 1000)
    assert not info.any()
    assert not overflow.any()
