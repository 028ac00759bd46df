"""The step ops against float64: no less accurate than eager code, and BDIA comes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import bicm_kernels as bk
from tests.support.multistep_calls import BDIA, NOISE, OPS, call, operands
from tests.support.tensors import BF16, F16, F32, F64, random


def exact(name: str, x: list[Tensor], v: dict[str, Any]) -> Tensor:
    """The papers' formulas, in the precision of the tensors."""
    if name == "ddim_step":
        return v["a"] * x[0] + v["b"] * x[1]
    if name == "affine_step":
        return sum(w * y for w, y in zip(v["weights"], x, strict=True))
    if name == "denoised_step":
        x0 = sum(w * y for w, y in zip(v["x0_weights"], x, strict=True)).clamp(-v["clip"], v["clip"])
        return sum(w * y for w, y in zip(v["weights"], x, strict=True)) + v["x0_weight"] * x0
    a, b, a_last, b_last, gamma = (v[key] for key in BDIA)
    back, forward = x[1] / a_last - b_last / a_last * x[2], a * x[1] + b * x[2]
    if name == "bdia_step":
        return gamma * x[0] - gamma * back + forward
    return x[0] / gamma - forward / gamma + back


def deviation(x: Tensor, exactly: Tensor) -> tuple[float, float]:
    error = (x.double() - exactly).abs()
    return error.max().item(), error.square().mean().sqrt().item()


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("gamma", [1.0, 0.96, 0.5])
def test_no_less_accurate_than_eager(name: str, dtype: torch.dtype, gamma: float) -> None:
    numbers = {key: value for key, value in OPS[name][1].items() if key not in NOISE}
    if "gamma" in numbers:
        numbers["gamma"] = gamma
    tensors = operands(name, (64, 3072), dtype, dtype)
    truth = exact(name, [x.double() for x in tensors], numbers)
    ours, eager = call(name, tensors, numbers)[0], exact(name, tensors, numbers)
    assert eager.dtype == dtype
    for mine, theirs in zip(deviation(ours, truth), deviation(eager, truth), strict=True):
        assert mine <= 2 * theirs
    assert deviation(ours, truth)[0] <= 8 * torch.finfo(dtype).eps * truth.abs().max().item()


@pytest.mark.parametrize("scale", [7.5, 15.0])
def test_guidance_is_formed_before_it_is_weighted(scale: float) -> None:
    uncond = random(64, 3072)
    cond = uncond + 0.05 * random(64, 3072, seed=1)
    truth = uncond.double() + scale * (cond.double() - uncond.double())
    ours = bk.affine_step([(uncond, cond)], [1.0], guidance_scale=scale)
    folded = bk.affine_step([uncond, cond], [1 - scale, scale])
    assert deviation(ours, truth)[1] < deviation(folded, truth)[1] / 5


@given(
    gamma=st.floats(0.5, 1.0),
    numbers=st.tuples(*[st.floats(low, 1.25) for low in (0.8, -0.5, 0.8, -0.5)]),
    scale=st.none() | st.floats(-2, 10),
    seed=st.integers(0, 2**32),
)
def test_bdia_returns(gamma: float, numbers: tuple[float, ...], scale: float | None, seed: int) -> None:
    v: dict[str, Any] = dict(zip(BDIA, (*numbers, gamma), strict=True)) | {"guidance_scale": scale}
    z_last, z, uncond, cond = (bk.normal((2, 33), seed=seed, step=k, dtype=F64) for k in range(4))
    eps = uncond if scale is None else (uncond, cond)
    z_next = bk.bdia_step(z_last, z, eps, **v)
    torch.testing.assert_close(bk.bdia_inverse_step(z_next, z, eps, **v), z_last, rtol=0, atol=2e-13)
