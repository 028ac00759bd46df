"""A pair is retraced with what made it: anything else is refused, and what did not return is reported."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bicm_diffusion import (
    ExactPair,
    ExactTwins,
    InexactInversionWarning,
    Preconditioned,
    RetraceWarning,
    Schedule,
    StatePair,
    TwinPair,
    bdia_edit,
    bdia_invert,
    bdia_sample,
    edict_invert,
    edict_sample,
    obelm_invert,
    obelm_sample,
    to_ve,
    vp_schedule,
)
from tests.support.closed_forms import Mixture, network, noise

MODEL = network(6)
SCHEDULE = vp_schedule(10)
Z = (noise(4, 6) * 2**20).round().div(2**20).float()
WAYS = {
    "bdia": (bdia_sample, bdia_invert),
    "edict": (edict_sample, edict_invert),
    "obelm": (obelm_sample, obelm_invert),
}
each_way = pytest.mark.parametrize("name", WAYS)
each_kind = pytest.mark.parametrize("exact", [True, False], ids=["exact", "floats"])
pytestmark = pytest.mark.filterwarnings("ignore::bicm_diffusion.InexactInversionWarning")


def both_ways(name: str) -> list[tuple[Any, Any]]:
    sample, invert = WAYS[name]
    return [(sample, invert), (invert, sample)]


def changed(**changes: float) -> Schedule:
    """The schedule with one level moved a little."""
    tables = {"times": list(SCHEDULE.times), "alpha": list(SCHEDULE.alpha), "sigma": list(SCHEDULE.sigma)}
    for name, factor in changes.items():
        tables[name][3] *= factor
    return Schedule(**tables)


@each_way
@each_kind
@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (vp_schedule(20), "schedule: expected 10 steps, as the pair z was made in, got 20"),
        (vp_schedule(10, beta_max=15.0), r"schedule: expected alpha\[1\] = .*, as where the pair z was made, got"),
        (to_ve(SCHEDULE), r"schedule: expected alpha\[1\] = .*, got 1.0"),
        (changed(sigma=1.0 + 1e-12), r"schedule: expected sigma\[3\] = "),
        (changed(times=1.01), r"schedule: expected times\[3\] = "),
    ],
    ids=["steps", "betas", "VE", "one level", "one time"],
)
def test_another_schedule_is_refused(name: str, exact: bool, schedule: Schedule, message: str) -> None:
    for there, back in both_ways(name):
        pair = there(MODEL, Z, SCHEDULE, exact=exact)
        with pytest.raises(ValueError, match=message):
            back(MODEL, pair, schedule, exact=exact)


@each_kind
@pytest.mark.parametrize(
    ("name", "made", "now", "message"),
    [
        ("bdia", {"gamma": 0.9}, {"gamma": 0.96}, "gamma: expected (9/10 = )?0.9, .* made with, got (24/25 = )?0.96"),
        ("bdia", {}, {"gamma": 0.96}, "gamma: expected 1.*got"),
        ("bdia", {"gamma": 0.9}, {"gamma": torch.tensor([0.9, 0.9, 0.9, 0.8])}, "gamma: expected .*got"),
        ("bdia", {"increments": "heun"}, {}, "increments: expected 'heun', .* made with, got 'euler'"),
        ("bdia", {}, {"prediction": "v"}, "prediction: expected 'noise', .* made with, got 'v'"),
        ("obelm", {"prediction": Preconditioned()}, {"prediction": "x0"}, "prediction: expected Preconditioned.* 'x0'"),
        ("obelm", {"prediction": Preconditioned()}, {"prediction": Preconditioned(sigma_data=0.6)}, "prediction: "),
        ("edict", {"p": 0.93}, {"p": 0.9}, "p: expected (93/100 = )?0.93, .* got (9/10 = )?0.9"),
        ("edict", {"leapfrog": True}, {}, "leapfrog: expected True, .* got False"),
    ],
)
def test_another_setting_is_refused(
    name: str, made: dict[str, Any], now: dict[str, Any], message: str, exact: bool
) -> None:
    for there, back in both_ways(name):
        pair = there(MODEL, Z, SCHEDULE, exact=exact, **made)
        with pytest.raises(ValueError, match=message):
            back(MODEL, pair, SCHEDULE, exact=exact, **now)


@each_kind
def test_another_method_is_refused(exact: bool) -> None:
    for name, (sample, _) in WAYS.items():
        pair = sample(MODEL, Z, SCHEDULE, exact=exact)
        for other, (_, invert) in WAYS.items():
            if other != name:
                with pytest.raises((ValueError, TypeError), match=f"z: .*(got one of|got an? {type(pair).__name__})"):
                    invert(MODEL, pair, SCHEDULE, exact=exact)


@each_way
@each_kind
def test_a_pair_at_the_other_end_is_refused(name: str, exact: bool) -> None:
    sample, invert = WAYS[name]
    with pytest.raises(ValueError, match=f"z: {name}_sample starts from noise, index 10, .* {name}_invert retraces it"):
        sample(MODEL, sample(MODEL, Z, SCHEDULE, exact=exact), SCHEDULE, exact=exact)
    with pytest.raises(ValueError, match=f"z: {name}_invert starts from data, index 0, .* {name}_sample retraces it"):
        invert(MODEL, invert(MODEL, Z, SCHEDULE, exact=exact), SCHEDULE, exact=exact)


@each_way
def test_the_same_in_other_words_is_taken(name: str) -> None:
    sample, invert = WAYS[name]
    factor = {"bdia": "gamma", "edict": "p"}.get(name)
    pair = sample(MODEL, Z, SCHEDULE, **({factor: 0.9} if factor else {}))
    equal = Schedule(SCHEDULE.times, SCHEDULE.alpha, SCHEDULE.sigma)
    for form in (
        [0.9, (9, 10), torch.tensor([0.9] * 4), torch.full((4,), 0.9, dtype=torch.float64)] if factor else [None]
    ):
        options = {factor: form} if factor else {}
        assert torch.equal(invert(MODEL, pair, equal, **options).z, Z)


@each_way
@each_kind
def test_guidance_and_conditions_may_differ(name: str, exact: bool) -> None:
    def pair(z: Tensor, times: Tensor, shift: float) -> tuple[Tensor, Tensor]:
        return MODEL(z, times), MODEL(z, times, shift=shift)

    sample, invert = WAYS[name]
    latent = invert(MODEL, Z, SCHEDULE, exact=exact)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edited = sample(pair, latent, SCHEDULE, exact=exact, guidance_scale=1.5, extra_args={"shift": 0.3})
    assert (edited.z - Z).abs().max() > 1e-3


def test_pairs_made_by_hand_are_not_checked() -> None:
    pair = bdia_sample(MODEL, Z, SCHEDULE, gamma=0.9, exact=False)
    again = bdia_invert(MODEL, StatePair(*pair), vp_schedule(12), gamma=0.8, exact=False)
    assert again.z.isfinite().all()


@each_way
@each_kind
def test_one_state_in_place_of_the_pair_is_noticed(name: str, exact: bool) -> None:
    for there, back in both_ways(name):
        pair = there(MODEL, Z, SCHEDULE, exact=exact)
        with pytest.warns(RetraceWarning, match=r"z: \w+ got one state of a pair .* in place of its .z") as caught:
            back(MODEL, pair.z, SCHEDULE, exact=exact)
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error", RetraceWarning)
            back(MODEL, pair, SCHEDULE, exact=exact)
            back(MODEL, pair.z.clone(), SCHEDULE, exact=exact)
            back(MODEL, pair.z.clamp(-1, 1), SCHEDULE, exact=exact)


@each_kind
@pytest.mark.parametrize("name", ["bdia", "obelm"])
def test_the_inner_state_in_place_of_the_pair_is_refused(name: str, exact: bool) -> None:
    for there, back in both_ways(name):
        inner = there(MODEL, Z, SCHEDULE, exact=exact).previous
        for function in (there, back):
            with pytest.raises(ValueError, match=r"z: \w+ got the inner state of a pair, .* in place of its .z"):
                function(MODEL, inner, SCHEDULE, exact=exact)
            assert function(MODEL, inner.clone(), SCHEDULE, exact=exact).z.isfinite().all()


def test_an_image_may_be_inverted_by_another_method() -> None:
    image = bdia_sample(MODEL, Z, SCHEDULE).z
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edict_invert(MODEL, image, SCHEDULE)
        obelm_invert(MODEL, image, SCHEDULE)


def dropping(z: Tensor, times: Tensor, **_: Any) -> Tensor:
    return torch.nn.functional.dropout(MODEL(z, times), 0.1)


def other(z: Tensor, times: Tensor) -> Tensor:
    return 1.01 * MODEL(z, times)


@each_way
@pytest.mark.parametrize("factor", [1.0, 0.9])
def test_what_does_not_come_back_is_reported_with_its_likely_causes(name: str, factor: float) -> None:
    options = {"bdia": {"gamma": factor}, "edict": {"p": factor}}.get(name, {})
    for there, back in both_ways(name):
        for first, second in ((dropping, dropping), (MODEL, other)):
            pair = there(first, Z, SCHEDULE, **options)
            with pytest.warns(
                RetraceWarning, match=r"4 of 4 samples .* another network .* dropout .* not determ"
            ) as caught:
                back(second, pair, SCHEDULE, **options)
            assert caught[0].filename == __file__


def test_only_the_samples_that_went_astray_are_named() -> None:
    def astray(z: Tensor, times: Tensor) -> Tensor:
        output = MODEL(z, times)
        output[2] += 1e-3
        return output

    pair = bdia_sample(MODEL, Z, SCHEDULE)
    with pytest.warns(RetraceWarning, match=r"bdia_invert: 1 of 4 samples \(2\)"):
        bdia_invert(astray, pair, SCHEDULE)


@each_way
@pytest.mark.parametrize("shape", [(3, 1), (2, 5), (2, 3, 11, 13), (1, 4, 16, 16), (0, 4)])
def test_what_comes_back_is_silent(name: str, shape: tuple[int, ...]) -> None:
    model, z = Mixture(), noise(*shape, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for there, back in both_ways(name):
            pair = there(model, z, SCHEDULE)
            again = there(model, back(model, pair, SCHEDULE), SCHEDULE)
            assert torch.equal(again.q, pair.q) and torch.equal(again.info, pair.info)


def test_an_edit_is_silent_and_its_return_under_one_condition_is_not() -> None:
    def model(z: Tensor, times: Tensor, shift: Tensor) -> Tensor:
        return MODEL(z, times) + shift

    def unsteady(z: Tensor, times: Tensor, shift: Tensor) -> Tensor:
        return dropping(z, times) + shift

    one, two = torch.tensor(0.1), torch.tensor(-0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bdia_edit(model, Z, SCHEDULE, source={"shift": one}, target={"shift": two})
        assert torch.equal(bdia_edit(model, Z, SCHEDULE, source={"shift": one}, target={"shift": one.clone()}).z, Z)
        # With other conditions nobody can tell an edit from dropout.
        bdia_edit(unsteady, Z, SCHEDULE, source={"shift": one}, target={"shift": two})
    with pytest.warns(RetraceWarning, match="did not return"):
        bdia_edit(unsteady, Z, SCHEDULE, source={"shift": one}, target={"shift": one.clone()})


def test_a_changed_guidance_scale_is_an_edit() -> None:
    def pair(z: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        return MODEL(z, times), MODEL(z, times, shift=0.4)

    latent = bdia_invert(pair, Z, SCHEDULE, guidance_scale=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edited = bdia_sample(pair, latent, SCHEDULE, guidance_scale=2.0)
    assert not torch.equal(edited.z, Z)


@pytest.mark.slow
def test_traced_loops_refuse_too() -> None:
    pair = bdia_sample(MODEL, Z, SCHEDULE)

    def retraced(pair: ExactPair, gamma: float) -> Any:
        return bdia_invert(MODEL, pair, SCHEDULE, gamma=gamma)

    fast: Callable[..., Any] = torch.compile(retraced, fullgraph=True, backend="eager")
    assert torch.equal(fast(pair, 1.0).z, Z)
    with pytest.raises(Exception, match="gamma: expected 1/1"):
        fast(pair, 0.5)
    torch._dynamo.reset()


def test_kinds_of_pairs() -> None:
    kinds = {"bdia": (ExactPair, StatePair), "obelm": (ExactPair, StatePair), "edict": (ExactTwins, TwinPair)}
    for name, (sample, _) in WAYS.items():
        for exact, kind in zip((True, False), kinds[name], strict=True):
            pair = sample(MODEL, Z, SCHEDULE, exact=exact)
            assert type(pair) is kind and pair.record.index == 0 and pair.record.steps == 10
            first, second = pair
            assert torch.equal(first, pair.z) and first.shape == second.shape
    assert issubclass(InexactInversionWarning, UserWarning) and issubclass(RetraceWarning, UserWarning)
