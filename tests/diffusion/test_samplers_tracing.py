"""Every sampler's loop traces whole, gives the bits of the eager loop, and serves other schedules in the same graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from bicm_diffusion import (
    ExactPair,
    Preconditioned,
    Schedule,
    Shift,
    ancestral_sample,
    bdia_edit,
    bdia_invert,
    bdia_sample,
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
from tests.support.closed_forms import network, noise

WIDTH, STEPS = 6, 3
MODEL = network(WIDTH)
GAMMAS = torch.tensor([1.0, 0.96, 0.5])
FRACTIONS = (torch.tensor([1, 24, 1]), torch.tensor([1, 25, 2]))

Body = Callable[[Tensor, Schedule], Any]


def pair(z: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    return MODEL(z, times), MODEL(z, times, shift=0.5)


def idempotent(x: Tensor) -> Tensor:
    return torch.tanh(x)


def floats(sampler: Any, **options: Any) -> Body:
    return lambda z, schedule: tuple(sampler(MODEL, z, schedule, exact=False, **options))


def exact(sampler: Any, **options: Any) -> Body:
    return lambda z, schedule: sampler(MODEL, z, schedule, **options)


BODIES: dict[str, Body] = {
    "ddim_sample": lambda z, s: ddim_sample(MODEL, z, s),
    "ddim_sample guided": lambda z, s: ddim_sample(pair, z, s, guidance_scale=1.5),
    "ddim_sample raw": lambda z, s: ddim_sample(MODEL, z, s, prediction=Preconditioned("bcm")),
    "ddim_sample with a guide": lambda z, s: ddim_sample(MODEL, z, s, guide=lambda at: at.x0.clamp(-1.0, 1.0)),
    "ancestral_sample": lambda z, s: ancestral_sample(MODEL, z, s, guide=lambda at: Shift(at.z, 0.1)),
    "ddim_invert": lambda z, s: ddim_invert(MODEL, z, s, prediction="v"),
    "edm_sample euler": lambda z, s: edm_sample(MODEL, z, s, solver="euler", prediction="x0"),
    "edm_sample heun": lambda z, s: edm_sample(MODEL, z, s, prediction=Preconditioned()),
    "bdia_sample floats": floats(bdia_sample, gamma=0.9),
    "bdia_invert floats, gamma per sample": floats(bdia_invert, gamma=GAMMAS),
    "bdia_sample heun floats": floats(bdia_sample, gamma=0.9, increments="heun"),
    "obelm_sample floats": floats(obelm_sample),
    "edict_sample floats": floats(edict_sample),
    "edict_invert floats": floats(edict_invert),
    "bdia_sample": exact(bdia_sample, gamma=0.9),
    "bdia_sample with a guide": exact(bdia_sample, gamma=0.9, guide=lambda at: Shift(at.x0, 0.1)),
    "bdia_invert": exact(bdia_invert, gamma=0.9, prediction=Preconditioned()),
    "bdia_sample heun, gamma per sample": exact(bdia_sample, gamma=FRACTIONS, increments="heun"),
    "bdia_edit": exact(bdia_edit, gamma=0.9, source={"shift": 0.0}, target={"shift": 0.5}),
    "obelm_sample": exact(obelm_sample),
    "obelm_invert": exact(obelm_invert),
    "edict_sample": exact(edict_sample),
    "edict_invert": exact(edict_invert),
    "edict_sample leapfrog": exact(edict_sample, leapfrog=True),
    "edict_invert leapfrog floats": floats(edict_invert, leapfrog=True, prediction=Preconditioned()),
    "edm_invert heun": lambda z, s: edm_invert(MODEL, z, s, prediction="v"),
    "edm_invert euler": lambda z, s: edm_invert(MODEL, z, s, solver="euler"),
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def opened(result: Any) -> tuple[Tensor, ...]:
    if isinstance(result, ExactPair):
        return result.q, result.previous_q, result.info, result.overflow, result.z
    return (result,) if isinstance(result, Tensor) else tuple(result)


def compare(one: Any, other: Any) -> None:
    for x, y in zip(opened(one), opened(other), strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


@pytest.mark.parametrize("name", BODIES)
def test_one_graph_serves_every_schedule(name: str) -> None:
    body, counter = BODIES[name], CompileCounterWithBackend("eager")
    fast = torch.compile(body, fullgraph=True, backend=counter)
    z = noise(3, WIDTH, dtype=torch.float32)
    for final_time in (0.01, 0.05, 0.1):
        schedule = vp_schedule(STEPS, final_time=final_time)
        compare(fast(z, schedule), body(z, schedule))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["ddim_sample", "bdia_sample floats", "bdia_sample", "edict_sample"])
def test_graphs_of_the_ahead_of_time_compiler(name: str) -> None:
    z, schedule = noise(3, WIDTH, dtype=torch.float32), vp_schedule(STEPS)
    fast = torch.compile(BODIES[name], fullgraph=True, backend="aot_eager")
    compare(fast(z, schedule), BODIES[name](z, schedule))


def test_noise_on_the_way_is_traced_too() -> None:
    z, schedule = noise(3, WIDTH, dtype=torch.float32), karras_schedule(STEPS)

    def churned(z: Tensor, seed: Tensor) -> Tensor:
        return edm_sample(MODEL, z, schedule, churn=2.0, seed=seed)

    fast = torch.compile(churned, fullgraph=True, backend="aot_eager")
    for seed in (1, 2):
        compare(fast(z, torch.tensor(seed)), churned(z, torch.tensor(seed)))


def test_samplers_without_times_trace() -> None:
    z = noise(3, WIDTH, dtype=torch.float32)
    for body in (
        partial(sign_recursive, idempotent, steps=2),
        partial(sign_masked, idempotent, sigmas=[0.5, 0.1], mask=z > 0, seed=3),
    ):
        torch._dynamo.reset()
        compare(torch.compile(body, fullgraph=True, backend="aot_eager")(z), body(z))


def test_a_traced_loop_leaves_the_check_to_its_caller() -> None:
    def model(z: Tensor, times: Tensor) -> Tensor:
        return z / (z - z)

    z, schedule = noise(2, WIDTH, dtype=torch.float32), vp_schedule(STEPS)
    result = torch.compile(lambda z: bdia_sample(model, z, schedule), fullgraph=True, backend="eager")(z)
    assert isinstance(result, ExactPair)
    with pytest.raises(OverflowError, match="sample 0 left the range"):
        result.check()
