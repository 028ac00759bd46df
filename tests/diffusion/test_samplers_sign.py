"""SIGN's samplers against their algorithms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bicm_diffusion import sign_masked, sign_recursive
from bicm_diffusion.keys import SIGN
from bicm_kernels import fold_in, normal
from tests.support.closed_forms import noise


def model(x: Tensor) -> Tensor:
    return torch.tanh(1.5 * x)


def test_recursive_applies_the_network_again_and_again() -> None:
    x = noise(3, 4)
    assert torch.equal(sign_recursive(model, x), model(x))
    assert torch.equal(sign_recursive(model, x, steps=3), model(model(model(x))))


@pytest.mark.parametrize("masked", [True, False])
def test_masked_is_the_algorithm(masked: bool) -> None:
    x, sigmas = noise(3, 4), [0.9, 0.4, 0.1]
    mask = (noise(3, 4, seed=1) > 0) if masked else None
    m = torch.ones_like(x) if mask is None else mask.to(x.dtype)
    expected = model(x) * m + x * (1 - m)
    for i, sigma in enumerate(sigmas, start=1):
        n = normal(x.shape, seed=fold_in(7, SIGN), step=i).to(x.dtype)
        expected = model(expected + sigma * n) * m + expected * (1 - m)
    got = sign_masked(model, x, sigmas, mask=mask, seed=7)
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)
    if mask is not None:
        assert torch.equal(got[~mask], x[~mask])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_sample_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    x, mask = noise(5, 2, 3, dtype=dtype), torch.tensor([True, False, True])
    together = sign_masked(model, x, [0.5, 0.2], mask=mask, seed=1)
    alone = sign_masked(model, x[3:4], [0.5, 0.2], mask=mask, seed=1, sample_id=3)
    assert together.dtype == dtype and torch.equal(together[3:4], alone)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: sign_recursive(model, x, steps=0), ValueError, "steps: expected an integer of at least 1, got 0"),
        (lambda x: sign_masked(model, x, [0.1, 0.2], seed=0), ValueError, "sigmas: expected falling noise levels"),
        (lambda x: sign_masked(model, x, [-0.1], seed=0), ValueError, "sigmas: expected falling noise levels"),
        (lambda x: sign_masked(model, x, [0.1], mask=x, seed=0), TypeError, "mask: expected a bool tensor"),
    ],
)
def test_wrong_calls_are_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(noise(2, 3))
