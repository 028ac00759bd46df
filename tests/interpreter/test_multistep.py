"""Sampler updates from the Triton kernel: every op and variant equals the reference bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from bits import assert_same, random
from torch import Tensor

import bicm_kernels
from bicm_kernels import backend, reference

pytest.importorskip("triton")

from bicm_kernels.triton_kernels import OPS, operands

# Some tests divide by zero, and so do the rows of a tile that lie behind the batch.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SHAPE = (3, 2, 5, 7)
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
PAIRS = [(F32, F32), (F64, F64), (F16, F16), (BF16, BF16), (F32, BF16), (F32, F16), (F16, F64), (F64, F32)]
BDIA = ("a", "b", "a_last", "b_last", "gamma")
FORMS = {"ddim_step": (1, ("a", "b")), "bdia_step": (2, BDIA), "bdia_inverse_step": (2, BDIA)}
NUMBERS = [0.973, -0.241, 1.113, 0.37, 0.96]
KEY = (17, 3, 5)


def pair_up(tensors: Sequence[Tensor], guided: bool) -> list[Any]:
    """The reference takes predictions as a pair."""
    return [*tensors[:-2], (tensors[-2], tensors[-1])] if guided else list(tensors)


def form(name: str, tensors: Sequence[Tensor], numbers: Sequence[Any], scale: Any = None) -> Tensor:
    """The reference of an op that chooses its weights."""
    named = dict(zip(FORMS[name][1], numbers, strict=False))
    return getattr(reference, name)(*pair_up(tensors, scale is not None), **named, guidance_scale=scale)


def inputs(states: int, dtypes: tuple[torch.dtype, torch.dtype], guided: bool) -> list[Tensor]:
    kinds = [dtypes[0]] * states + [dtypes[1]] * (1 + guided)
    return [random(SHAPE, dtype, seed) for seed, dtype in enumerate(kinds)]


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_forms(name: str, dtypes: tuple[torch.dtype, torch.dtype], guided: bool) -> None:
    states, names = FORMS[name]
    tensors, numbers = inputs(states, dtypes, guided), NUMBERS[: len(names)]
    actual = OPS[name](tensors, numbers, 2.5)
    assert_same(actual, form(name, tensors, numbers, 2.5 if guided else None))


@pytest.mark.parametrize("draws", [False, True], ids=["quiet", "noisy"])
@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtypes", PAIRS[:5], ids=str)
def test_affine(dtypes: tuple[torch.dtype, torch.dtype], terms: int, draws: bool) -> None:
    tensors, weights = inputs(terms - 1, dtypes, False), NUMBERS[:terms]
    tensors[0] = tensors[0].to(dtypes[0])
    actual = OPS["affine_step"](tensors, weights, 0.0, 0.7 * draws, *KEY)
    key = dict(zip(("seed", "step", "sample_id"), KEY, strict=True))
    assert_same(actual, reference.affine_step(tensors, weights, noise_weight=0.7 * draws, **key))


DENOISED = list(itertools.product([False, True], repeat=4))


@pytest.mark.parametrize(("clips", "scales", "draws", "guided"), DENOISED)
@pytest.mark.parametrize("dtypes", [(F32, F32), (F64, F64), (F16, F16), (F32, BF16)], ids=str)
def test_denoised(
    dtypes: tuple[torch.dtype, torch.dtype], clips: bool, scales: bool, draws: bool, guided: bool
) -> None:
    tensors = inputs(1, dtypes, guided)
    clip, next_scale = 0.8 if clips else None, 1.7 if scales else None
    scale, weight = 2.5 if guided else None, 0.3 if draws else 0.0
    actual = OPS["denoised_step"](tensors, [0.9, -0.4], [0.2, 0.1], scale or 0.0, 0.6, clip, weight, next_scale, *KEY)
    expected = reference.denoised_step(
        pair_up(tensors, guided), [0.9, -0.4], [0.2, 0.1], x0_weight=0.6, clip=clip, noise_weight=weight,
        next_scale=next_scale, guidance_scale=scale, seed=KEY[0], step=KEY[1], sample_id=KEY[2],
    )  # fmt: skip
    assert_same(actual[0], expected[0])
    assert_same(actual[1], expected[1])
    if expected[2] is None:
        assert actual[2].shape == (0,)
    else:
        assert_same(actual[2], expected[2])


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_float64_becomes_half_by_way_of_float32(dtype: torch.dtype) -> None:
    z = torch.zeros(1, 2, dtype=dtype)
    half_a_step = torch.finfo(dtype).eps / 2
    eps = torch.tensor([[1 + half_a_step + 2.0**-40, 1 + 3 * half_a_step - 2.0**-40]], dtype=F64)
    assert torch.equal(OPS["ddim_step"]([z, eps], [1.0, 1.0], 0.0)[:, 0], torch.ones(1, dtype=dtype))
    assert_same(OPS["ddim_step"]([z, eps], [1.0, 1.0], 0.0), reference.ddim_step(z, eps, a=1.0, b=1.0))


SHAPES = [(1, 1), (3,), (5, 2), (300, 3), (1, 3, 17, 19), (2, 1025), (2, 2048), (2, 1, 3, 1, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_odd_sizes(shape: tuple[int, ...]) -> None:
    x, eps = random(shape), random(shape, seed=1)
    assert_same(OPS["ddim_step"]([x, eps], [0.9, 0.1], 0.0), reference.ddim_step(x, eps, a=0.9, b=0.1))
    expected = reference.affine_step([x, eps], [0.9, 0.1], noise_weight=0.7, seed=1)
    assert_same(OPS["affine_step"]([x, eps], [0.9, 0.1], 0.0, 0.7, 1, 0, 0), expected)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0), (0,)], ids=str)
def test_empty_batches(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape)
    assert OPS["affine_step"]([x, x], [0.9, 0.1], 0.0, 0.7, 1, 0, 0).shape == shape
    per_sample = torch.empty(shape[0])
    assert OPS["ddim_step.tensor"]([x, x], [per_sample, per_sample], None).shape == shape


LAYOUTS: dict[str, Callable[[int], Tensor]] = {
    "dense": lambda seed: random((3, 4, 5, 6), seed=seed),
    "channels last": lambda seed: random((3, 4, 5, 6), seed=seed).to(memory_format=torch.channels_last),
    "reversed": lambda seed: random((6, 5, 4, 3), seed=seed).permute(3, 2, 1, 0),
    "sliced channels": lambda seed: random((3, 8, 5, 6), seed=seed)[:, 2:6],
    "sliced rows": lambda seed: random((3, 4, 5, 13), seed=seed)[..., ::2][..., :6],
    "sliced batch": lambda seed: random((6, 4, 5, 6), seed=seed)[::2],
    "expanded": lambda seed: random((1, 4, 1, 6), seed=seed).expand(3, 4, 5, 6),
    "one sample for all": lambda seed: random((1, 4, 5, 6), seed=seed).expand(3, 4, 5, 6),
}
MIXED = [
    *((name, name) for name in LAYOUTS),
    *(("dense", name) for name in LAYOUTS),
    ("channels last", "dense"),
]


@pytest.mark.parametrize("wide", [False, True], ids=["", "64-bit indices"])
@pytest.mark.parametrize(("first", "second"), MIXED)
def test_layouts(first: str, second: str, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if wide:
        monkeypatch.setattr(operands, "WIDE", 1)
    z, eps = LAYOUTS[first](0), LAYOUTS[second](1)
    expected = reference.ddim_step(z, eps, a=0.9, b=0.1)
    assert_same(OPS["ddim_step"]([z, eps], [0.9, 0.1], 0.0), expected)
    a = torch.tensor([0.9, 0.8, 0.7])
    expected = reference.ddim_step(z, eps, a=a, b=0.1)
    assert_same(OPS["ddim_step.tensor"]([z, eps], [a, torch.tensor(0.1, dtype=F64)], None), expected)
    expected = reference.affine_step([z, eps], [0.9, 0.1], noise_weight=0.7, seed=1)
    assert_same(OPS["affine_step"]([z, eps], [0.9, 0.1], 0.0, 0.7, 1, 0, 0), expected)


def test_dimensions_merge() -> None:
    z = random((3, 4, 5, 6)).to(memory_format=torch.channels_last)
    merged = operands.lay_out([z, z], per_sample=False, in_order=False).plan
    assert (merged.batch, merged.elements, merged.sizes) == (1, 360, ())
    merged = operands.lay_out([z, z], per_sample=True, in_order=False).plan
    assert (merged.batch, merged.elements, merged.sizes) == (3, 120, ())
    in_order = operands.lay_out([z, z], per_sample=True, in_order=True).plan
    assert (in_order.sizes, in_order.strides[0][1]) == ((4, 30), (1, 4))
    sliced = operands.lay_out([z.contiguous()[:, :2], z[:, :2]], per_sample=False, in_order=False).plan
    assert sliced.sizes == (3, 2, 30)


PER_SAMPLE: dict[str, Callable[[Sequence[float]], Tensor]] = {
    "0-d": lambda x: torch.tensor(x[0], dtype=F64),
    "(B,)": lambda x: torch.tensor(x, dtype=F32),
    "(B,) float64": lambda x: torch.tensor(x, dtype=F64),
    "(B,) float16": lambda x: torch.tensor(x, dtype=F16),
    "(B,) bfloat16": lambda x: torch.tensor(x, dtype=BF16),
    "every other": lambda x: torch.tensor(x, dtype=F32).repeat_interleave(2)[::2],
    "expanded": lambda x: torch.tensor(x[0], dtype=F32).expand(3),
}


@pytest.mark.parametrize("compute", [F32, F64], ids=str)
@pytest.mark.parametrize("name", ["bdia_step", "bdia_inverse_step"])
@pytest.mark.parametrize("kind", PER_SAMPLE)
def test_kinds_of_coefficients(kind: str, name: str, compute: torch.dtype) -> None:
    tensors = inputs(2, (compute, compute), True)
    make = PER_SAMPLE[kind]
    numbers = [make([value, value + 0.1, value - 0.05]) for value in NUMBERS]
    scale = make([2.0, 3.0, 1.5])
    assert_same(OPS[f"{name}.tensor"](tensors, numbers, scale), form(name, tensors, numbers, scale))


@pytest.mark.parametrize("compute", [F32, F64], ids=str)
def test_denoised_with_an_argument_per_sample(compute: torch.dtype) -> None:
    tensors = inputs(1, (compute, F32), False)
    p, w, x0_weight, clip, noise_weight, next_scale = (
        torch.tensor([0.5, 0.9, 1.1], dtype=compute) * k for k in range(1, 7)
    )
    key = (torch.tensor([4, 5, 6]), torch.tensor([1, 2, 1]), torch.tensor(0))
    actual = OPS["denoised_step.tensor"](tensors, [p, w], [w, p], None, x0_weight, clip, noise_weight, next_scale, *key)
    expected = reference.denoised_step(
        tensors, [p, w], [w, p], x0_weight=x0_weight, clip=clip, noise_weight=noise_weight,
        next_scale=next_scale, seed=key[0], step=key[1], sample_id=key[2],
    )  # fmt: skip
    for result, wanted in zip(actual, expected, strict=True):
        assert_same(result, wanted)


def test_floats_and_tensors_agree() -> None:
    tensors = inputs(2, (F32, F32), False)
    numbers = [torch.tensor(value, dtype=F64) for value in NUMBERS]
    per_sample = [number.expand(3) for number in numbers]
    expected = OPS["bdia_step"](tensors, NUMBERS, 0.0)
    assert_same(OPS["bdia_step.tensor"](tensors, numbers, None), expected)
    assert_same(OPS["bdia_step.tensor"](tensors, per_sample, None), expected)


@pytest.mark.parametrize("weight", [[0.0, 0.7, 0.0], [-0.0, 0.0, 0.0], [float("nan"), 1.0, 0.0]], ids=str)
def test_noise_of_weight_zero_is_not_added(weight: list[float]) -> None:
    x = torch.full((3, 5), -0.0)
    w = torch.tensor(weight)
    key = [torch.tensor(value) for value in KEY]
    actual = OPS["affine_step.tensor"]([x], [torch.tensor(1.0)], None, w, *key)
    expected = reference.affine_step([x], [1.0], noise_weight=w, seed=KEY[0], step=KEY[1], sample_id=KEY[2])
    assert_same(actual, expected)
    quiet = w == 0
    assert torch.signbit(actual[quiet]).all()
    assert (actual[quiet] == 0).all()


def test_not_a_number_and_infinities() -> None:
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 3.0, -3.0, 0.0]])
    for clip in (1.0, float("inf"), 0.0):
        expected = reference.denoised_step([x], [1.0], [0.5], x0_weight=0.5, clip=clip)
        actual = OPS["denoised_step"]([x], [1.0], [0.5], 0.0, 0.5, clip, 0.0, None, None, 0, 0)
        assert_same(actual[0], expected[0])
        assert_same(actual[1], expected[1])
    zeros = [0.9, 0.1, 0.0, 0.0, 0.0]
    for name in ("bdia_step", "bdia_inverse_step"):
        assert_same(OPS[name]([x] * 3, zeros, 0.0), form(name, [x] * 3, zeros))
    zeros = [0.9, 0.0, 1.0, 0.0, 1.0]
    assert_same(OPS["bdia_inverse_step"]([x] * 3, zeros, 0.0), form("bdia_inverse_step", [x] * 3, zeros))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_out_may_be_an_input(which: int) -> None:
    tensors = inputs(2, (F32, F32), False)
    expected = form("bdia_step", tensors, NUMBERS)
    assert OPS["bdia_step.out"](tensors, NUMBERS, 0.0, out=tensors[which]) is None
    assert_same(tensors[which], expected)


def test_out_of_another_layout() -> None:
    tensors = inputs(1, (F32, F32), False)
    out = torch.empty(SHAPE).to(memory_format=torch.channels_last)
    OPS["affine_step.out"](tensors, [0.9, 0.1], 0.0, 0.7, *KEY, out=out)
    assert torch.equal(out, OPS["affine_step"](tensors, [0.9, 0.1], 0.0, 0.7, *KEY))


def test_denoised_outputs_may_replace_inputs() -> None:
    tensors = inputs(2, (F32, F32), False)
    rest = ([0.9, 0.1, 0.2], [0.3, 0.4, 0.5], 0.0, 0.6, 0.8, 0.7, 1.7, *KEY)
    expected = OPS["denoised_step"](tensors, *rest)
    outs = dict(zip(("out", "x0", "next"), tensors, strict=True))
    OPS["denoised_step.out"](tensors, *rest, **outs)
    for actual, wanted in zip(tensors, expected, strict=True):
        assert_same(actual, wanted)


def test_out_beside_an_input() -> None:
    both = random((3, 4, 5, 7))
    z, out = both[:, :2], both[:, 2:]
    expected = reference.ddim_step(z, z, a=0.9, b=0.1)
    OPS["ddim_step.out"]([z, z], [0.9, 0.1], 0.0, out=out)
    assert torch.equal(out, expected)


def overlapping() -> dict[str, tuple[Tensor, Tensor]]:
    memory = random((100,))
    return {
        "shifted": (memory[:30].view(3, 10), memory[1:31].view(3, 10)),
        "another order": (memory[:100].view(10, 10), memory[:100].view(10, 10).t()),
        "itself": (memory[:30].view(3, 10), memory[50:60].expand(3, 10)),
        "another dtype": (memory[:30].view(3, 10), memory.view(F64)[:30].view(3, 10)),
    }


@pytest.mark.parametrize("name", overlapping())
def test_partial_overlap_raises(name: str) -> None:
    z, out = overlapping()[name]
    with pytest.raises(RuntimeError, match="out "):
        OPS["ddim_step.out"]([z, z], [0.9, 0.1], 0.0, out=out)


X = torch.zeros(3, 4)
ONE = torch.ones(())
WRONG: dict[str, Callable[[], object]] = {
    "shape": lambda: OPS["ddim_step"]([X, torch.zeros(3, 5)], [0.9, 0.1], 0.0),
    "dtype": lambda: OPS["ddim_step"]([X, X.long()], [0.9, 0.1], 0.0),
    "0-d": lambda: OPS["ddim_step"]([X[0, 0], X[0, 0]], [0.9, 0.1], 0.0),
    "terms": lambda: OPS["affine_step"]([X], [0.9, 0.1], 0.0, 0.0, None, 0, 0),
    "six terms": lambda: OPS["affine_step"]([X] * 6, [0.9] * 6, 0.0, 0.0, None, 0, 0),
    "coefficients": lambda: OPS["bdia_step"]([X] * 3, [0.9, 0.1], 0.0),
    "coefficient's shape": lambda: OPS["ddim_step.tensor"]([X, X], [torch.zeros(2), torch.zeros(3)], None),
    "coefficient's dtype": lambda: OPS["ddim_step.tensor"]([X, X], [ONE.int()] * 2, None),
    "guidance": lambda: OPS["ddim_step.tensor"]([X, X, X], [ONE] * 2, None),
    "key": lambda: OPS["affine_step.tensor"]([X], [ONE], None, ONE, ONE.long(), None, None),
    "x0 weights": lambda: OPS["denoised_step"]([X], [1.0, 2.0], [1.0], 0.0, 1.0, None, 0.0, None, None, 0, 0),
    "out's shape": lambda: OPS["ddim_step.out"]([X, X], [0.9, 0.1], 0.0, out=torch.zeros(3, 5)),
    "out's dtype": lambda: OPS["ddim_step.out"]([X, X], [0.9, 0.1], 0.0, out=X.double()),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_wrong_arguments_raise(wrong: Callable[[], object]) -> None:
    with pytest.raises(RuntimeError, match="bicm_kernels: "):
        wrong()


def test_the_public_functions_run_on_the_kernels() -> None:
    x, eps = random(SHAPE), random(SHAPE, seed=1)
    arguments: dict[str, Any] = {"guidance_scale": 2.0, "noise_weight": 0.3, "seed": 1}
    expected = reference.affine_step([x, (eps, x)], [0.9, 0.1], **arguments)
    with backend.use("triton"):
        assert backend.running("cpu") == "triton"
        actual = bicm_kernels.affine_step([x, (eps, x)], [0.9, 0.1], guidance_scale=2.0, noise_weight=0.3, seed=1)
        noisy = bicm_kernels.add_noise(x, torch.tensor([0.1, 0.2, 0.3]), seed=2)
        numbers = bicm_kernels.normal((2, 3), seed=torch.tensor([1, 2]))
        with pytest.raises(ValueError, match="eps must have the shape of z"):
            bicm_kernels.ddim_step(x, eps[:2], a=0.9, b=0.1)
    assert_same(actual, expected)
    assert_same(noisy, reference.add_noise(x, torch.tensor([0.1, 0.2, 0.3]), seed=2))
    assert torch.equal(numbers, reference.normal((2, 3), seed=torch.tensor([1, 2])))
