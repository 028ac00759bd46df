"""Index 0 of a schedule: a network is asked about it where its time is known, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bicm_diffusion import (
    Preconditioned,
    Schedule,
    bdia_edit,
    bdia_invert,
    bdia_sample,
    ddim_invert,
    ddim_sample,
    ddpm_alpha_bar,
    ddpm_schedule,
    edict_invert,
    edict_sample,
    edm_invert,
    edm_sample,
    obelm_invert,
    obelm_sample,
    to_ve,
    to_vp,
    vp_schedule,
)
from tests.support.closed_forms import noise

FIRST = ddpm_alpha_bar()[0].item()
#: Index 0 is training step 0, as in diffusers with set_alpha_to_one=False; then a level of no training step; then data.
KNOWN = ddpm_schedule(6, steps_offset=1, final_alpha_bar=FIRST)
UNKNOWN = ddpm_schedule(6, steps_offset=1, final_alpha_bar=0.99995)
CLEAN = ddpm_schedule(6, steps_offset=1)

EVERY: dict[str, Callable[..., Any]] = {
    "ddim_sample": ddim_sample,
    "ddim_invert": ddim_invert,
    "edm_sample heun": edm_sample,
    "edm_sample euler": lambda *args, **options: edm_sample(*args, solver="euler", **options),
    "edm_invert heun": edm_invert,
    "edm_invert euler": lambda *args, **options: edm_invert(*args, solver="euler", **options),
    "bdia_edit": lambda *args, **options: bdia_edit(*args, source={}, target={}, **options),
}
for _name, _sampler in {
    "bdia_sample": bdia_sample,
    "bdia_invert": bdia_invert,
    "edict_sample": edict_sample,
    "edict_invert": edict_invert,
    "obelm_sample": obelm_sample,
    "obelm_invert": obelm_invert,
}.items():
    if not _name.startswith("obelm"):  # which needs intervals of similar width
        EVERY[f"{_name} exact"] = _sampler
    EVERY[f"{_name} floats"] = lambda *args, _sampler=_sampler, **options: _sampler(*args, exact=False, **options)
for _name, _sampler in {"bdia_sample heun": bdia_sample, "bdia_invert heun": bdia_invert}.items():
    EVERY[_name] = lambda *args, _sampler=_sampler, **options: _sampler(*args, increments="heun", **options)


def asked(sampler: Callable[..., Any], schedule: Schedule, **options: Any) -> set[float]:
    """The times that a sampler asks its model about."""
    times: set[float] = set()

    def model(z: Tensor, t: Tensor) -> Tensor:
        times.update(t.tolist())
        return 0.1 * z

    sampler(model, noise(2, 3), schedule, **options)
    return times


@pytest.mark.filterwarnings("ignore::bicm_diffusion.InexactInversionWarning")
@pytest.mark.parametrize("prediction", ["noise", Preconditioned()], ids=["noise", "raw"])
@pytest.mark.parametrize("name", EVERY)
def test_no_network_is_asked_about_a_time_that_it_does_not_know(name: str, prediction: Any) -> None:
    for schedule in (KNOWN, UNKNOWN, CLEAN, to_ve(UNKNOWN), to_vp(UNKNOWN)):
        times = asked(EVERY[name], schedule, prediction=prediction)
        assert min(times) >= 0 and times <= set(schedule.times)


def test_time_0_where_the_last_level_is_training_step_0() -> None:
    assert KNOWN.times[0] == 0.0 and KNOWN.lowest == 0
    assert UNKNOWN.times[0] == -1.0 and UNKNOWN.lowest == 1
    assert CLEAN.times[0] == -1.0 and CLEAN.lowest == 1
    single = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)[0].item()  # as diffusers rounds it
    assert single != FIRST and ddpm_schedule(6, steps_offset=1, final_alpha_bar=single).times[0] == 0.0
    later = ddpm_alpha_bar()[5].item()
    assert ddpm_schedule(10, spacing="trailing", final_alpha_bar=later).times[0] == 5.0


@pytest.mark.parametrize("name", ["edm_sample heun", "edm_invert heun", "bdia_sample heun", "bdia_invert heun"])
def test_a_known_level_is_asked_about_by_heuns_increments(name: str) -> None:
    assert 0.0 in asked(EVERY[name], KNOWN)
    assert 0.0 not in asked(EVERY[name], UNKNOWN)
    levels = vp_schedule(6, final_time=0.01)
    assert levels.times[0] in asked(lambda model, z, s: EVERY[name](model, z.double(), s), levels)


def test_inversion_from_index_0_needs_a_level_that_is_known() -> None:
    assert 0.0 in asked(bdia_invert, KNOWN, start_index=0)
    for schedule in (UNKNOWN, CLEAN, to_ve(UNKNOWN)):
        with pytest.raises(ValueError, match="start_index: expected 1"):
            bdia_invert(lambda z, t: z, noise(2, 3), schedule, start_index=0)


def test_where_index_0_is_not_known_heuns_last_step_is_eulers() -> None:
    z, short = noise(3, 4), ddpm_schedule(1, steps_offset=1, final_alpha_bar=0.99995)

    def model(z: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(z + t[:, None] / 1000)

    assert torch.equal(edm_sample(model, z, short), edm_sample(model, z, short, solver="euler"))


def test_levels_of_any_sequence_become_tuples() -> None:
    plain = Schedule((0.0, 1.0), (1.0, 0.6), (0.0, 0.8))
    for kind in (list, torch.tensor, lambda x: torch.tensor(x, dtype=torch.float64).numpy()):
        made = Schedule(kind([0.0, 1.0]), (1.0, 0.6), kind([0.0, 0.8]) if kind is list else (0.0, 0.8))
        assert made == plain and hash(made) == hash(plain)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: vp_schedule("50"), TypeError, r"steps: expected an integer, got '50' \(str\)"),
        (lambda: vp_schedule(50.0), TypeError, r"steps: expected an integer, got 50.0 \(float\)"),
        (lambda: ddpm_schedule(None), TypeError, "steps: expected an integer, got None"),
        (
            lambda: Schedule(0.0, (1.0, 0.6), (0.0, 0.8)),
            TypeError,
            r"times: expected N \+ 1 numbers, got 0.0 \(float\)",
        ),
        (
            lambda: Schedule("ab", (1.0, 0.6), (0.0, 0.8)),
            TypeError,
            r"times: expected N \+ 1 numbers, got 'ab' \(str\)",
        ),
    ],
)
def test_wrong_schedules_are_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
