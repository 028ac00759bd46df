"""Accelerated diffusers schedulers on a GPU: beside the originals there, without waiting, captured and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("diffusers", reason="needs the extra [diffusers]")

from diffusers import DDIMScheduler

from bicm_kernels import backend
from tests.support.diffusers_cases import (
    CASES,
    DEFAULTS,
    Case,
    assert_near_float64,
    generator,
    model_input,
    name_of,
    pair,
    signature,
    start,
    trajectory,
)

pytestmark = pytest.mark.gpu

SameBits = Callable[[Tensor, Tensor], None]
STEPS = 20


def loop(scheduler: Any, x: Tensor, **arguments: Any) -> Tensor:
    """A loop whose network has nothing that a compiler could round otherwise."""
    for t in scheduler.timesteps:
        output = model_input(scheduler, x, t).clamp(-1.0, 1.0)
        x = scheduler.step(output, t, x, **arguments).prev_sample
    return x


def begun(case: Case, **options: Any) -> tuple[Any, Tensor]:
    """An accelerated scheduler at its first step, and a state."""
    ours = pair(case, "cuda", **options)[1]
    ours.set_timesteps(STEPS, device="cuda")
    return ours, start(ours, torch.float32).cuda()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_no_further_from_float64_than_twice_the_original(gpu_backend: str, case: Case, dtype: torch.dtype) -> None:
    assert_near_float64(case, dtype, "cuda")


@pytest.mark.parametrize("noise", ["generator", "keyed"])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_step_waits_for_nothing(gpu_backend: str, case: Case, noise: str, request: pytest.FixtureRequest) -> None:
    ours, x = begun(case, noise=noise)
    arguments = dict(case[2])
    if noise == "generator" and "generator" in signature(ours):
        arguments["generator"] = generator(5, "cuda")
    loop(ours, x, **arguments)
    ours.set_timesteps(STEPS, device="cuda")
    request.getfixturevalue("no_synchronisation")
    loop(ours, x, **arguments)


@pytest.mark.parametrize("place", ["cpu", "cuda"])
@pytest.mark.parametrize("case", DEFAULTS, ids=name_of)
def test_generators_draw_as_they_would_for_the_original(gpu_backend: str, case: Case, place: str) -> None:
    original, ours = pair(case, "cuda")
    if "generator" not in signature(original):
        pytest.skip("draws nothing")
    arguments = {"eta": 1.0} if case[0] is DDIMScheduler else {}
    x = start(original, torch.float32).cuda()
    ends, states = [], []
    for scheduler in (original, ours):
        generators = [generator(7, place), generator(8, place)]
        ends.append(trajectory(scheduler, x, generator=generators, **arguments))
        states.append([g.get_state() for g in generators])
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-4 * ends[0].abs().max().item())
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


@pytest.mark.parametrize("case", DEFAULTS, ids=name_of)
def test_keyed_noise_is_the_cpu_s(gpu_backend: str, same_bits: SameBits, case: Case) -> None:
    ours, x = begun(case, noise="keyed", seed=3)
    there = pair(case, "cpu", noise="keyed", seed=3)[1]
    there.set_timesteps(STEPS)
    result = loop(ours, x).cpu()
    with backend.use("native"):  # Triton, where it is forced, has no kernels for the CPU
        same_bits(result, loop(there, x.cpu()))


@pytest.mark.parametrize("case", DEFAULTS, ids=name_of)
def test_captured(gpu_backend: str, same_bits: SameBits, case: Case) -> None:
    ours, x = begun(case, noise="keyed", seed=3)
    expected = loop(ours, x)
    ours.set_timesteps(STEPS, device="cuda")
    other = x.flip(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loop(ours, other)
    other.copy_(x)
    graph.replay()
    same_bits(captured.cpu(), expected.cpu())


@pytest.mark.slow
@pytest.mark.parametrize("case", DEFAULTS, ids=name_of)
def test_twenty_steps_compile(gpu_backend: str, same_bits: SameBits, case: Case) -> None:
    ours, x = begun(case, noise="keyed", seed=3)
    expected = loop(ours, x)
    ours.set_timesteps(STEPS, device="cuda")
    torch.compiler.reset()
    same_bits(torch.compile(lambda z: loop(ours, z), fullgraph=True)(x).cpu(), expected.cpu())
