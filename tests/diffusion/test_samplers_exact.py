"""Inversion to the bit: integers return, the buffer empties, and nothing wraps silently."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from bicm_diffusion import (
    ExactPair,
    Preconditioned,
    RetraceWarning,
    Schedule,
    StatePair,
    bdia_invert,
    bdia_sample,
    edict_invert,
    edict_sample,
    karras_schedule,
    obelm_invert,
    obelm_sample,
    vp_schedule,
)
from tests.support.closed_forms import network, noise

WIDTH = 24
HALVES = (torch.bfloat16, torch.float16)
NETWORKS = (torch.float32, *HALVES)
pytestmark = pytest.mark.filterwarnings("ignore::bicm_diffusion.InexactInversionWarning")


def same_states(one: ExactPair, other: ExactPair) -> bool:
    """Whether two pairs hold the same integers."""
    return torch.equal(one.q, other.q) and torch.equal(one.previous_q, other.previous_q)


def float_loss(there: Any, back: Any, model: Callable[..., Tensor], z: Tensor, schedule: Any, **options: Any) -> float:
    """Max error of the same round trip in floating point."""
    pair = there(model, z, schedule, exact=False, **options)
    return (back(model, pair, schedule, exact=False, **options).z.double() - z.double()).abs().max().item()


@pytest.mark.parametrize("dtype", NETWORKS)
@pytest.mark.parametrize(
    ("gamma", "steps"), [(Fraction(1), 100), (Fraction(24, 25), 100), (Fraction(9, 10), 100), (Fraction(1, 2), 60)]
)
def test_from_noise_every_bit_returns(gamma: Fraction, steps: int, dtype: torch.dtype) -> None:
    model, z, schedule = network(WIDTH, dtype), noise(8, WIDTH, dtype=torch.float32), vp_schedule(steps)
    data = bdia_sample(model, z, schedule, gamma=gamma)
    assert isinstance(data, ExactPair)
    assert (data.info.abs().max() > 0) == (gamma < 1)
    back = bdia_invert(model, data, schedule, gamma=gamma)
    assert isinstance(back, ExactPair)
    assert torch.equal(back.z, z)
    assert not back.info.any()
    assert same_states(bdia_sample(model, back, schedule, gamma=gamma), data)

    losses = {
        str(kind).removeprefix("torch."): float_loss(
            bdia_sample, bdia_invert, network(WIDTH, kind if kind != torch.float64 else dtype), z.to(kind), schedule,
            gamma=gamma,
        )
        for kind in (torch.float64, torch.float32, *HALVES)
    }  # fmt: skip
    shown = ", ".join(f"{name} {loss:.0e}" for name, loss in losses.items())
    print(f"gamma {gamma}, {steps} steps, network {dtype}: exact 0; floats lose: {shown}")
    assert losses["float32"] > 0


@pytest.mark.parametrize("dtype", NETWORKS)
@pytest.mark.parametrize("gamma", [Fraction(1), Fraction(24, 25), Fraction(9, 10)])
def test_from_data_every_bit_returns(gamma: Fraction, dtype: torch.dtype) -> None:
    model, x, schedule = network(WIDTH, dtype), noise(8, WIDTH, dtype=torch.float32), vp_schedule(50)
    latent = bdia_invert(model, x, schedule, gamma=gamma)
    assert isinstance(latent, ExactPair) and not latent.info.any()
    back = bdia_sample(model, latent, schedule, gamma=gamma)
    assert isinstance(back, ExactPair)
    assert torch.equal(back.z, x)
    assert not back.info.any()
    assert same_states(bdia_invert(model, back, schedule, gamma=gamma), latent)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_states_of_every_dtype_return(dtype: torch.dtype) -> None:
    model, schedule = network(WIDTH), vp_schedule(20)
    z = (noise(8, WIDTH) * 2**20).round().div(2**20).to(dtype)
    back = bdia_invert(model, bdia_sample(model, z, schedule, gamma=0.9), schedule, gamma=0.9)
    assert back.z.dtype == dtype
    assert torch.equal(back.z, z)


@pytest.mark.parametrize("prediction", ["v", "x0", Preconditioned(), Preconditioned("bcm"), Preconditioned("cm")])
@pytest.mark.parametrize("schedule", [vp_schedule(20), karras_schedule(20)], ids=["VP", "EDM"])
@pytest.mark.parametrize(
    ("there", "back", "options"),
    [
        (bdia_sample, bdia_invert, {"gamma": 0.9}),
        (bdia_sample, bdia_invert, {"gamma": 0.9, "increments": "heun"}),
        (obelm_sample, obelm_invert, {}),
        (edict_sample, edict_invert, {}),
    ],
    ids=["BDIA", "BDIA Heun", "O-BELM", "EDICT"],
)
def test_every_method_returns(there: Any, back: Any, options: dict[str, Any], schedule: Any, prediction: Any) -> None:
    model, z = network(WIDTH), schedule.sigma[-1] * noise(3, WIDTH, dtype=torch.float32)

    def pair(z: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        return model(z, times), model(z, times, shift=0.3)

    shared = {"prediction": prediction, "guidance_scale": 1.5, **options}
    data = there(pair, z, schedule, **shared)
    again = back(pair, data, schedule, **shared)
    assert not again.info.any()
    torch.testing.assert_close(again.z, z, rtol=2e-7, atol=1e-9)
    assert same_states(there(pair, again, schedule, **shared), data)


def test_ratios_may_differ_between_samples() -> None:
    model, z, schedule = network(WIDTH), noise(4, WIDTH, dtype=torch.float32), vp_schedule(40)
    gamma = (torch.tensor([1, 24, 9, 1]), torch.tensor([1, 25, 10, 2]))
    data = bdia_sample(model, z, schedule, gamma=gamma)
    assert isinstance(data, ExactPair)
    assert (data.info.flatten(1).abs().amax(1) > 0).tolist() == [False, True, True, True]
    back = bdia_invert(model, data, schedule, gamma=gamma)
    assert torch.equal(back.z, z) and isinstance(back, ExactPair) and not back.info.any()


def test_a_full_buffer_is_an_error_that_names_step_sample_and_remedy() -> None:
    model, z, schedule = network(WIDTH), noise(8, WIDTH, dtype=torch.float32), vp_schedule(70)
    with pytest.raises(OverflowError, match=r"sample \d .* between indices \d and \d .*fewer steps .*exact=False"):
        bdia_sample(model, z, schedule, gamma=0.5)


def test_a_model_that_answers_nan_is_an_error_that_names_its_sample() -> None:
    def model(z: Tensor, times: Tensor) -> Tensor:
        bad = torch.zeros_like(z)
        if times[0] < 0.5:
            bad[2] = torch.nan
        return z + bad

    with pytest.raises(OverflowError, match=r"sample 2 .* between indices 3 and 4 \(1 of 4 samples did\)"):
        bdia_sample(model, noise(4, 3), vp_schedule(10))


def test_a_pair_unpacks_into_its_states() -> None:
    pair = bdia_sample(network(WIDTH), noise(2, WIDTH, dtype=torch.float32), vp_schedule(5))
    z, previous = pair
    assert torch.equal(z, pair.z) and torch.equal(previous, pair.previous)
    assert z.dtype == torch.float32 and not torch.equal(z, previous)


def test_overflow_is_read_once_and_after_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    check = ExactPair.check
    monkeypatch.setattr(ExactPair, "check", lambda pair: (reads.append(pair), check(pair)))
    bdia_sample(network(WIDTH), noise(2, WIDTH, dtype=torch.float32), vp_schedule(10), gamma=0.9)
    assert len(reads) == 1


def test_a_pair_of_floats_may_go_on_exactly() -> None:
    model, z, schedule = network(WIDTH), noise(2, WIDTH, dtype=torch.float32), vp_schedule(20)
    pair = bdia_sample(model, z, schedule, exact=False)
    assert isinstance(pair, StatePair)
    latent = bdia_invert(model, StatePair(*pair), schedule)
    assert isinstance(latent, ExactPair)
    assert (latent.z - z).abs().max() < 0.1
    back = bdia_sample(model, latent, schedule)
    torch.testing.assert_close(back.z, pair.z, rtol=0, atol=2.0**-32)


def test_an_exact_pair_may_go_on_in_floats() -> None:
    model, z, schedule = network(WIDTH), noise(2, WIDTH, dtype=torch.float32), vp_schedule(20)
    pair = bdia_invert(model, StatePair(*bdia_sample(model, z, schedule)), schedule, exact=False)
    assert isinstance(pair, StatePair)
    assert 0 < (pair.z - z).abs().max() < 0.1


@pytest.mark.parametrize("sampler", [bdia_sample, edict_sample, obelm_sample])
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 8, 8), (0, 67)])
def test_an_empty_batch_has_exact_states_too(sampler: Callable[..., Any], shape: tuple[int, ...]) -> None:
    pair = sampler(lambda z, times: z, torch.empty(shape), vp_schedule(3))
    assert pair.z.shape == shape


def test_both_of_twins_are_states_to_begin_with() -> None:
    model, z, schedule = network(WIDTH, torch.float32), noise(4, WIDTH, dtype=torch.float32), vp_schedule(6)
    for exact in (True, False):
        z_0, y_0 = edict_sample(model, z, schedule, exact=exact)
        for state in (z_0, y_0):
            with pytest.warns(RetraceWarning):
                edict_invert(model, state, schedule, exact=exact)


def test_the_model_gets_float16_states_where_alpha_is_small() -> None:
    z = torch.full((2, WIDTH), 6.0, dtype=torch.float16)
    schedule = Schedule((0.0, 1.0, 2.0), (1.0, 0.5, 5e-5), (0.0, 0.8, 1.0))
    seen: list[Tensor] = []

    def model(x: Tensor, times: Tensor) -> Tensor:
        seen.append(x)
        return x

    pair = edict_sample(model, z, schedule)
    assert torch.equal(seen[0], z) and all(x.isfinite().all() for x in seen)
    assert edict_invert(model, pair, schedule).z.isfinite().all()
