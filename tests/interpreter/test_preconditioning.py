"""Preconditioning and noisy pairs from the Triton kernels: the reference bit for bit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from bits import assert_same, random
from torch import Tensor

import bicm_kernels
from bicm_kernels import backend, reference

pytest.importorskip("triton")

from bicm_kernels.triton_kernels import OPS

SHAPE = (3, 2, 5, 7)
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
PAIRS = [(F32, F32), (F64, F64), (F16, F16), (BF16, BF16), (F32, BF16), (F32, F16), (F16, F64), (F64, F32)]
DATA = torch.tensor(0.5, dtype=F64)
KEY = {"seed": 17, "step": 3, "sample_id": 5}
TENSOR_KEY = [torch.tensor(value) for value in KEY.values()]

LEVELS: dict[str, tuple[Any, Any]] = {
    "floats": (3.7, 0.21),
    "0-d": (torch.tensor(3.7, dtype=F64), torch.tensor(0.21)),
    "(B,)": (torch.tensor([0.0, 80.0, 0.7]), torch.tensor([0.002, 80.0, 0.1], dtype=F64)),
    "half": (torch.tensor([0.5, 8.0, 0.7], dtype=F16), torch.tensor([0.0, 8.0, 0.1], dtype=BF16)),
}


def op(name: str, level: object) -> Any:
    return OPS[f"{name}.tensor" if isinstance(level, Tensor) else name]


def data(level: object) -> Any:
    return DATA if isinstance(level, Tensor) else 0.5


@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_denoise(dtypes: tuple[torch.dtype, torch.dtype], levels: tuple[Any, Any]) -> None:
    (t, u), x, F = levels, random(SHAPE, dtypes[0]), random(SHAPE, dtypes[1], 1)
    for scaled in (False, True):
        expected = reference.denoise(x, F, t, u, scaled=scaled)
        assert_same(op("denoise", t)(x, F, t, u, data(t), False, scaled), expected)
        expected = reference.denoise(x, F, t, parameterization="cm", sigma_min=u, scaled=scaled)
        assert_same(op("denoise", t)(x, F, t, u, data(t), True, scaled), expected)
    assert_same(op("scale_input", t)(x, t, data(t)), reference.scale_input(x, t))


@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_gradients(dtypes: tuple[torch.dtype, torch.dtype], levels: tuple[Any, Any]) -> None:
    t, u = (torch.as_tensor(level, dtype=None if isinstance(level, Tensor) else F64) for level in levels)
    gradient = random(SHAPE, dtypes[0])
    for cm, scaled, in_F in itertools.product((False, True), repeat=3):
        rest = (gradient, t, u, DATA, cm, scaled, in_F, dtypes[in_F])
        assert_same(OPS["denoise_gradient"](*rest), reference.denoise_gradient(*rest))


@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("dtypes", PAIRS[:5], ids=str)
def test_renoise(dtypes: tuple[torch.dtype, torch.dtype], levels: tuple[Any, Any]) -> None:
    (t, u), x, F = levels, random(SHAPE, dtypes[0]), random(SHAPE, dtypes[1], 1)
    if isinstance(t, Tensor):
        sigma, following, key = torch.tensor([0.7, 0.0, 2.0]), torch.tensor([0.3, 0.1, 0.0]), TENSOR_KEY
    else:
        sigma, following, key = 0.7, 0.3, list(KEY.values())
    actual = op("renoise", t)(x, F, t, u, sigma, following, data(t), False, *key)
    expected = reference.renoise(x, F, t, u, sigma, next_sigma=following, **KEY)
    for result, wanted in zip(actual, expected, strict=True):
        assert_same(result, wanted)


def test_layouts() -> None:
    x = random((3, 4, 5, 6)).to(memory_format=torch.channels_last)
    F = random((3, 4, 5, 13), seed=1)[..., ::2][..., :6]
    t = torch.tensor([0.3, 2.0, 80.0])
    assert_same(OPS["denoise.tensor"](x, F, t, DATA, DATA, False, False), reference.denoise(x, F, t, 0.5))
    key = [torch.tensor(value) for value in (1, 0, 0)]
    actual = OPS["renoise.tensor"](x, F, t, DATA, DATA, DATA, DATA, False, *key)
    for result, wanted in zip(actual, reference.renoise(x, F, t, 0.5, 0.5, seed=1), strict=True):
        assert_same(result, wanted)


@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (3, 1), (3, 1025), (3,)], ids=str)
@pytest.mark.parametrize("dtype", [F32, F64, F16, BF16], ids=str)
def test_noisy_pair(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, x_hat, mask = random(shape, dtype), random(shape, dtype, 1), torch.tensor([True, False, True])
    low, high = torch.tensor([0.0, 0.5, 1.0]), torch.tensor(2.5, dtype=F64)
    mixed = {"x_hat": x_hat, "mask": mask}
    for given in ({}, mixed, mixed | {"sigma_data": DATA}, {"sigma_data": torch.tensor([0.5, 1.0, 2.0])}):
        rest = [given.get(name) for name in ("x_hat", "mask", "sigma_data")]
        actual = OPS["noisy_pair"](x, *rest[:2], low, high, rest[2], *TENSOR_KEY)
        expected = reference.noisy_pair(x, low, high, **KEY, **given)
        for result, wanted in zip(actual, expected, strict=True):
            assert_same(result, wanted)


@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (3, 1025)], ids=str)
@pytest.mark.parametrize("dtypes", [(F32, F32), (F64, F64), (F32, BF16), (F16, F64)], ids=str)
def test_generated_pair(dtypes: tuple[torch.dtype, torch.dtype], shape: tuple[int, ...]) -> None:
    x, F, mask = random(shape, dtypes[0]), random(shape, dtypes[1], 1), torch.tensor([True, False, True])
    low, high, end = torch.tensor([0.0, 0.5, 1.0]), torch.tensor(2.5, dtype=F64), torch.tensor(0.01)
    for chosen, form, data in ((mask, "bcm", DATA), (None, "cm", torch.tensor([0.5, 1.0, 2.0])), (mask, "bcm", None)):
        deviation = torch.tensor(0.5, dtype=F64) if data is None else data
        flags = (form == "cm", data is not None)
        actual = OPS["generated_pair"](x, F, chosen, low, high, end, deviation, *flags, *TENSOR_KEY)
        given = {"F": F, "mask": chosen, "sigma_data": data, "parameterization": form, "sigma_min": end}
        for result, wanted in zip(actual, reference.noisy_pair(x, low, high, **KEY, **given), strict=True):
            assert_same(result, wanted)


@pytest.mark.parametrize("places", [[1, -1, 0], [4, 0, 2], [2]], ids=str)
def test_outputs_in_other_places(places: list[int]) -> None:
    batch = len(places)
    x, F = random((batch, 2, 41)), random((5, 2, 41), BF16, 1)
    level, half = torch.tensor(0.7, dtype=F64), torch.tensor(0.5, dtype=F64)
    for outputs in (F, F.transpose(1, 2).contiguous().transpose(1, 2)):
        rest = (level, 2 * level, 0.01 * half, half, False, True, *TENSOR_KEY)
        actual = OPS["generated_pair"](x, outputs, torch.tensor(places), *rest)
        given = {"F": F, "mask": torch.tensor(places), "sigma_data": 0.5, "sigma_min": 0.005}
        for result, wanted in zip(actual, reference.noisy_pair(x, 0.7, 1.4, **KEY, **given), strict=True):
            assert_same(result, wanted)
    with pytest.raises(RuntimeError, match="bicm_kernels: "):
        OPS["generated_pair"](x, F[:0], torch.tensor(places), *rest)


def test_a_masked_sample_is_not_read() -> None:
    x, x_hat = torch.full((2, 9), float("nan")), torch.full((2, 9), float("nan"))
    x[0], x_hat[1] = 1.0, 2.0
    low, _ = OPS["noisy_pair"](x, x_hat, torch.tensor([False, True]), *[torch.zeros(())] * 2, None, *TENSOR_KEY)
    assert low.tolist() == [[1.0] * 9, [2.0] * 9]


def test_wrong_arguments_raise() -> None:
    x, one = torch.zeros(3, 4), torch.ones(())
    for rest in ((x.double(), torch.zeros(3, dtype=torch.bool)), (None, torch.zeros(3, dtype=torch.bool)), (x, one)):
        with pytest.raises(RuntimeError, match="bicm_kernels: "):
            OPS["noisy_pair"](x, *rest, one, one, None, *TENSOR_KEY)
    with pytest.raises(RuntimeError, match="bicm_kernels: "):
        OPS["denoise"](x, x[:2], 1.0, 0.5, 0.5, False, False)


def test_the_public_functions_run_on_the_kernels() -> None:
    x, F, t = random(SHAPE), random(SHAPE, seed=1), torch.tensor([0.1, 0.2, 3.0])
    expected = reference.denoise(x, F, t)
    F.requires_grad_()
    with backend.use("triton"):
        y = bicm_kernels.denoise(x, F, t)
        (gradient,) = torch.autograd.grad(y, F, torch.ones_like(y))
        scaled = bicm_kernels.scale_input(x, t)
        noisy = bicm_kernels.renoise(x, F.detach(), t, None, 0.7, seed=1)
        pair = bicm_kernels.noisy_pair(x, 0.1, t, seed=3, step=1)
    assert_same(y.detach(), expected)
    levels = (t, torch.tensor(0.002, dtype=F64), DATA)
    assert_same(gradient, reference.denoise_gradient(torch.ones_like(x), *levels, False, False, True, F32))
    assert_same(scaled, reference.scale_input(x, t))
    for results, wanted in (
        (noisy, reference.renoise(x, F.detach(), t, None, 0.7, seed=1)),
        (pair, reference.noisy_pair(x, 0.1, t, seed=3, step=1)),
    ):
        for result, value in zip(results, wanted, strict=True):
            assert_same(result, value)
