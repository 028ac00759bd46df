"""What BDIADDIMScheduler retraces, here and in another process, and what it refuses to."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="needs the extra [diffusers]")

from bicm_diffusion import ExactPair, RetraceWarning, StatePair, bdia_sample, load_pair, save_pair, vp_schedule
from bicm_diffusion.adapters.diffusers import BDIADDIMScheduler
from tests.support.diffusers_cases import network

each_kind = pytest.mark.parametrize("exact", [True, False])
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).mul(256).round() / 256  # on the grid


def model(x: Tensor, t: Any) -> Tensor:
    return network(x, int(t) // 100)


def run(scheduler: Any, x: Tensor, model: Any = model) -> Tensor:
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x).prev_sample
    return x


def loop(scheduler: Any, x: Tensor, steps: int = 8, model: Any = model, **options: Any) -> Tensor:
    """As a pipeline runs a scheduler, which copies what a loop starts from."""
    scheduler.set_timesteps(steps, **options)
    return run(scheduler, x * 1.0, model)


def made(exact: bool, steps: int = 8, **config: Any) -> tuple[Any, Any]:
    scheduler = BDIADDIMScheduler(exact=exact, **config)
    loop(scheduler, X, steps)
    return scheduler, scheduler.pair


@each_kind
@pytest.mark.parametrize("gamma", [1.0, 0.75])
def test_a_stored_pair_is_retraced_by_another_scheduler(exact: bool, gamma: float, tmp_path: Path) -> None:
    scheduler, pair = made(exact, gamma=gamma)
    assert type(pair) is (ExactPair if exact else StatePair)
    save_pair(pair, tmp_path / "pair.safetensors")
    buffer = io.BytesIO()
    torch.save(pair, buffer)
    buffer.seek(0)
    expected = loop(scheduler, scheduler.turn_round())
    for stored in (load_pair(tmp_path / "pair.safetensors"), torch.load(buffer, weights_only=True), pair):
        other = BDIADDIMScheduler(exact=exact, gamma=gamma)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            back = loop(other, other.turn_round(stored))
        assert torch.equal(back, expected)
        assert torch.equal(back, X) if exact else (back - X).abs().max() < 1e-2
        # And on, the first way again.
        there = loop(other, other.turn_round())
        assert torch.equal(there, pair.z) if exact else (there - pair.z).abs().max() < 1e-2


@each_kind
def test_another_configuration_is_refused(exact: bool) -> None:
    _, pair = made(exact, gamma=0.75)
    for config, message in (
        ({"gamma": 0.5}, "gamma: expected (3/4 = )?0.75, which the pair pair was made with"),
        ({"gamma": 0.75, "prediction_type": "v_prediction"}, "prediction_type: expected 'epsilon'"),
    ):
        with pytest.raises(ValueError, match=message):
            BDIADDIMScheduler(exact=exact, **config).turn_round(pair)
    for config, message in (
        ({"beta_schedule": "scaled_linear"}, r"scheduler: expected alphas_cumprod\[\d+\] = "),
        ({"timestep_spacing": "trailing"}, r"scheduler: expected alphas_cumprod\[\d+\] = "),
    ):
        scheduler = BDIADDIMScheduler(exact=exact, gamma=0.75, **config)
        scheduler.turn_round(pair)
        with pytest.raises(ValueError, match=message):
            scheduler.set_timesteps(8)
    scheduler = BDIADDIMScheduler(exact=exact, gamma=0.75)
    scheduler.turn_round(pair)
    with pytest.raises(ValueError, match="num_inference_steps: expected 8, as the pair was made in, got 9"):
        scheduler.set_timesteps(9)


@each_kind
def test_the_scheduler_s_own_loop_is_refused_with_other_steps(exact: bool) -> None:
    for retrace in (lambda s, z: s.turn_round() is None, lambda s, z: {"inverse": True, "last_sample": z}):
        scheduler = BDIADDIMScheduler(exact=exact)
        z = loop(scheduler, X)
        options = retrace(scheduler, z) or {}
        with pytest.raises(ValueError, match="num_inference_steps: expected 8"):
            scheduler.set_timesteps(9, **options)


@each_kind
def test_what_is_no_pair_of_a_scheduler_is_refused(exact: bool) -> None:
    scheduler = BDIADDIMScheduler(exact=exact)
    kind = "ExactPair" if exact else "StatePair"
    with pytest.raises(TypeError, match=rf"pair: expected a scheduler's {kind} .* got a torch.float32 tensor"):
        scheduler.turn_round(X)
    with pytest.raises(TypeError, match=rf"pair: expected a scheduler's {kind} with exact={exact}, got an? "):
        scheduler.turn_round(made(not exact)[1])
    theirs = bdia_sample(lambda z, t: 0.1 * z, X, vp_schedule(8), exact=exact)
    with pytest.raises(ValueError, match="pair: turn_round expected a pair of BDIADDIMScheduler, got one of BDIA"):
        scheduler.turn_round(theirs)
    if not exact:
        with pytest.raises(ValueError, match="without a record of its settings"):
            scheduler.turn_round(StatePair(X, X))


@each_kind
def test_a_pair_is_no_sample(exact: bool) -> None:
    scheduler, pair = made(exact)
    scheduler.set_timesteps(8)
    with pytest.raises(TypeError, match=r"sample: expected a tensor, got an? \w+Pair; turn_round\(pair\) takes a pair"):
        scheduler.step(X, scheduler.timesteps[0], pair)
    with pytest.raises(TypeError, match="last_sample: expected a tensor, got"):
        scheduler.set_timesteps(8, inverse=True, last_sample=pair)


@each_kind
def test_the_inner_state_alone_is_refused(exact: bool) -> None:
    scheduler, pair = made(exact)
    inner = pair.previous
    for other in (scheduler, BDIADDIMScheduler(exact=exact)):
        for options in ({}, {"inverse": True}):
            with pytest.raises(ValueError, match="sample: got the inner state of a pair, from which"):
                loop(other, inner, **options)
    del inner, pair
    loop(BDIADDIMScheduler(exact=exact), X)
    scheduler, pair = made(exact)
    scheduler.set_timesteps(8, inverse=True, last_sample=pair.z)
    with pytest.raises(ValueError, match="sample: expected the inner state of the pair, got the one that is its last"):
        run(scheduler, pair.z)


@each_kind
def test_one_state_in_place_of_the_pair_is_noticed(exact: bool) -> None:
    scheduler = BDIADDIMScheduler(exact=exact)
    z = loop(scheduler, X)
    scheduler.set_timesteps(8, inverse=True)
    with pytest.warns(RetraceWarning, match="sample: step got one state of a pair") as caught:
        run(scheduler, z)
    assert caught[0].filename == __file__


def test_a_state_from_the_middle_of_a_loop_is_no_pair_s() -> None:
    scheduler = BDIADDIMScheduler()
    scheduler.set_timesteps(8)
    t = scheduler.timesteps[0]
    x = scheduler.step(model(X, t), t, X).prev_sample
    with pytest.raises(ValueError, match="last_sample: expected a state that a loop ended in"):
        scheduler.set_timesteps(8, inverse=True, last_sample=x)
    with pytest.raises(ValueError, match="pair: expected the end of a loop, no loop was run"):
        _ = BDIADDIMScheduler().pair
    scheduler.set_timesteps(8)
    scheduler.step(model(X, t), t, X)
    with pytest.raises(ValueError, match="pair: expected the end of a loop, 7 steps are left"):
        _ = scheduler.pair


def dropping(x: Tensor, t: Any) -> Tensor:
    return torch.nn.functional.dropout(model(x, t), 0.1)


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize(("there", "back"), [(dropping, dropping), (model, lambda x, t: 1.01 * model(x, t))])
def test_what_does_not_come_back_is_reported_with_its_likely_causes(stored: bool, there: Any, back: Any) -> None:
    scheduler = BDIADDIMScheduler(exact=True)
    loop(scheduler, X, model=there)
    other = BDIADDIMScheduler(exact=True) if stored else scheduler
    inner = other.turn_round(scheduler.pair if stored else None)
    with pytest.warns(RetraceWarning, match=r"2 of 2 samples .* another network .* dropout .* not determ") as caught:
        loop(other, inner, model=back)
    assert caught[0].filename == __file__


def test_an_edit_that_is_announced_is_silent() -> None:
    scheduler = BDIADDIMScheduler(exact=True)
    loop(scheduler, X)
    inner = scheduler.turn_round(edit=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edited = loop(scheduler, inner, model=lambda x, t: 1.01 * model(x, t))
    assert not torch.equal(edited, X)
    inner = scheduler.turn_round()  # for the next loop only
    with pytest.warns(RetraceWarning, match="did not return"):
        loop(scheduler, inner)


def test_what_was_changed_since_set_timesteps_is_refused() -> None:
    def timesteps(scheduler: Any) -> None:
        scheduler.timesteps[1] += 1

    def alphas(scheduler: Any) -> None:
        scheduler.alphas_cumprod.mul_(0.99)

    def config(scheduler: Any) -> None:
        scheduler.register_to_config(gamma=0.5)

    for name, change in (("timesteps", timesteps), ("alphas_cumprod", alphas), ("config", config)):
        scheduler = BDIADDIMScheduler()
        scheduler.set_timesteps(8)
        change(scheduler)
        with pytest.raises(ValueError, match=f"{name}: expected .* changed since"):
            run(scheduler, X)
        loop(scheduler, X)
