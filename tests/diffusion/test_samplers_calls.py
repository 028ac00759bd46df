"""Samplers called wrongly say so under the names that their callers know."""

from __future__ import annotations

import inspect
import typing
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bicm_diffusion
from bicm_diffusion import (
    PRESETS,
    ConsistencySchedule,
    LeapOptions,
    Options,
    StatePair,
    TwinPair,
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
    obelm_invert,
    obelm_sample,
    sign_masked,
    sign_recursive,
    vp_schedule,
)
from tests.support.closed_forms import noise

SCHEDULE, LEAPS = vp_schedule(4), ConsistencySchedule((80.0, 2.0))
Z = noise(2, 3, dtype=torch.float32)
ONE_STATE: dict[str, Any] = {
    "ancestral_sample": ancestral_sample,
    "ddim_sample": ddim_sample,
    "ddim_invert": ddim_invert,
    "edm_sample": edm_sample,
    "edm_invert": edm_invert,
}
TWO_STATES: dict[str, Any] = {
    "bdia_sample": bdia_sample,
    "bdia_invert": bdia_invert,
    "edict_sample": edict_sample,
    "edict_invert": edict_invert,
    "obelm_sample": obelm_sample,
    "obelm_invert": obelm_invert,
}
LEAPING: dict[str, Any] = {
    "consistency_sample": consistency_sample,
    "consistency_multistep_sample": consistency_multistep_sample,
    "consistency_invert": consistency_invert,
}
STEPPING = {**ONE_STATE, **TWO_STATES}
SCHEDULED = {**STEPPING, **LEAPING, "bdia_edit": bdia_edit}


def answer(z: Tensor, *_: Any, **__: Any) -> Tensor:
    return 0.1 * z


def call(name: str, model: Any = answer, z: Any = Z, schedule: Any = None, **options: Any) -> Any:
    """A call of any sampler."""
    if name.startswith("sign"):
        given = {"sigmas": [0.5, 0.1], "seed": 0} if name == "sign_masked" else {}
        return getattr(bicm_diffusion, name)(model, z, **{**given, **options})
    own = {"source": {}, "target": {}} if name == "bdia_edit" else {}
    default = LEAPS if name in LEAPING else SCHEDULE
    return SCHEDULED[name](model, z, default if schedule is None else schedule, **{**own, **options})


def kinds(name: str) -> list[dict[str, Any]]:
    """The options under which a sampler's loop is another."""
    kinds: list[dict[str, Any]] = [{}]
    if name in TWO_STATES or name == "bdia_edit":
        kinds.append({"exact": False})
    if name.startswith("bdia"):
        kinds.append({"increments": "heun"})
    return kinds


@dataclass
class UNetOutput:
    sample: Tensor


@dataclass
class OtherOutput:
    logits: Tensor


ANSWERS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "an output object": (UNetOutput, r"model: expected a tensor .*got an? UNetOutput; return its \.sample"),
    "another output object": (OtherOutput, r"model: expected a tensor .*got an? OtherOutput; return its \.logits"),
    "a tuple of one": (lambda z: (z,), r"got a tuple of 1 \(Tensor\); return its first element"),
    "a list of three": (lambda z: [z, z, z], r"got a list of 3 \(Tensor\); return its first element"),
    "an array": (lambda z: z.numpy(), r"got a numpy.ndarray of shape \(2, 3\); torch.from_numpy makes"),
    "None": (lambda z: None, r"model: expected a tensor of shape \(2, 3\), got None"),
    "a number": (lambda z: 0.5, r"model: expected a tensor of shape \(2, 3\), got 0.5 \(float\)"),
    "a dict": (lambda z: {"n": 3, "sample": z}, r"model: .* shape \(2, 3\), got a dict; return its \['sample'\]"),
    "an empty dict": (lambda z: {}, r"model: expected a tensor of shape \(2, 3\), got a dict$"),
    "another shape": (lambda z: z[:, :2], r"model: expected a tensor of shape \(2, 3\), .* got shape \(2, 2\)"),
    "one more dimension": (lambda z: z[None], r"model: .*got shape \(1, 2, 3\)"),
    "a shape that broadcasts": (lambda z: z[:1], r"model: .*got shape \(1, 3\)"),
    "integers": (lambda z: z.long(), "model: expected float16, .* got torch.int64"),
    "booleans": (lambda z: z > 0, "model: expected float16, .* got torch.bool"),
    "complex numbers": (lambda z: z + 0j, "model: expected float16, .* got torch.complex64"),
    "another device": (lambda z: z.to("meta"), "model: expected a tensor on cpu, .* got one on meta"),
}


@pytest.mark.filterwarnings("ignore::bicm_diffusion.InexactInversionWarning")
@pytest.mark.parametrize("kind", ANSWERS)
@pytest.mark.parametrize("name", [*SCHEDULED, "sign_masked", "sign_recursive"])
def test_what_a_model_must_return(name: str, kind: str) -> None:
    wrong, message = ANSWERS[kind]
    for options in kinds(name):
        with pytest.raises((TypeError, ValueError), match=message) as caught:
            call(name, lambda z, *_, **__: wrong(z), **options)
        assert "tensor([" not in str(caught.value) and len(str(caught.value)) < 250


@pytest.mark.filterwarnings("ignore::bicm_diffusion.InexactInversionWarning")
@pytest.mark.parametrize("name", [*STEPPING, "bdia_edit"])
def test_guidance_goes_with_a_pair(name: str) -> None:
    for options in kinds(name):
        with pytest.raises(TypeError, match=r"model: .* got a pair of tensors; guidance_scale=… combines a pair"):
            call(name, lambda z, *_: (z, z), **options)
        with pytest.raises(
            TypeError, match=r"model: expected a pair \(uncond, cond\) .* guidance_scale is given, got a t"
        ):
            call(name, guidance_scale=7.5, **options)
        with pytest.raises(TypeError, match=r"output.chunk\(2\) makes a pair of a doubled batch"):
            call(name, lambda z, *_: torch.cat([z, z]), guidance_scale=7.5, **options)
        with pytest.raises(ValueError, match=r"model: expected a tensor of shape \(2, 3\), .* got shape \(2, 2\)"):
            call(name, lambda z, *_: (z, z[:, :2]), guidance_scale=7.5, **options)
        with pytest.raises(TypeError, match="guidance_scale: expected a number or a tensor, or None, got 'high'"):
            call(name, guidance_scale="high", **options)
        with pytest.raises(ValueError, match=r"guidance_scale: expected a 0-d or a \(2,\) tensor, got shape \(3,\)"):
            call(name, guidance_scale=torch.ones(3), **options)


@pytest.mark.parametrize("name", [*SCHEDULED, "sign_masked", "sign_recursive"])
def test_a_misspelt_option_is_named_with_its_likely_spelling(name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name}\(\) got an unexpected keyword argument 'colour'") as caught:
        call(name, colour=1)
    assert str(caught.value).startswith(f"{name}() got an unexpected keyword argument 'colour'")
    near = {"sign_masked": ("sigma", "sigmas"), "sign_recursive": ("step", "steps")}
    wrong, right = near.get(name, ("extra_arg", "extra_args"))
    with pytest.raises(TypeError, match=rf"^{name}\(\) .* '{wrong}'; did you mean '{right}'\?$"):
        call(name, **{wrong: {}})


def test_options_that_another_sampler_takes_are_named() -> None:
    with pytest.raises(
        TypeError, match=r"ddim_sample\(\) got an unexpected keyword argument 'gamma'; it takes prediction, "
    ):
        ddim_sample(answer, Z, SCHEDULE, gamma=0.9)
    with pytest.raises(TypeError, match=r"'guidance'; did you mean 'guidance_scale'\?"):
        bdia_edit(answer, Z, SCHEDULE, source={}, target={}, guidance=2.0)


@pytest.mark.parametrize("argument", ["y", "encoder_hidden_states"])
@pytest.mark.parametrize("name", SCHEDULED)
def test_an_argument_of_the_model_is_told_where_it_goes(name: str, argument: str) -> None:
    with pytest.raises(TypeError, match=rf"{name}\(\) .* extra_args=\{{'{argument}': …\}}"):
        call(name, **{argument: 3})


@pytest.mark.parametrize("name", [*SCHEDULED, "sign_masked", "sign_recursive"])
def test_gradients_that_are_not_recorded_are_told_of(name: str) -> None:
    z = Z.clone().requires_grad_()
    for options in kinds(name):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call(name, z=z, **options)
            told = [one for one in caught if "no_grad" in str(one.message)]
            assert len(told) == 1 and str(told[0].message).startswith(f"{name}: ") and told[0].filename == __file__
            caught.clear()
            call(name, z=Z, **options)
            call(name, z=z.detach(), **options)
            with torch.no_grad():
                call(name, z=z, **options)
        assert not [one for one in caught if "no_grad" in str(one.message)]


def test_gradients_of_a_pair_are_told_of_too() -> None:
    pair = StatePair(Z, Z.clone().requires_grad_())
    with pytest.warns(UserWarning, match="bdia_invert: sampling runs under torch.no_grad"):
        bdia_invert(answer, pair, SCHEDULE, exact=False)


SCHEDULES: dict[str, tuple[Any, str]] = {
    "a number": (50, r"schedule: expected a Schedule, got 50 \(int\); vp_schedule\(50\) makes one"),
    "a preset's name": (
        "cifar10-zigzag",
        r"schedule: expected a Schedule, got 'cifar10-zigzag' \(str\); .*PRESETS\['cifar10-zigzag'\] would be",
    ),
    "another name": ("karras", r"schedule: expected a Schedule, got 'karras' \(str\); vp_schedule\(steps\) makes one$"),
    "tensors": (torch.linspace(0, 1, 5), r"schedule: expected a Schedule, got a torch.float32 tensor of shape \(5,\)"),
    "a list": ([0.0, 1.0], "schedule: expected a Schedule, got a list of 2"),
    "None": (None, "schedule: expected a Schedule, got None"),
    "a diffusers scheduler": (
        SimpleNamespace(set_timesteps=None),
        "; adapters.diffusers.from_diffusers",
    ),
    "leaps": (LEAPS, "got a ConsistencySchedule; a ConsistencySchedule is for consistency_sample"),
}


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("name", [*STEPPING, "bdia_edit"])
def test_a_schedule_is_a_schedule(name: str, kind: str) -> None:
    given, message = SCHEDULES[kind]
    for options in kinds(name):
        with pytest.raises(TypeError, match=message):
            SCHEDULED[name](
                answer, Z, given, **({"source": {}, "target": {}} if name == "bdia_edit" else {}), **options
            )


@pytest.mark.parametrize("name", LEAPING)
def test_a_consistency_schedule_is_one(name: str) -> None:
    for given, message in (
        ("cifar10-zigzag", r"got 'cifar10-zigzag' \(str\); PRESETS\['cifar10-zigzag'\] is one"),
        ("cifar", r"got 'cifar' \(str\); ConsistencySchedule\(levels\) makes one"),
        (80.0, r"got 80.0 \(float\)"),
        ((80.0, 2.0), "got a tuple of 2"),
        (SCHEDULE, "got a Schedule"),
        (torch.ones(2), "got a torch.float32 tensor"),
    ):
        with pytest.raises(TypeError, match=f"schedule: expected a ConsistencySchedule, {message}"):
            LEAPING[name](answer, Z, given)
    assert "cifar10-zigzag" in PRESETS


@pytest.mark.parametrize("name", ONE_STATE)
def test_a_sampler_of_one_state_takes_no_pair(name: str) -> None:
    for pair in (StatePair(Z, Z), TwinPair(Z, Z), bdia_sample(answer, Z, SCHEDULE), edict_sample(answer, Z, SCHEDULE)):
        kind = type(pair).__name__
        with pytest.raises(TypeError, match=rf"z: expected a tensor \(B, …\), got an? {kind}; its .z is a tensor"):
            ONE_STATE[name](answer, pair, SCHEDULE)


@pytest.mark.parametrize("name", LEAPING)
def test_a_consistency_sampler_takes_no_pair(name: str) -> None:
    with pytest.raises(TypeError, match=r"x: expected a tensor \(B, …\), got a StatePair; its .z is a tensor"):
        LEAPING[name](answer, StatePair(Z, Z), LEAPS)


@pytest.mark.parametrize("name", TWO_STATES)
def test_a_sampler_of_two_states_takes_its_own_pairs(name: str) -> None:
    floats, integers = ("TwinPair", "ExactTwins") if "edict" in name else ("StatePair", "ExactPair")
    other = bdia_sample if "edict" in name else edict_sample
    for exact in (True, False):
        foreign = StatePair(*other(answer, Z, SCHEDULE)) if "edict" in name else TwinPair(Z, Z)
        for given in (foreign, other(answer, Z, SCHEDULE, exact=exact)):
            with pytest.raises(
                TypeError, match=rf"z: expected a tensor \(B, …\), a {floats} or an {integers}, got an? "
            ):
                TWO_STATES[name](answer, given, SCHEDULE, exact=exact)
        with pytest.raises(TypeError, match=rf"made of two tensors by {floats}\(\*z\)\) or an {integers}, got a tuple"):
            TWO_STATES[name](answer, (Z, Z), SCHEDULE, exact=exact)


@pytest.mark.parametrize("name", [*SCHEDULED, "sign_masked", "sign_recursive"])
def test_what_a_state_is(name: str) -> None:
    label = "x" if name in LEAPING or name.startswith("sign") else "z"
    for options in kinds(name):
        for given, error, message in (
            (Z.long(), TypeError, "expected float16, bfloat16, float32 or float64, got torch.int64"),
            (Z.numpy(), TypeError, r"expected a tensor \(B, …\)?.* got a numpy.ndarray of shape \(2, 3\)"),
            (torch.tensor(1.0), ValueError, r"expected a batch dimension, \(B, …\), got a 0-d tensor"),
            (None, TypeError, "expected a tensor .* got None"),
            (lambda z: z, TypeError, "expected a tensor .* got a function"),
        ):
            with pytest.raises(error, match=f"^{label}: {message}"):
                call(name, answer, given, **options)


@pytest.mark.parametrize("name", [*SCHEDULED, "sign_masked", "sign_recursive"])
def test_models_and_callbacks_are_callable(name: str) -> None:
    for given, described in ((Z, r"a torch.float32 tensor of shape \(2, 3\)"), (None, "None"), ("unet", "'unet'")):
        with pytest.raises(
            TypeError, match=rf"model: expected a function or module, called as model\(.*\), got {described}"
        ):
            call(name, given)
    if name.startswith("sign"):
        return
    with pytest.raises(TypeError, match="callback: expected a function or None, got 3"):
        call(name, callback=3)
    with pytest.raises(TypeError, match="extra_args: expected a mapping from names to values, got a list"):
        call(name, extra_args=["label"])


@pytest.mark.parametrize("name", ["source", "target", "extra_args"])
def test_conditions_of_an_edit_are_mappings(name: str) -> None:
    options: dict[str, Any] = {"source": {}, "target": {}, name: 3}
    with pytest.raises(TypeError, match=rf"{name}: expected a mapping from names to values, got 3"):
        bdia_edit(answer, Z, SCHEDULE, **options)


@pytest.mark.parametrize("prediction", ["epsilons", None, 3, ["noise"]])
@pytest.mark.parametrize("name", [*STEPPING, "bdia_edit"])
def test_a_prediction_is_one_of_the_known(name: str, prediction: Any) -> None:
    with pytest.raises(ValueError, match=r"prediction: expected 'noise', .*got"):
        call(name, prediction=prediction)


@pytest.mark.filterwarnings("ignore::bicm_diffusion.InexactInversionWarning")
@pytest.mark.parametrize("name", [*STEPPING, "bdia_edit"])
def test_noise_is_called_epsilon_too(name: str) -> None:
    for options in kinds(name):
        plain, named = call(name, **options), call(name, prediction="epsilon", **options)
        first, second = ((x, x) if isinstance(x, Tensor) else tuple(x) for x in (plain, named))
        assert all(map(torch.equal, first, second))
        if name in TWO_STATES and name.endswith("sample"):
            back = name.replace("sample", "invert")
            for pair, prediction in ((named, "noise"), (plain, "epsilon")):
                call(back, z=pair, prediction=prediction, **options)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    ("factor", "error", "message"),
    [
        (1.5, ValueError, "expected a value in .*0, 1\\], got 1.5"),
        (float("nan"), ValueError, "expected a value in .*0, 1\\], got nan"),
        ("0.9", TypeError, "expected a number, a fraction .* or a tensor, got '0.9'"),
        (None, TypeError, "expected a number, .* got None"),
        ((1, 2, 3), ValueError, r"expected a number or a fraction \(n, m\), got 3 numbers"),
        ((0.5, 1), TypeError, r"expected an int or an int64 tensor in \(n, m\), got 0.5"),
        ((3, 2), ValueError, "expected a value in"),
        ((1, 0), ValueError, r"expected n and m of n/m in \[1, 2\*\*20\], got \(1, 0\)"),
        ((1, 2**21), ValueError, r"expected n and m of n/m in \[1, 2\*\*20\]"),
        (Fraction(1, 2**21), ValueError, r"expected n and m of n/m in \[1, 2\*\*20\]"),
        (torch.ones(3), ValueError, r"expected a 0-d or a \(2,\) tensor, got shape \(3,\)"),
        (torch.ones(2, 3), ValueError, r"expected a 0-d or a \(2,\) tensor, got shape \(2, 3\)"),
        (torch.ones(2).long(), TypeError, "expected floating tensors, got torch.int64"),
        ((torch.ones(2), torch.ones(2)), TypeError, "expected int64 tensors, got torch.float32"),
    ],
)
@pytest.mark.parametrize(("name", "label"), [("bdia_sample", "gamma"), ("bdia_invert", "gamma"), ("edict_sample", "p")])
def test_what_a_factor_is(
    name: str, label: str, factor: Any, error: type[Exception], message: str, exact: bool
) -> None:
    with pytest.raises(error, match=f"^{label}: {message}"):
        call(name, exact=exact, **{label: factor})


def test_factors_per_sample_are_looked_into_where_they_are_read_anyway() -> None:
    with pytest.raises(ValueError, match=r"gamma: expected values in \[0, 1\], got 1.5"):
        bdia_sample(answer, Z, SCHEDULE, gamma=torch.tensor([0.5, 1.5]))
    assert bdia_sample(answer, Z[:0], SCHEDULE, gamma=torch.ones(0)).z.shape == (0, 3)
    assert bdia_sample(answer, Z, SCHEDULE, gamma=np.float32(0.5), exact=False).z.isfinite().all()


@pytest.mark.parametrize(
    ("run", "advice"),
    [
        (lambda z: bdia_sample(answer, z, vp_schedule(70), gamma=0.5), "fewer steps or a gamma nearer to 1"),
        (lambda z: bdia_sample(answer, 1e10 * z, SCHEDULE), r"states must stay below 2\^31, so scale the data"),
        (lambda z: edict_sample(answer, z, vp_schedule(200), p=0.5), "fewer steps or a p nearer to 1"),
        (lambda z: obelm_sample(answer, 1e10 * z, vp_schedule(20)), "levels more nearly uniform in sigma/alpha"),
    ],
)
def test_advice_fits_the_method(run: Any, advice: str) -> None:
    with pytest.raises(OverflowError, match=f"sample 0 left the range .*{advice}") as caught:
        run(Z)
    assert "factor nearer" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"churn": "1"}, TypeError, "churn: expected a number, got '1'"),
        (
            {"churn": 1.0, "seed": 0, "churn_range": 0.5},
            ValueError,
            r"churn_range: expected a pair .*\(low, high\), got 0.5",
        ),
        ({"churn": 1.0, "seed": 0.5}, TypeError, "seed must be an int"),
    ],
)
def test_churn_is_checked(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        edm_sample(answer, Z, karras_schedule(4), **options)


@pytest.mark.parametrize("name", LEAPING)
def test_keys_of_consistency_samplers_are_checked(name: str) -> None:
    with pytest.raises(TypeError, match="seed must be an int"):
        call(name, seed=0.5)
    with pytest.raises(TypeError, match="sample_id must be an int"):
        call(name, sample_id="a")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask": [True]}, TypeError, "mask: expected a bool tensor, got a list of 1"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, ValueError, r"mask: expected a shape that broadcasts to \(2, 3\)"),
        ({"mask": torch.ones(4, 2, 3, dtype=torch.bool)}, ValueError, r"mask: .* got \(4, 2, 3\)"),
        ({"sigmas": 0.5}, TypeError, "sigmas: expected noise levels, got 0.5"),
        ({"sigmas": ["a"]}, TypeError, "sigmas: expected noise levels, got a list of 1"),
        ({"seed": 0.5}, TypeError, "seed must be an int"),
    ],
)
def test_sign_masked_is_checked(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call("sign_masked", **options)


def test_sign_recursive_counts_in_integers() -> None:
    with pytest.raises(TypeError, match=r"steps: expected an integer, got 2.0 \(float\)"):
        sign_recursive(answer, Z, steps=2.0)
    assert torch.equal(sign_masked(answer, Z, torch.tensor([0.5]), seed=0), sign_masked(answer, Z, [0.5], seed=0))


@pytest.mark.parametrize("name", SCHEDULED)
def test_signatures_name_every_option(name: str) -> None:
    parameters = inspect.signature(SCHEDULED[name]).parameters
    assert not [p for p in parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    options = LeapOptions if name in LEAPING else Options
    assert typing.get_args(options) == () and options.__annotations__.keys() <= parameters.keys()
    for option in options.__annotations__:
        assert parameters[option].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[option].default is not inspect.Parameter.empty
    assert list(parameters)[:3] == ["model", "x" if name in LEAPING else "z", "schedule"]
    assert SCHEDULED[name].__name__ == name and SCHEDULED[name].__doc__


def test_defaults_of_the_signatures_are_those_that_count() -> None:
    def model(z: Tensor, *_: Any) -> Tensor:
        return 0.1 * z

    given = {n: p.default for n, p in inspect.signature(ddim_sample).parameters.items() if n in Options.__annotations__}
    assert torch.equal(ddim_sample(model, Z, SCHEDULE), ddim_sample(model, Z, SCHEDULE, **given))
    given = {
        n: p.default
        for n, p in inspect.signature(consistency_sample).parameters.items()
        if n in LeapOptions.__annotations__
    }
    zigzag = PRESETS["cifar10-zigzag"]
    assert torch.equal(consistency_sample(model, Z, zigzag), consistency_sample(model, Z, zigzag, **given))


def test_what_stands_behind_the_options_is_exported_and_documented() -> None:
    for name in ("Options", "LeapOptions", "StepInfo", "LeapInfo", "Evaluation", "Shift"):
        assert name in bicm_diffusion.__all__ and getattr(bicm_diffusion, name).__doc__
    for option in Options.__annotations__:
        assert f"{option}:" in (Options.__doc__ or "")
    for option in LeapOptions.__annotations__:
        assert option in (LeapOptions.__doc__ or "")


def test_positional_mistakes_name_the_sampler() -> None:
    with pytest.raises(TypeError, match=r"ddim_sample\(\) missing 1 required positional argument: 'schedule'"):
        ddim_sample(answer, Z)
    with pytest.raises(TypeError, match=r"bdia_sample\(\) takes 3 positional arguments but 4 were given"):
        bdia_sample(answer, Z, SCHEDULE, 0.9)


def test_errors_of_a_model_are_its_own() -> None:
    def broken(z: Tensor, times: Tensor) -> Tensor:
        raise RuntimeError("no kernel")

    with pytest.raises(RuntimeError, match="no kernel"):
        bdia_sample(broken, Z, SCHEDULE)
