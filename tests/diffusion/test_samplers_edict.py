"""EDICT against its equations, and what its round trip loses in floating point."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bicm_diffusion import (
    ExactTwins,
    InexactInversionWarning,
    Preconditioned,
    TwinPair,
    edict_invert,
    edict_sample,
    vp_alpha_sigma,
    vp_schedule,
)
from tests.support.closed_forms import Mixture, network, noise

MODEL = Mixture(0.5, 0.8)
SCHEDULE = vp_schedule(20, final_time=0.01)
silent = pytest.mark.filterwarnings("ignore::bicm_diffusion.InexactInversionWarning")


def eps(z: Tensor, i: int) -> Tensor:
    return MODEL(z, torch.full(z.shape[:1], SCHEDULE.times[i], dtype=torch.float64))


def plain_sample(z: Tensor, p: float, leapfrog: bool = False) -> tuple[Tensor, Tensor]:
    """BDIA eq. 9 to 12; with leapfrog as the authors' code does it: y goes first in every other step."""
    y = z
    for step, i in enumerate(range(SCHEDULE.steps, 0, -1)):
        a, b = SCHEDULE.a[i], SCHEDULE.b[i]
        if leapfrog and step % 2:
            y_inter = a * y + b * eps(z, i)
            z_inter = a * z + b * eps(y_inter, i)
        else:
            z_inter = a * z + b * eps(y, i)
            y_inter = a * y + b * eps(z_inter, i)
        z = p * z_inter + (1 - p) * y_inter
        y = p * y_inter + (1 - p) * z
    return z, y


def plain_invert(z: Tensor, p: float, leapfrog: bool = False) -> tuple[Tensor, Tensor]:
    """BDIA eq. 13 to 16, and the same for leapfrog."""
    y = z
    for i in range(1, SCHEDULE.steps + 1):
        a, b = SCHEDULE.a[i], SCHEDULE.b[i]
        y_inter = (y - (1 - p) * z) / p
        z_inter = (z - (1 - p) * y_inter) / p
        if leapfrog and (SCHEDULE.steps - i) % 2:
            z = (z_inter - b * eps(y_inter, i)) / a
            y = (y_inter - b * eps(z, i)) / a
        else:
            y = (y_inter - b * eps(z_inter, i)) / a
            z = (z_inter - b * eps(y, i)) / a
    return z, y


@silent
@pytest.mark.parametrize("p", [1.0, 0.93, 0.5])
@pytest.mark.parametrize("leapfrog", [False, True])
@pytest.mark.parametrize(("ours", "plain"), [(edict_sample, plain_sample), (edict_invert, plain_invert)])
def test_is_the_equations(ours: Any, plain: Any, p: float, leapfrog: bool) -> None:
    z = noise(5, 4)
    expected = plain(z, p, leapfrog)
    largest = expected[0].abs().max().item()
    for got, wanted in zip(ours(MODEL, z, SCHEDULE, p=p, leapfrog=leapfrog, exact=False), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=(1e-12 if p > 0.5 else 1e-5) * largest)
    if p > 0.5:
        exact = ours(MODEL, z, SCHEDULE, p=p, leapfrog=leapfrog)
        for got, wanted in zip((exact.z, exact.y), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6 * largest)


@pytest.mark.parametrize("prediction", ["noise", Preconditioned()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("leapfrog", "steps"), [(False, 50), (True, 50), (True, 33)])
def test_every_bit_returns(dtype: torch.dtype, prediction: Any, leapfrog: bool, steps: int) -> None:
    model, z, schedule = network(24, dtype), noise(8, 24, dtype=torch.float32), vp_schedule(steps)
    options: dict[str, Any] = {"prediction": prediction, "leapfrog": leapfrog}
    for there, back in ((edict_sample, edict_invert), (edict_invert, edict_sample)):
        pair = there(model, z, schedule, **options)
        assert isinstance(pair, ExactTwins)
        again = back(model, pair, schedule, **options)
        assert isinstance(again, ExactTwins)
        assert torch.equal(again.q, again.previous_q) and not again.info.any()
        torch.testing.assert_close(again.z, z, rtol=2e-7, atol=1e-9)
        assert torch.equal(again.z, again.y)
        retraced = there(model, again, schedule, **options)
        assert torch.equal(retraced.q, pair.q) and torch.equal(retraced.previous_q, pair.previous_q)


@silent
@pytest.mark.parametrize("prediction", ["noise", "v", "x0", Preconditioned()], ids=["noise", "v", "x0", "raw"])
@pytest.mark.parametrize("leapfrog", [False, True])
def test_floats_return_within_rounding_and_no_nearer(leapfrog: bool, prediction: Any) -> None:
    z, schedule, model = noise(8, 4, dtype=torch.float32), vp_schedule(50), network(4)
    options: dict[str, Any] = {"exact": False, "leapfrog": leapfrog, "prediction": prediction}
    pair = edict_sample(model, z, schedule, **options)
    assert isinstance(pair, TwinPair)
    error = (edict_invert(model, pair, schedule, **options).z - z).abs().max().item()
    assert 0 < error < 0.05


@silent
@pytest.mark.parametrize("exact", [True, False])
def test_what_a_model_predicts_makes_no_difference_to_leapfrog(exact: bool) -> None:
    z, options = noise(4, 6), {"leapfrog": True, "exact": exact}
    for sampler in (edict_sample, edict_invert):
        plain = sampler(MODEL, z, SCHEDULE, **options)
        for kind in ("v", "x0"):
            other = sampler(partial(MODEL.output, kind), z, SCHEDULE, prediction=kind, **options)
            for got, expected in zip(other, plain, strict=True):
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_leapfrog_changes_who_goes_first() -> None:
    z = noise(2, 3)
    one, other = (edict_sample(MODEL, z, SCHEDULE, leapfrog=leapfrog, exact=False).z for leapfrog in (False, True))
    assert (one - other).abs().max() > 1e-6


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


@pytest.mark.parametrize("steps", [4, 10])
def test_a_smooth_network_loses_at_most_what_floats_warn_of(steps: int) -> None:
    schedule, z = vp_schedule(steps), noise(64, 16, dtype=torch.float32)

    def model(state: Tensor, times: Tensor) -> Tensor:
        alpha, sigma = vp_alpha_sigma(times.double())
        return state * (sigma / (alpha**2 + sigma**2)).to(state.dtype)[:, None]

    with pytest.warns(InexactInversionWarning) as caught:
        latent = edict_invert(model, z, schedule, exact=False)
    found = re.search(r"loses at most about (\S+) of the states' size", str(caught[0].message))
    lost = (edict_sample(model, latent, schedule, exact=False).z - z).square().mean().sqrt().item()
    assert found and float(found[1]) / 10 < lost <= float(found[1])
