"""O-BELM against its equation, and where its inversion returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bicm_diffusion import (
    ExactPair,
    InexactInversionWarning,
    Schedule,
    karras_schedule,
    obelm_invert,
    obelm_sample,
    vp_schedule,
)
from tests.support.closed_forms import Mixture, network, noise

MODEL = Mixture(0.5, 0.8)
SCHEDULE = vp_schedule(20, final_time=0.01)


def eps(z: Tensor, i: int) -> Tensor:
    return MODEL(z, torch.full(z.shape[:1], SCHEDULE.times[i], dtype=torch.float64))


def coefficients(i: int) -> tuple[float, float, float]:
    """Weights of z_{i+1}, z_i and eps in z_{i-1}, as the paper has them."""
    alpha, sigma = SCHEDULE.alpha, SCHEDULE.sigma
    h = sigma[i] / alpha[i] - sigma[i - 1] / alpha[i - 1]
    h_next = sigma[i + 1] / alpha[i + 1] - sigma[i] / alpha[i]
    return (
        (h / h_next) ** 2 * alpha[i - 1] / alpha[i + 1],
        (h_next**2 - h**2) / h_next**2 * alpha[i - 1] / alpha[i],
        -h * (h + h_next) / h_next * alpha[i - 1],
    )


def plain_sample(z: Tensor) -> tuple[Tensor, Tensor]:
    a, b, top = SCHEDULE.a, SCHEDULE.b, SCHEDULE.steps
    last, current = z, a[top] * z + b[top] * eps(z, top)
    for i in range(top - 1, 0, -1):
        x, y, e = coefficients(i)
        last, current = current, x * last + y * current + e * eps(current, i)
    return current, last


def plain_invert(z: Tensor) -> tuple[Tensor, Tensor]:
    last, current = z, (z - SCHEDULE.b[1] * eps(z, 1)) / SCHEDULE.a[1]
    for i in range(1, SCHEDULE.steps):
        x, y, e = coefficients(i)
        last, current = current, (last - y * current - e * eps(current, i)) / x
    return current, last


@pytest.mark.parametrize(("ours", "plain"), [(obelm_sample, plain_sample), (obelm_invert, plain_invert)])
def test_is_the_equation(ours: Any, plain: Any) -> None:
    z = noise(5, 4)
    expected = plain(z)
    largest = expected[0].abs().max().item()
    for got, wanted in zip(ours(MODEL, z, SCHEDULE, exact=False), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11 * largest)
    exact = ours(MODEL, z, SCHEDULE)
    # Fractions with denominators up to 1024 stand for the ratios.
    for got, wanted in zip((exact.z, exact.previous), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-3 * largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("schedule", [vp_schedule(50), karras_schedule(50, rho=2.0)], ids=["VP", "EDM"])
def test_every_bit_returns(schedule: Schedule, dtype: torch.dtype) -> None:
    model, z = network(24, dtype), schedule.sigma[-1] * noise(8, 24, dtype=torch.float32)
    pair = obelm_sample(model, z, schedule)
    back = obelm_invert(model, pair, schedule)
    assert isinstance(pair, ExactPair) and isinstance(back, ExactPair)
    torch.testing.assert_close(back.z, z, rtol=2e-7, atol=1e-9)
    assert pair.info.any() and not back.info.any()
    again = obelm_sample(model, back, schedule)
    assert isinstance(again, ExactPair)
    assert torch.equal(again.q, pair.q) and torch.equal(again.previous_q, pair.previous_q)


def test_floats_lose_everything_on_edms_grid_and_say_so() -> None:
    schedule, z = karras_schedule(50), 80.0 * noise(4, 3, dtype=torch.float32)
    model = network(3)
    pair = obelm_sample(model, z, schedule, exact=False)
    with pytest.warns(InexactInversionWarning, match="O-BELM in torch.float32") as caught:
        back = obelm_invert(model, pair, schedule, exact=False)
    assert caught[0].filename == __file__
    assert not (back.z - z).abs().max() < 1.0


def test_intervals_too_different_for_a_fraction_are_named() -> None:
    uneven = Schedule((0.0, 1.0, 2.0, 3.0), (1.0,) * 4, (0.0, 0.01, 1.0, 2.0))
    with pytest.raises(ValueError, match=r"schedule: .* got 0.01 and 0.99 at index 1; pass exact=False"):
        obelm_sample(MODEL, noise(2, 3), uneven)
    assert obelm_sample(MODEL, noise(2, 3), uneven, exact=False).z.isfinite().all()
