"""The hook in every sampler's loop: what a guide changes is what a model changed by hand gives, in no more launches."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bicm_diffusion import (
    ConsistencySchedule,
    Evaluation,
    ExactPair,
    Preconditioned,
    RetraceWarning,
    Schedule,
    Shift,
    ancestral_sample,
    bdia_edit,
    bdia_invert,
    bdia_sample,
    consistency_invert,
    consistency_multistep_sample,
    consistency_sample,
    ddim_invert,
    ddim_sample,
    edict_invert,
    edict_sample,
    edm_invert,
    edm_sample,
    karras_schedule,
    load_pair,
    obelm_invert,
    obelm_sample,
    save_pair,
    vp_schedule,
)
from bicm_diffusion.samplers.guide import Sum
from bicm_diffusion.samplers.prediction import Level, denoised_weights
from bicm_kernels import denoise, pseudo_huber, scale_input
from tests.support.closed_forms import column, noise

VP, VE = vp_schedule(5, final_time=0.05), karras_schedule(5, t_min=0.05, t_max=10.0)
SAMPLERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ancestral_sample": (ancestral_sample, {"seed": 3}),
    "ddim_sample": (ddim_sample, {}),
    "ddim_invert": (ddim_invert, {}),
    "edm_sample euler": (edm_sample, {"solver": "euler"}),
    "edm_sample heun": (edm_sample, {}),
    "edm_invert": (edm_invert, {}),
    "bdia_sample": (bdia_sample, {"gamma": 0.9}),
    "bdia_invert": (bdia_invert, {"gamma": 0.9}),
    "bdia_sample floats": (bdia_sample, {"gamma": 0.9, "exact": False}),
    "bdia_sample heun": (bdia_sample, {"gamma": 0.9, "increments": "heun"}),
    "bdia_sample heun floats": (bdia_sample, {"gamma": 0.9, "increments": "heun", "exact": False}),
    "edict_sample": (edict_sample, {}),
    "edict_invert": (edict_invert, {}),
    "edict_sample floats": (edict_sample, {"exact": False}),
    "edict_invert floats": (edict_invert, {"exact": False}),
    "edict_sample leapfrog floats": (edict_sample, {"exact": False, "leapfrog": True}),
    "edict_invert leapfrog floats": (edict_invert, {"exact": False, "leapfrog": True}),
    "obelm_sample": (obelm_sample, {}),
    "obelm_sample floats": (obelm_sample, {"exact": False}),
}
PREDICTIONS: dict[str, Any] = {"noise": "noise", "v": "v", "x0": "x0", "F": Preconditioned()}
LEAPS = ConsistencySchedule((10.0, 2.0), ((0.5, 1.0),))
MULTISTEP = ConsistencySchedule((10.0, 2.0, 0.5))
LEAPING: dict[str, Callable[..., Tensor]] = {
    "ancestral and zigzag": lambda model, x, **o: consistency_sample(model, x, LEAPS, **o),
    "one noise for all zigzags": lambda model, x, **o: consistency_sample(model, x, LEAPS, noise="fixed", **o),
    "multistep": lambda model, x, **o: consistency_multistep_sample(model, x, MULTISTEP, **o),
    "the initial noise": lambda model, x, **o: consistency_multistep_sample(model, x, MULTISTEP, noise="initial", **o),
    "inversion": lambda model, x, **o: consistency_invert(model, x, ConsistencySchedule((10.0, 2.0, 0.5)), **o),
}


def output_of(z: Tensor, times: Tensor) -> Tensor:
    """A model of elements on their own, bent so that nothing is linear."""
    return torch.tanh(z * 0.7) * 0.8 + 0.1 * torch.cos(column(times, z).to(z.dtype))


def level_of(schedule: Schedule, times: Tensor) -> Level:
    if schedule is VE:
        return Level(times[0].item(), 1.0, times[0].item())
    i = min(range(schedule.steps + 1), key=lambda k: abs(schedule.times[k] - times[0].item()))
    return Level(schedule.times[i], schedule.alpha[i], schedule.sigma[i])


def limited(at: Evaluation) -> Tensor:
    return 0.5 * torch.tanh(2.0 * at.x0) + 0.05 * at.index / 5


def pushed(at: Evaluation) -> Shift:
    return Shift(torch.cos(at.z), -0.2)


def pulled(at: Evaluation) -> Shift:
    """Down the gradient of a distance at the denoised sample, in the state."""
    z, x0 = at.tracked()
    (direction,) = torch.autograd.grad(pseudo_huber(x0, torch.ones_like(x0), c=0.1, reduction="none").sum(), z)
    return Shift(direction, torch.linspace(-0.3, -0.1, len(z), dtype=z.dtype))


def pulled_by_hand(model: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    with torch.enable_grad():
        state = z.detach().requires_grad_()
        x0 = model(state)
        (direction,) = torch.autograd.grad((((x0 - 1.0).flatten(1) ** 2).sum(1) + 0.01).sqrt().sum(), state)
    sizes = torch.linspace(-0.3, -0.1, len(z), dtype=z.dtype)
    return (x0 + column(sizes, z) * direction).detach()


GUIDES: dict[str, Any] = {
    "limited": (limited, lambda x0, z, index: 0.5 * torch.tanh(2.0 * x0(z)) + 0.05 * index / 5),
    "pushed": (pushed, lambda x0, z, index: x0(z) - 0.2 * torch.cos(z)),
    "pulled": (pulled, lambda x0, z, index: pulled_by_hand(x0, z)),
}


def states(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def by_hand(kind: str, prediction: Any, schedule: Schedule, guidance: float | None = None) -> Callable[..., Any]:
    """A model whose output already stands for the changed denoised sample."""

    def model(given: Tensor, times: Tensor) -> Any:
        level = level_of(schedule, times)
        of_z, of_output = denoised_weights(prediction, level)
        # What the model is given is scaled: the state itself is what the guide sees.
        scale = prediction.input_scale(level) if isinstance(prediction, Preconditioned) else 1.0

        def x0(z: Tensor) -> Tensor:
            return of_z * z + of_output * output_of(scale * z, times)

        z = given / scale
        index = min(range(6), key=lambda k: abs(schedule.times[k] - times[0].item()))
        output = (GUIDES[kind][1](x0, z, index) - of_z * z) / of_output
        return output if guidance is None else (output, output)

    return model


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", GUIDES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_guide_does_what_a_changed_model_does(name: str, kind: str, prediction: str) -> None:
    sampler, options = SAMPLERS[name]
    for schedule in (VP, VE):
        if schedule is VE and "obelm" in name and "floats" not in name:
            continue  # whose levels are too uneven for integers
        z = (0.5 if "invert" in name else schedule.sigma[-1]) * noise(3, 4)
        given = {**options, "prediction": PREDICTIONS[prediction]}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = sampler(output_of, z, schedule, guide=GUIDES[kind][0], **given)
            expected = sampler(by_hand(kind, PREDICTIONS[prediction], schedule), z, schedule, **given)
            plain = sampler(output_of, z, schedule, **given)
        # Integer states take steps of 2^-32, and a division by a small sigma/alpha makes some more of a difference.
        close = {"rtol": 1e-9, "atol": 1e-7} if isinstance(found, ExactPair) else {"rtol": 1e-8, "atol": 1e-9}
        for x, y, untouched in zip(states(found), states(expected), states(plain), strict=True):
            torch.testing.assert_close(x, y, **close)
            assert (x - untouched).abs().max() > 1e-3


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", ["pushed", "pulled"])
def test_where_churn_raised_the_level_the_guide_sees_the_raised_one(kind: str, prediction: str) -> None:
    given: dict[str, Any] = {"prediction": PREDICTIONS[prediction], "churn": 2.0, "seed": 3}
    z, levels = 10.0 * noise(3, 4), []

    def guide(at: Evaluation) -> Any:
        levels.append(at.sigma)
        return GUIDES[kind][0](at)

    found = edm_sample(output_of, z, VE, guide=guide, **given)
    expected = edm_sample(by_hand(kind, PREDICTIONS[prediction], VE), z, VE, **given)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert levels[0] == VE.sigma[-1] * 1.4


@pytest.mark.parametrize("kind", GUIDES)
@pytest.mark.parametrize("name", ["ddim_sample", "bdia_sample heun", "edict_sample floats", "bdia_sample"])
def test_under_guidance_the_guide_sees_the_pair_combined(name: str, kind: str) -> None:
    def pair(z: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        wanted, other = output_of(z, times), torch.sin(z)
        return other, other + (wanted - other) / 2.0

    sampler, options = SAMPLERS[name]
    z = noise(3, 4)
    found = sampler(pair, z, VP, guide=GUIDES[kind][0], guidance_scale=2.0, **options)
    expected = sampler(output_of, z, VP, guide=GUIDES[kind][0], **options)
    for x, y in zip(states(found), states(expected), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-7)


@pytest.mark.parametrize("kind", GUIDES)
@pytest.mark.parametrize("name", LEAPING)
def test_consistency_samplers_are_guided_where_a_leap_ends(name: str, kind: str) -> None:
    def changed(scaled: Tensor, t: Tensor, u: Tensor) -> Tensor:
        start, stop = t[0].item(), u[0].item()
        z = scaled * (0.25 + start**2) ** 0.5
        skip, out = (0.25 + start * stop) / (0.25 + start**2), 0.5 * (start - stop) / (0.25 + start**2) ** 0.5

        def reached(z: Tensor) -> Tensor:
            return skip * z + out * output_of(z / (0.25 + start**2) ** 0.5, t)

        return (GUIDES[kind][1](reached, z, next(counts)) - skip * z) / out

    counts = iter(range(10))
    sample = LEAPING[name]
    x = (0.5 if name == "inversion" else 10.0) * noise(3, 4)
    found = sample(lambda x, t, u: output_of(x, t), x, guide=GUIDES[kind][0])
    torch.testing.assert_close(found, sample(changed, x), rtol=1e-9, atol=1e-9)
    assert (found - sample(lambda x, t, u: output_of(x, t), x)).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_guide_that_changes_nothing_changes_no_bit(dtype: torch.dtype) -> None:
    z, seen = noise(3, 4, dtype=dtype), []

    def look(at: Evaluation) -> None:
        seen.append((at.index, at.z.dtype, at.x0.dtype))

    for prediction in PREDICTIONS.values():
        for sampler, options in SAMPLERS.values():
            given = {**options, "prediction": prediction}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                one, other = sampler(output_of, z, VP, **given), sampler(output_of, z, VP, guide=look, **given)
            for x, y in zip(states(one), states(other), strict=True):
                assert torch.equal(x, y)
    assert set(seen) == {(index, dtype, dtype) for index in range(6)}
    for sample in LEAPING.values():
        one, other = (sample(lambda x, t, u: output_of(x, t), 10 * z, **given) for given in ({}, {"guide": look}))
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["ddim_sample", "ancestral_sample", "edm_sample heun", "bdia_sample", "edict_sample"])
def test_a_shift_or_another_sample_is_no_launch_of_its_own(name: str, taken: list[tuple[str, bool]]) -> None:
    sampler, options = SAMPLERS[name]
    z, other = noise(3, 4, dtype=torch.float32), noise(3, 4, dtype=torch.float32, seed=1)
    launches = []
    for guide in (None, lambda at: Shift(other, 0.1), lambda at: other):
        taken.clear()
        sampler(output_of, z, VP, guide=guide, **options)
        launches.append([name for name, _ in taken])
    assert launches[0] and launches[0] == launches[1] == launches[2]


def test_the_model_is_asked_once_where_gradients_are_asked_for_first() -> None:
    asked: list[bool] = []

    def model(z: Tensor, times: Tensor) -> Tensor:
        asked.append(z.requires_grad)
        return output_of(z, times)

    ddim_sample(model, noise(3, 4), VP, guide=lambda at: Shift(at.tracked()[1], 0.0 * at.x0.sum() * at.output.sum()))
    assert asked == [True] * 5
    asked.clear()
    ddim_sample(model, noise(3, 4), VP, guide=lambda at: at.z)
    assert asked == [False] * 5


@pytest.mark.parametrize("kind", GUIDES)
@pytest.mark.parametrize(
    ("sample", "invert", "options"),
    [
        (bdia_sample, bdia_invert, {"gamma": 0.9}),
        (bdia_sample, bdia_invert, {"increments": "heun"}),
        (obelm_sample, obelm_invert, {}),
        (edict_sample, edict_invert, {}),
        (edict_sample, edict_invert, {"leapfrog": True}),
    ],
)
def test_a_guide_that_repeats_itself_is_retraced_to_the_bit(
    sample: Any, invert: Any, options: dict[str, Any], kind: str, recwarn: Any
) -> None:
    z, guide = noise(3, 4, dtype=torch.float32), GUIDES[kind][0]
    data = sample(output_of, z, VP, guide=guide, **options)
    back = invert(output_of, data, VP, guide=guide, **options)
    again = sample(output_of, back, VP, guide=guide, **options)
    start = sample(output_of, z, VP, **options)
    assert torch.equal(again.q, data.q) and torch.equal(again.previous_q, data.previous_q)
    assert not torch.equal(start.q, data.q) and not back.info.any()
    assert (back.z - z).abs().max() < 2**-32
    image = torch.tanh(data.z)
    edited = bdia_edit(output_of, image, VP, source={}, target={}, guide=guide)
    assert (edited.z - image).abs().max() < 2**-32
    assert not [w for w in recwarn if w.category is RetraceWarning]


def test_another_guide_on_the_way_back_is_meant_and_a_random_one_is_told(tmp_path: Any) -> None:
    z = noise(3, 4, dtype=torch.float32)
    data = bdia_sample(output_of, z, VP, guide=limited)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = bdia_invert(output_of, data, VP)
        save_pair(data, tmp_path / "pair.safetensors")
        assert torch.equal(bdia_invert(output_of, load_pair(tmp_path / "pair.safetensors"), VP).q, back.q)

    def restless(at: Evaluation) -> Shift:
        return Shift(torch.randn_like(at.z), 0.1)

    data = bdia_sample(output_of, z, VP, guide=restless)
    with pytest.warns(RetraceWarning, match="did not return"):
        bdia_invert(output_of, data, VP, guide=restless)


@pytest.mark.parametrize("kind", GUIDES)
def test_a_sample_is_the_same_bits_alone_and_among_16(kind: str) -> None:
    def guide(at: Evaluation) -> Tensor | Shift:
        change = GUIDES[kind][0](at)
        return Shift(change.direction, -0.2) if isinstance(change, Shift) else change

    z = 10.0 * noise(16, 3, 4, dtype=torch.float32)
    for name in ("ancestral_sample", "bdia_sample", "edm_sample heun"):
        sampler, options = SAMPLERS[name]
        whole = sampler(output_of, z, VE, guide=guide, **options)
        for k in (0, 7):
            own = {**options, "sample_id": k} if name == "ancestral_sample" else options
            alone = sampler(output_of, z[k : k + 1], VE, guide=guide, **own)
            for x, y in zip(states(alone), states(whole), strict=True):
                assert torch.equal(x[0], y[k])


def test_nothing_is_left_to_differentiate() -> None:
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    z = noise(3, 4).requires_grad_()
    for guide in (lambda at: weight * at.x0, lambda at: Shift(weight * at.z, weight), pulled):
        for sampler, options in (SAMPLERS[name] for name in ("ancestral_sample", "bdia_sample", "edict_sample floats")):
            for x in states(sampler(lambda z, t: weight * output_of(z, t), z, VP, guide=guide, **options)):
                assert not x.requires_grad
        x = consistency_sample(lambda x, t, u: weight * output_of(x, t), z, LEAPS, guide=guide)
        assert not x.requires_grad and weight.grad is None and z.grad is None


def test_a_raw_network_is_tracked_by_kernels_with_a_derivative() -> None:
    """`scale_input` and `denoise` around it, whose gradients are those of the formula."""
    found: list[tuple[Tensor, Tensor]] = []

    def guide(at: Evaluation) -> None:
        tracked = at.tracked()
        assert tracked._fields == ("z", "x0")
        z, x0 = tracked
        found.append((torch.autograd.grad(x0.sum(), z)[0], z))

    edm_sample(output_of, 10.0 * noise(3, 4), VE, prediction=Preconditioned(), guide=guide, solver="euler")
    for i, (gradient, z) in zip(range(5, 0, -1), found, strict=True):
        state, sigma = z.detach().requires_grad_(), VE.sigma[i]
        F = output_of(scale_input(state, sigma), torch.full((3,), sigma, dtype=torch.float64))
        (expected,) = torch.autograd.grad(denoise(state, F, sigma, parameterization="edm").sum(), state)
        assert torch.equal(gradient, expected)


def squared(of_z: Any, of_output: Any, z: Tensor, output: Tensor) -> Tensor:
    return Sum.apply(of_z, of_output, z, output).square()


def test_sums_are_differentiated_twice_and_in_the_dtypes_of_their_terms() -> None:
    z, output = noise(3, 4).requires_grad_(), noise(3, 4, seed=1).requires_grad_()
    weights = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    for numbers in ((1.0, -0.7), (0.3, weights)):
        assert torch.autograd.gradcheck(partial(Sum.apply, *numbers), (z, output))
        assert torch.autograd.gradgradcheck(partial(squared, *numbers), (z, output))
    seen: list[tuple[torch.dtype, torch.dtype]] = []

    def guide(at: Evaluation) -> None:
        state, x0 = at.tracked()
        seen.append((x0.dtype, torch.autograd.grad(x0.square().sum(), state)[0].dtype))

    half = noise(3, 4, dtype=torch.float32)
    ddim_sample(lambda z, t: output_of(z, t).bfloat16(), half, VP, guide=guide)
    assert seen == [(torch.float32, torch.float32)] * 5


def test_a_callback_sees_what_the_model_answered() -> None:
    seen: list[Any] = []
    options = {"guide": lambda at: Shift(at.z, 0.1), "callback": lambda info: seen.append(info.eps)}
    ddim_sample(output_of, noise(3, 4), VP, **options)
    bdia_sample(output_of, noise(3, 4), VP, **options)
    edict_sample(lambda z, t: (z, output_of(z, t)), noise(3, 4), VP, guidance_scale=1.0, **options)
    assert all(isinstance(eps, Tensor) for eps in seen[:10]) and all(isinstance(eps, tuple) for eps in seen[10:])


WRONG: dict[str, tuple[Any, str]] = {
    "no function": (3, "guide: expected a function or None, got 3"),
    "a pair": (lambda at: (at.z, 0.1), "guide: expected None, a Shift, or the denoised sample, got a tuple of 2"),
    "another shape": (lambda at: at.x0[:, :2], r"guide: expected its result like z, \(3, 4\) on cpu, got \(3, 2\)"),
    "whole numbers": (lambda at: at.x0.long(), "guide: expected a floating dtype of its result, got torch.int64"),
    "a shift of one": (lambda at: Shift(at.z[:1]), "guide: expected its Shift's direction like z"),
    "weights": (lambda at: Shift(at.z, torch.ones(2)), r"guide's weight: expected a 0-d or a \(3,\) tensor"),
    "a word": (lambda at: Shift(at.z, "0.1"), "guide's weight: expected a number or a tensor"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_guides_are_named(kind: str) -> None:
    guide, message = WRONG[kind]
    for run in (
        lambda: ddim_sample(output_of, noise(3, 4), VP, guide=guide),
        lambda: consistency_sample(lambda x, t, u: output_of(x, t), noise(3, 4), LEAPS, guide=guide),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            run()


@pytest.mark.parametrize("parameterization", ["bcm", "cm"])
def test_a_guide_where_the_output_has_no_weight_is_told_of(parameterization: Any) -> None:
    schedule = karras_schedule(4)  # which comes by the smallest level, t_min
    options: dict[str, Any] = {"prediction": Preconditioned(parameterization)}
    z = noise(2, 6, dtype=torch.float32)
    with pytest.raises(ValueError, match="guide: expected levels where the denoised sample depends on the model's out"):
        ddim_sample(lambda x, t: x, z, schedule, guide=lambda at: at.x0.clamp(-1, 1), **options)

    def guide(at: Evaluation) -> Tensor | None:
        return at.x0.clamp(-1, 1) if at.index > 1 else None

    assert ddim_sample(lambda x, t: x, z, schedule, guide=guide, **options).isfinite().all()


def test_some_samples_of_a_pair_keep_their_guide() -> None:
    def guide(at: Evaluation) -> Tensor:
        return at.x0.clamp(-1, 1)

    pair = bdia_sample(lambda z, t: 0.1 * z, noise(4, 6), VP, guide=guide)
    assert pair.record.conditions.digest() == pair[:2].record.conditions.digest()
