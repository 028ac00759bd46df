"""EDICT against its equations, and what its round trip loses in floating point."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from closed_forms import Mixture, network, noise
from torch import Tensor

from bicm_diffusion import (
    ExactTwins,
    InexactInversionWarning,
    Preconditioned,
    TwinPair,
    edict_invert,
    edict_sample,
    vp_schedule,
)

MODEL = Mixture(0.5, 0.8)
SCHEDULE = vp_schedule(20, final_time=0.01)
silent = pytest.mark.filterwarnings("ignore::bicm_diffusion.InexactInversionWarning")


def eps(z: Tensor, i: int) -> Tensor:
    return MODEL(z, torch.full(z.shape[:1], SCHEDULE.times[i], dtype=torch.float64))


def plain_sample(z: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """BDIA eq. 9 to 12."""
    y = z
    for i in range(SCHEDULE.steps, 0, -1):
        a, b = SCHEDULE.a[i], SCHEDULE.b[i]
        z_inter = a * z + b * eps(y, i)
        y_inter = a * y + b * eps(z_inter, i)
        z = p * z_inter + (1 - p) * y_inter
        y = p * y_inter + (1 - p) * z
    return z, y


def plain_invert(z: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """BDIA eq. 13 to 16."""
    y = z
    for i in range(1, SCHEDULE.steps + 1):
        a, b = SCHEDULE.a[i], SCHEDULE.b[i]
        y_inter = (y - (1 - p) * z) / p
        z_inter = (z - (1 - p) * y_inter) / p
        y = (y_inter - b * eps(z_inter, i)) / a
        z = (z_inter - b * eps(y, i)) / a
    return z, y


@silent
@pytest.mark.parametrize("p", [1.0, 0.93, 0.5])
@pytest.mark.parametrize(("ours", "plain"), [(edict_sample, plain_sample), (edict_invert, plain_invert)])
def test_is_the_equations(ours: Any, plain: Any, p: float) -> None:
    z = noise(5, 4)
    expected = plain(z, p)
    largest = expected[0].abs().max().item()
    for got, wanted in zip(ours(MODEL, z, SCHEDULE, p=p, exact=False), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=(1e-12 if p > 0.5 else 1e-5) * largest)
    if p > 0.5:
        exact = ours(MODEL, z, SCHEDULE, p=p)
        for got, wanted in zip((exact.z, exact.y), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6 * largest)


@pytest.mark.parametrize("prediction", ["noise", Preconditioned()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_bit_returns(dtype: torch.dtype, prediction: Any) -> None:
    model, z, schedule = network(24, dtype), noise(8, 24, dtype=torch.float32), vp_schedule(50)
    for there, back in ((edict_sample, edict_invert), (edict_invert, edict_sample)):
        pair = there(model, z, schedule, prediction=prediction)
        assert isinstance(pair, ExactTwins)
        again = back(model, pair, schedule, prediction=prediction)
        assert isinstance(again, ExactTwins)
        assert torch.equal(again.q, again.previous_q) and not again.info.any()
        torch.testing.assert_close(again.z, z, rtol=2e-7, atol=1e-9)
        assert torch.equal(again.z, again.y)
        retraced = there(model, again, schedule, prediction=prediction)
        assert torch.equal(retraced.q, pair.q) and torch.equal(retraced.previous_q, pair.previous_q)


@silent
def test_floats_return_within_rounding_and_no_nearer() -> None:
    z, schedule = noise(8, 4, dtype=torch.float32), vp_schedule(50)
    pair = edict_sample(MODEL, z, schedule, exact=False)
    assert isinstance(pair, TwinPair)
    error = (edict_invert(MODEL, pair, schedule, exact=False).z - z).abs().max().item()
    assert 0 < error < 0.05


def test_two_evaluations_a_step_each_at_the_index_of_the_step() -> None:
    asked: list[float] = []

    def model(z: Tensor, times: Tensor) -> Tensor:
        asked.append(times[0].item())
        return MODEL(z, times)

    for exact in (True, False):
        asked.clear()
        edict_sample(model, noise(1, 2), vp_schedule(2), exact=exact)
        assert asked == [1.0, 1.0, 0.5, 0.5]
        asked.clear()
        edict_invert(model, noise(1, 2), vp_schedule(2), exact=exact)
        assert asked == [0.5, 0.5, 1.0, 1.0]


def test_p_may_differ_between_samples() -> None:
    z, p = noise(3, 4), torch.tensor([1.0, 0.93, 0.8], dtype=torch.float64)
    for exact in (True, False):
        together = edict_sample(MODEL, z, SCHEDULE, p=p, exact=exact).z
        alone = [edict_sample(MODEL, z[k : k + 1], SCHEDULE, p=x, exact=exact).z for k, x in enumerate(p.tolist())]
        torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=0)


def test_wrong_calls_are_named() -> None:
    for p in (0.0, 1.1):
        with pytest.raises(ValueError, match=r"p: expected a value in \(0, 1\], got"):
            edict_sample(MODEL, noise(2, 3), SCHEDULE, p=p)
    with pytest.warns(InexactInversionWarning, match="EDICT in torch.bfloat16") as caught:
        edict_invert(MODEL, noise(2, 3, dtype=torch.bfloat16), SCHEDULE, exact=False)
    assert caught[0].filename == __file__
