"""Accelerated diffusers schedulers under `torch.compile`: a loop in one graph, and one step's graph for all steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="needs the extra [diffusers]")

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    TCDScheduler,
)
from torch._dynamo.testing import CompileCounterWithBackend

from bicm_diffusion.adapters.diffusers import accelerate_scheduler
from tests.support.diffusers_cases import CLASSES, made, model_input, start

STEPS = 20
#: torch.compile gives up at the ninth graph of a function.
MOST_GRAPHS = 8


def three(cls: type[Any], **config: Any) -> tuple[Any, Any, Tensor]:
    """Two accelerated schedulers of one kind, their timesteps set, and a state to begin with."""
    eager, compiled = (accelerate_scheduler(made(cls, **config), noise="keyed", seed=3) for _ in range(2))
    for scheduler in (eager, compiled):
        scheduler.set_timesteps(STEPS)
    torch.compiler.reset()
    return eager, compiled, start(eager, torch.float32, (2, 4, 8, 8))


def loop(scheduler: Any, x: Tensor, step: Callable[..., Any]) -> Tensor:
    for t in scheduler.timesteps:
        x = step(torch.tanh(model_input(scheduler, x, t)), t, x).prev_sample
    return x


@pytest.mark.slow
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_twenty_steps_are_one_graph(cls: type[Any]) -> None:
    eager, compiled, x = three(cls)
    counter = CompileCounterWithBackend("eager")
    whole = torch.compile(lambda z: loop(compiled, z, compiled.step), fullgraph=True, backend=counter)
    assert torch.equal(whole(x), loop(eager, x, eager.step)) and counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "config"),
    [
        *((cls, {}) for cls in CLASSES),
        (DPMSolverMultistepScheduler, {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}),
        (FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else "-".join(map(str, x.values())),
)
def test_a_compiled_step_serves_every_step(cls: type[Any], config: dict[str, Any]) -> None:
    """Few graphs are made: for the first steps, for any other one and for the last."""
    eager, compiled, x = three(cls, **config)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(compiled.step, fullgraph=True, backend=counter)
    assert torch.equal(loop(compiled, x, step), loop(eager, x, eager.step)) and counter.frame_count <= MOST_GRAPHS


@pytest.mark.slow
def test_a_step_compiled_by_inductor() -> None:
    eager, compiled, x = three(DDIMScheduler)
    step = torch.compile(compiled.step, fullgraph=True)
    assert torch.equal(loop(compiled, x, step), loop(eager, x, eager.step))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_graph_of_ddpm_draws_as_the_original_does(backend: str) -> None:
    """Its last step draws nothing."""
    original, ends = made(DDPMScheduler), []
    compiled = accelerate_scheduler(original)
    torch.compiler.reset()
    for scheduler in (original, compiled):
        scheduler.set_timesteps(4)
        torch.manual_seed(0)

        def run(z: Tensor, scheduler: Any = scheduler) -> Tensor:
            return loop(scheduler, z, scheduler.step)

        steps = run if scheduler is original else torch.compile(run, fullgraph=True, backend=backend)
        ends.append((steps(start(original, torch.float32, (2, 4, 8, 8))), torch.get_rng_state()))
    torch.testing.assert_close(ends[1][0], ends[0][0])
    assert torch.equal(ends[1][1], ends[0][1])


@pytest.mark.slow
def test_an_eta_that_one_step_had_before() -> None:
    eager, compiled, x = three(TCDScheduler)
    counter = CompileCounterWithBackend("eager")
    compiled.step(x, compiled.timesteps[0], x, eta=0.7)  # its weights are made on the host
    compiled.set_timesteps(STEPS)

    def steps(scheduler: Any) -> Callable[..., Any]:
        return lambda output, t, z: scheduler.step(output, t, z, eta=0.7)

    whole = torch.compile(lambda z: loop(compiled, z, steps(compiled)), fullgraph=True, backend=counter)
    assert torch.equal(whole(x), loop(eager, x, steps(eager))) and counter.frame_count == 1
