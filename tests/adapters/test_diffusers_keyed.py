"""Keyed noise of accelerated schedulers, and the input of the next evaluation that a step makes ahead."""

from __future__ import annotations

import copy
import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="needs the extra [diffusers]")

from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    TCDScheduler,
)

import bicm_kernels as bk
from bicm_diffusion.adapters.diffusers import accelerate_scheduler
from tests.support.diffusers_cases import made, model_input
from tests.support.diffusers_observed import both, label

SHAPE = (2, 4, 32, 32)
SDE = {"algorithm_type": "sde-dpmsolver++"}
#: A scheduler's class, its configuration, and the arguments with which a step draws.
DRAWING: list[tuple[type[Any], dict[str, Any], dict[str, Any]]] = [
    (DDIMScheduler, {}, {"eta": 1.0}),
    (EulerDiscreteScheduler, {}, {"s_churn": 10.0}),
    (EDMEulerScheduler, {}, {"s_churn": 10.0}),
    (EDMDPMSolverMultistepScheduler, SDE, {}),
    (DPMSolverMultistepScheduler, SDE, {}),
    (CMStochasticIterativeScheduler, {}, {}),
    (LCMScheduler, {}, {}),
    (FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}, {}),
    (EulerAncestralDiscreteScheduler, {}, {}),
    (DDPMScheduler, {}, {}),
    (TCDScheduler, {}, {}),
    (DPMSolverSinglestepScheduler, SDE, {}),
    (FlowMatchHeunDiscreteScheduler, {}, {"s_churn": 10.0}),
    (KDPM2AncestralDiscreteScheduler, {}, {}),
]
FORESEEING = [
    LMSDiscreteScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    EDMEulerScheduler,
    EDMDPMSolverMultistepScheduler,
    CMStochasticIterativeScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
]


def keyed(cls: type[Any], config: dict[str, Any], seed: int | None = None, **options: Any) -> Any:
    scheduler = accelerate_scheduler(made(cls, **config), noise="keyed", seed=seed, **options)
    scheduler.set_timesteps(6)
    return scheduler


def run(scheduler: Any, x: Tensor, arguments: dict[str, Any], steps: int = 4, **more: Any) -> list[Tensor]:
    """The states of a loop whose network answers zero."""
    states = []
    for t in scheduler.timesteps[:steps]:
        model_input(scheduler, x, t)
        x = scheduler.step(torch.zeros_like(x), t, x, **arguments, **more).prev_sample
        states.append(x)
    return states


def warned(caught: list[warnings.WarningMessage], text: str) -> int:
    return sum(text in str(w.message) for w in caught)


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize(("cls", "config", "arguments"), DRAWING, ids=label)
def test_noise_does_not_repeat_the_latents(
    cls: type[Any], config: dict[str, Any], arguments: dict[str, Any], seed: int
) -> None:
    """Both the state and the network's answer are zero: what a step returns is fresh noise alone."""
    latents = [bk.normal(SHAPE, seed=seed, step=step) for step in (*range(6), 999, 833, 666, 500)]
    generators: list[dict[str, Any]] = [{}, {"generator": torch.Generator().manual_seed(seed)}]
    for more in generators:
        states = run(keyed(cls, config, seed), torch.zeros(SHAPE), arguments, **more)
        fresh = [x for x in states if x.std() > 0]
        assert fresh
        for x in fresh:
            for latent in latents:
                assert torch.corrcoef(torch.stack([x.flatten(), latent.flatten()]))[0, 1].abs() < 0.1


@pytest.mark.parametrize("cls", [EulerDiscreteScheduler, EDMEulerScheduler], ids=label)
def test_churn_adds_up_as_independent_noise_does(cls: type[Any]) -> None:
    """Latents of deviation sigma, lifted by sqrt(2), have the deviation sqrt(2) sigma; the same noise again gave more.

    A network that answers zero leaves Euler's state where churn put it, and EDM's at a multiple of it.
    """
    scheduler = keyed(cls, {"prediction_type": "epsilon"}, 0)
    sigma = float(scheduler.sigmas[0])
    x = sigma * bk.normal((8, 4, 64, 64), seed=0)
    t = scheduler.timesteps[0]
    model_input(scheduler, x, t)
    lift = math.sqrt(2.0) - 1.0  # what churn is bounded by
    raised = sigma * (1.0 + lift)
    output = torch.zeros_like(x)
    got = scheduler.step(output, t, x, s_churn=1e6).prev_sample
    gain = 1.0
    if cls is EDMEulerScheduler:
        data, below = scheduler.config.sigma_data, float(scheduler.sigmas[1])
        kept = data**2 / (raised**2 + data**2)
        gain = 1.0 + (below - raised) / raised * (1.0 - kept)
    assert got.std().item() / gain == pytest.approx(math.sqrt(2.0) * sigma, rel=0.01)


@pytest.mark.parametrize("cls", FORESEEING, ids=label)
def test_gradients_of_an_input_made_ahead(cls: type[Any]) -> None:
    gradients = []
    for scheduler in both(cls, {}):
        torch.manual_seed(0)
        x = torch.linspace(-2.0, 2.0, 96).reshape(2, 3, 4, 4)
        t, following = scheduler.timesteps[:2]
        x = scheduler.step(0.1 * model_input(scheduler, x, t), t, x).prev_sample.requires_grad_()
        scaled = model_input(scheduler, x, following)
        gradients.append(torch.autograd.grad((3 * scaled).sum() + x.sum(), x)[0])
    torch.testing.assert_close(gradients[1], gradients[0])
    assert not torch.allclose(gradients[0], torch.ones(()))


@pytest.mark.parametrize(("cls", "config", "arguments"), DRAWING, ids=label)
def test_gradients_through_a_whole_step(cls: type[Any], config: dict[str, Any], arguments: dict[str, Any]) -> None:
    gradients = []
    for scheduler in both(cls, config):
        torch.manual_seed(0)
        first = x = torch.linspace(-2.0, 2.0, 96).reshape(2, 3, 4, 4).requires_grad_()
        for t in scheduler.timesteps[:2]:
            x = scheduler.step(0.1 * model_input(scheduler, x, t), t, x, **arguments).prev_sample
        gradients.append(torch.autograd.grad(x.square().sum(), first)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4 * gradients[0].abs().max().item())


@pytest.mark.parametrize(("cls", "config", "arguments"), DRAWING, ids=label)
def test_every_run_has_noise_of_its_own(cls: type[Any], config: dict[str, Any], arguments: dict[str, Any]) -> None:
    """Without a seed two runs differ, torch's seed governs both, and nothing is warned of."""
    ends = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(2):
            torch.manual_seed(0)
            scheduler = keyed(cls, config)
            for _ in range(2):
                scheduler.set_timesteps(6)
                ends.append(run(scheduler, torch.zeros(SHAPE), arguments)[-1])
    assert torch.equal(ends[0], ends[2]) and torch.equal(ends[1], ends[3])
    assert not torch.equal(ends[0], ends[1])


@pytest.mark.parametrize(("cls", "config", "arguments"), DRAWING, ids=label)
def test_noise_that_repeats_is_warned_of_once(
    cls: type[Any], config: dict[str, Any], arguments: dict[str, Any]
) -> None:
    scheduler = keyed(cls, config, 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = run(scheduler, torch.zeros(SHAPE), arguments, 2)
        assert not warned(caught, "is drawn again")
        for _ in range(2):
            scheduler.set_timesteps(6)
            assert torch.equal(run(scheduler, torch.zeros(SHAPE), arguments, 2)[1], first[1])
        assert warned(caught, "is drawn again") == 1
        for _ in range(2):
            scheduler.set_timesteps(6)
            run(scheduler, torch.zeros(SHAPE), arguments, 4)  # further steps are the same matter
    assert warned(caught, "is drawn again") == 1


def test_what_is_ignored_or_lost_is_said() -> None:
    with pytest.warns(UserWarning, match="seed: ignored with noise='generator'"):
        accelerate_scheduler(LCMScheduler(), seed=3)
    ours = accelerate_scheduler(LCMScheduler(), noise="keyed", seed=3)
    with pytest.warns(UserWarning, match="neither noise='keyed' nor seed"):
        type(ours).from_config(ours.config)


@pytest.mark.parametrize("cls", FORESEEING, ids=label)
def test_foresee_false_sees_every_write(cls: type[Any]) -> None:
    for write in (lambda x: x.data.mul_(0.5), lambda x: x.numpy().__imul__(0.5)):
        ours, ahead = (accelerate_scheduler(made(cls), foresee=foresee) for foresee in (False, True))
        inputs = []
        for scheduler in (ours, ahead):
            scheduler.set_timesteps(6)
            torch.manual_seed(0)
            t, following = scheduler.timesteps[:2]
            x = torch.ones(SHAPE)
            x = scheduler.step(0.1 * model_input(scheduler, x, t), t, x).prev_sample
            write(x)
            inputs.append((model_input(scheduler, x, following), x))
        expected = both(cls, {})[0]
        expected.step(x, t, x)
        torch.testing.assert_close(inputs[0][0], model_input(expected, inputs[0][1], following))
        # What the switch is for.
        assert not torch.allclose(inputs[1][0], inputs[0][0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cls", FORESEEING, ids=label)
def test_an_input_made_ahead_has_the_bits_of_one_made_when_it_is_needed(cls: type[Any], dtype: torch.dtype) -> None:
    scheduler = accelerate_scheduler(made(cls))
    scheduler.set_timesteps(6)
    x = torch.linspace(-2.0, 2.0, torch.Size(SHAPE).numel()).reshape(SHAPE).to(dtype)
    torch.manual_seed(0)
    for t in scheduler.timesteps[:4]:
        # Another tensor: no input was made for it.
        expected = model_input(copy.deepcopy(scheduler), x.clone(), t)
        found = model_input(scheduler, x, t)
        assert torch.equal(found, expected)
        x = scheduler.step((0.1 * found).to(dtype), t, x).prev_sample


def test_two_threads_share_a_scheduler_and_its_lists_of_generators() -> None:
    scheduler = keyed(DDIMScheduler, {"clip_sample": False})
    t, x = scheduler.timesteps[0], torch.zeros(2, 1, 4, 4)

    def step(seed: int) -> Tensor:
        generators = [torch.Generator().manual_seed(seed + k) for k in range(2)]
        return scheduler.step(x, t, x, eta=1.0, generator=generators).prev_sample

    expected = {seed: step(seed) for seed in (10, 20)}

    def many(seed: int) -> bool:
        return all(torch.equal(step(seed), expected[seed]) for _ in range(400))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(many, (10, 20)))


def test_another_thread_s_seeds_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if another thread replaced what is kept just before it is read."""
    scheduler = keyed(DDIMScheduler, {"clip_sample": False})
    t, x = scheduler.timesteps[0], torch.zeros(2, 1, 4, 4)

    def step() -> Tensor:
        generators = [torch.Generator().manual_seed(10 + k) for k in range(2)]
        return scheduler.step(x, t, x, eta=1.0, generator=generators).prev_sample

    expected = step()
    others = (20, 21), torch.tensor([1, 2])
    monkeypatch.setattr(type(scheduler), "_seeds", property(lambda _: others, lambda _, value: None))
    assert torch.equal(step(), expected)


def test_a_sample_with_a_generator_of_its_own_has_the_same_noise_alone() -> None:
    ours = accelerate_scheduler(DDIMScheduler(), noise="keyed", sample_id=5)
    ours.set_timesteps(4)
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), ours.timesteps[0]
    own = [torch.Generator().manual_seed(k) for k in (3, 4)]
    together = ours.step(x, t, x, eta=1.0, generator=own).prev_sample
    for k in range(2):
        alone = ours.step(x[k : k + 1], t, x[k : k + 1], eta=1.0, generator=own[k : k + 1]).prev_sample
        assert torch.equal(alone, together[k : k + 1])
