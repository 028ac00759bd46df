"""The step ops: bits for every dtype, layout, size and argument; batch invariance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import bicm_kernels as bk
from bicm_kernels import reference
from tests.support.multistep_calls import ARGUMENTS, DTYPES, NOISE, OPS, as_tensors, call, operands
from tests.support.tensors import BF16, F16, F32, F64, LAYOUTS, Bits, Threads, random


def agree(name: str, tensors: Sequence[Any], numbers: dict[str, Any], same_bits: Bits) -> None:
    """The kernel's bits are the reference's, and results have the layout of the first tensor."""
    first = tensors[0][0] if isinstance(tensors[0], tuple) else tensors[0]
    ours, plain = call(name, tensors, numbers), call(name, tensors, numbers, reference)
    for actual, expected in zip(ours, plain, strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            same_bits(actual, expected)
            assert actual.stride() == expected.stride() == torch.empty_like(first).stride()


# --- the same bits as the reference -------------------------------------------------------------------------

SIZES = [
    (1,),
    (7,),
    (1, 1),
    (5, 3),
    (2, 1023),
    (3, 1025),
    (2, 3, 17, 31),
    (1, 2, 3, 2, 3, 2),
    (130, 257),
    (0, 3),
    (2, 0, 4),
]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(("states", "network"), DTYPES)
def test_dtypes_and_sizes(name: str, states: torch.dtype, network: torch.dtype, same_bits: Bits) -> None:
    for shape in SIZES:
        agree(name, operands(name, shape, states, network), OPS[name][1], same_bits)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(("states", "network"), [(F32, F32), (F32, BF16), (F16, F16), (F64, F32)])
def test_layouts(name: str, states: torch.dtype, network: torch.dtype, same_bits: Bits) -> None:
    count = len(LAYOUTS)
    for shape, turn in itertools.product([(3, 5, 7, 4), (2, 1, 33, 65), (1, 4, 1, 9)], (0, 1, 4)):
        tensors = operands(name, shape, states, network)
        for i in range(count):
            places = [list(LAYOUTS.values())[(i + turn * k) % count] for k in range(len(tensors))]
            laid = [place(x) for place, x in zip(places, tensors, strict=True)]
            agree(name, laid, OPS[name][1], same_bits)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("kind", ARGUMENTS)
def test_arguments(name: str, kind: str, same_bits: Bits) -> None:
    numbers = as_tensors(OPS[name][1], ARGUMENTS[kind])
    for (states, network), shape in itertools.product(DTYPES[:6], [(4, 67), (4, 3, 21, 19)]):
        tensors = operands(name, shape, states, network)
        agree(name, tensors, numbers, same_bits)
        agree(name, [x.transpose(1, -1).contiguous().transpose(1, -1) for x in tensors], numbers, same_bits)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(("states", "network"), DTYPES)
def test_floats_and_tensors_agree(name: str, states: torch.dtype, network: torch.dtype, same_bits: Bits) -> None:
    tensors, numbers = operands(name, (4, 50), states, network), OPS[name][1]
    plain = call(name, tensors, numbers)
    for convert in (lambda x: torch.tensor(x, dtype=F64), lambda x: torch.full((4,), x, dtype=F64)):
        for actual, expected in zip(call(name, tensors, as_tensors(numbers, convert)), plain, strict=True):
            same_bits(actual, expected)


SPECIAL = [
    0.0,
    -0.0,
    1.0,
    math.inf,
    -math.inf,
    math.nan,
    1e-45,
    -1e-40,
    65504.0,
    65519.9,
    65520.0,
    3e38,
    -3.4e38,
    6e-8,
]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(("states", "network"), DTYPES)
def test_special_values(name: str, states: torch.dtype, network: torch.dtype, same_bits: Bits) -> None:
    grid = torch.tensor(list(itertools.product(SPECIAL, SPECIAL)), dtype=F64)
    columns = [grid[:, 0], grid[:, 1], grid[:, 0].flip(0), grid[:, 1].roll(3)]
    tensors = [x.to(y.dtype).view(4, -1) for x, y in zip(columns, operands(name, (1,), states, network), strict=False)]
    agree(name, tensors, OPS[name][1], same_bits)
    for value in (0.0, -0.0, math.inf, math.nan, 1e-42):
        agree(name, tensors, as_tensors(OPS[name][1], lambda _, v=value: v), same_bits)
        agree(
            name,
            tensors,
            as_tensors(OPS[name][1], lambda _, v=value: torch.tensor([1.0, v, -v, 2.0])),
            same_bits,
        )


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("guided", [False, True])
def test_every_number_of_terms(terms: int, guided: bool, same_bits: Bits) -> None:
    for states, network in DTYPES:
        tensors: list[Any] = [random(3, 70, dtype=states if k < terms - 1 else network, seed=k) for k in range(terms)]
        weights = [0.9 - 0.31 * k for k in range(terms)]
        numbers: dict[str, Any] = {"weights": weights, **NOISE}
        if guided:
            tensors[-1] = (tensors[-1], random(3, 70, dtype=network, seed=9))
            numbers["guidance_scale"] = 3.7
        agree("affine_step", tensors, numbers, same_bits)
        for clip, scale, noisy in itertools.product(
            (None, 0.5, torch.tensor([0.1, 1.0, math.inf])), (None, 0.7), (0, 1)
        ):
            more = {
                "x0_weights": [1.5, -0.5, 0.25, 2.0, -1.0][:terms],
                "x0_weight": -0.6,
                "clip": clip,
                "next_scale": scale,
            }
            step = {**numbers, **more} if noisy else {**more, "weights": weights}
            if guided:
                step["guidance_scale"] = torch.tensor([3.7, 1.0, 0.0])
            agree("denoised_step", tensors, step, same_bits)


@pytest.mark.parametrize("name", OPS)
def test_guidance(name: str, same_bits: Bits) -> None:
    for (states, network), layout in itertools.product(DTYPES, ("contiguous", "channels_last", "expanded inside")):
        *tensors, eps = operands(name, (4, 3, 9, 8), states, network)
        other = LAYOUTS[layout](random(4, 3, 9, 8, dtype=network, seed=8))
        for scale in (7.5, 0.0, 1.0, torch.tensor(2.5), torch.tensor([0.0, 1.0, 7.5, -3.0])):
            numbers = {**OPS[name][1], "guidance_scale": scale}
            agree(name, [*tensors, (eps, other)], numbers, same_bits)
            agree(name, [*tensors, (other, eps)], numbers, same_bits)


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
def test_results_larger_than_the_cache(dtype: torch.dtype, same_bits: Bits, threads: Threads) -> None:
    size = 9 * 2**20 // torch.empty((), dtype=dtype).element_size() // 3
    memory = random(2 * 3 * (size + 1), dtype=dtype)
    z, eps = (memory[i:][: 3 * (size + 1)].view(3, size + 1)[:, 1:] for i in (0, 3 * (size + 1)))
    for count, tensors in itertools.product((1, 2), ([z, eps], [z.contiguous(), eps.contiguous()])):
        with threads(count):
            agree("ddim_step", tensors, {"a": 1.1, "b": 0.3}, same_bits)
            out = torch.full((3 * size + 2,), 7.0, dtype=dtype)
            written = out[1:-1].view(3, size)
            bk.ddim_step(*tensors, a=1.1, b=0.3, out=written)
            same_bits(written, bk.ddim_step(*tensors, a=1.1, b=0.3))
            assert out[0] == out[-1] == 7.0


@pytest.mark.slow
@pytest.mark.parametrize(("states", "network"), [(F32, F32), (F32, BF16), (BF16, BF16)])
def test_denoised_samples_past_the_cache(states: torch.dtype, network: torch.dtype, same_bits: Bits) -> None:
    """Samples that begin at the boundaries of cache lines and between them, and memory around them."""
    shape = (3, 750_003)
    z, eps, other = random(*shape, dtype=states), random(*shape, dtype=network), random(*shape, dtype=network, seed=5)
    for guidance, extra in itertools.product(({}, {"guidance_scale": 2.0}), ({}, {"next_scale": 0.5, "seed": 3})):
        output = (eps, other) if guidance else eps
        numbers = {"x0_weight": 0.3, "clip": 1.0, "noise_weight": 0.1 if extra else 0.0, **guidance, **extra}
        weights = ([1.1, -0.4], [0.2, 0.7])
        agree("denoised_step", [z, output], {"x0_weights": weights[0], "weights": weights[1], **numbers}, same_bits)
        expected = [x for x in bk.denoised_step([z, output], *weights, **numbers) if x is not None]
        for offset in (0, 1):
            memory = [torch.full((z.numel() + 34,), 7.0, dtype=states) for _ in expected]
            places = [m[16 + offset :][: z.numel()].view(shape) for m in memory]
            bk.denoised_step([z, output], *weights, **numbers, out=places)
            for m, place, wanted in zip(memory, places, expected, strict=True):
                same_bits(place, wanted)
                assert bool((m[: 16 + offset] == 7.0).all() and (m[16 + offset + z.numel() :] == 7.0).all())


def test_dimensions_that_do_not_merge() -> None:
    shape = (2,) * 11
    z = random(*shape)
    backwards = z.permute(0, *range(10, 0, -1))
    with pytest.raises(ValueError, match="more than 8 dimensions"):
        bk.ddim_step(z, backwards, a=2.0, b=1.0)
    with bk.backend.use("reference"):
        assert torch.equal(bk.ddim_step(z, backwards, a=2.0, b=1.0), 2 * z + backwards)
    assert torch.equal(bk.ddim_step(z, z, a=2.0, b=1.0), 3 * z)


@pytest.mark.parametrize("name", OPS)
def test_autocast_leaves_the_state_alone(name: str, same_bits: Bits) -> None:
    tensors, numbers = operands(name, (3, 40), F32, BF16), OPS[name][1]
    plain = call(name, tensors, numbers)
    with torch.autocast("cpu", dtype=BF16):
        for actual, expected in zip(call(name, tensors, numbers), plain, strict=True):
            same_bits(actual, expected)
        tracked = call(name, [tensors[0].clone().requires_grad_(), *tensors[1:]], numbers)
        for actual, expected in zip(tracked, plain, strict=True):
            same_bits(actual, expected)


# --- batch invariance ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("shape", [(700, 64), (9, 5000), (5, 2, 50, 60)])
def test_a_sample_does_not_depend_on_its_batch(
    name: str, shape: tuple[int, ...], same_bits: Bits, threads: Threads
) -> None:
    plain = {key: value for key, value in OPS[name][1].items() if key != "sample_id"}
    varied = as_tensors(plain, lambda x: x * torch.linspace(0.9, 1.1, shape[0], dtype=F64))
    layouts = ("contiguous", "channels_last") if len(shape) == 4 else ("contiguous",)
    for dtypes, layout, numbers in itertools.product([(F32, F32), (F32, BF16)], layouts, (plain, varied)):
        tensors = [LAYOUTS[layout](x) for x in operands(name, shape, *dtypes)]

        def part(
            begin: int, end: int, tensors: list[Tensor] = tensors, v: dict[str, Any] = numbers
        ) -> tuple[Tensor, ...]:
            key = {"sample_id": begin} if "seed" in v else {}

            def cut(x: Any) -> Any:
                return [cut(y) for y in x] if isinstance(x, list) else x[begin:end] if isinstance(x, Tensor) else x

            return call(name, cut(tensors), {k: cut(x) for k, x in v.items()} | key)

        whole = part(0, shape[0])
        for count in (1, 2, 3):
            with threads(count):
                for actual, expected in zip(part(0, shape[0]), whole, strict=True):
                    same_bits(actual, expected)
        for begin, end in [
            (0, 1),
            (shape[0] - 1, shape[0]),
            (shape[0] // 2, shape[0] // 2 + 1),
            (1, shape[0]),
        ]:
            for actual, expected in zip(part(begin, end), whole, strict=True):
                same_bits(actual, expected[begin:end])
