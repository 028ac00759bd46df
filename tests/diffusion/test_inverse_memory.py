"""No solver holds more at once than its algorithm written plainly; what autograd saves is counted too."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from bicm_diffusion import Preconditioned
from bicm_diffusion.inverse import cm_inversion_sample
from tests.support.closed_forms import noise
from tests.support.held_memory import most, state_bytes
from tests.support.inverse_problems import (
    LEVELS,
    SCHEDULE,
    SOLVERS,
    STD,
    clean,
    extras,
    jump,
    plain,
    plain_inversion,
    problem,
    wide,
)

SHAPE = (4, 3, 16, 16)


def test_the_count_sees_what_lives_and_what_is_saved() -> None:
    x = torch.ones(SHAPE, dtype=torch.float64)
    size = state_bytes(x)
    assert most(lambda: x + 1.0 + 1.0 + 1.0, x) == 2 * size
    assert most(lambda: torch.exp(x.requires_grad_()).exp().exp(), x) == 3 * size


def raw(scaled: Tensor, times: Tensor) -> Tensor:
    """F of the same denoiser."""
    sigma = wide(times, scaled)
    x = scaled * (STD**2 + sigma**2).sqrt()
    c_skip, c_out = STD**2 / (STD**2 + sigma**2), STD * sigma / (STD**2 + sigma**2).sqrt()
    return (clean(x, times) - c_skip * x) / c_out


def noise_of(x: Tensor, times: Tensor) -> Tensor:
    return (x - clean(x, times)) / wide(times, x)


def mean_of_noise(x: Tensor, times: Tensor) -> Tensor:
    return x - wide(times, x) * noise_of(x, times)


def mean_of_raw(x: Tensor, times: Tensor) -> Tensor:
    """EDM eq. 7."""
    sigma = wide(times, x)
    total = STD**2 + sigma**2
    return STD**2 / total * x + STD * sigma / total.sqrt() * raw(x / total.sqrt(), times)


MODELS: dict[str, tuple[Any, Any, Any]] = {
    "x0": ("x0", clean, clean),
    "noise": ("noise", noise_of, mean_of_noise),
    "F": (Preconditioned(), raw, mean_of_raw),
}


@pytest.mark.parametrize(("name", "kind"), [*itertools.product(SOLVERS, MODELS), ("cm inversion", "x0")])
def test_a_solver_holds_no_more_than_its_algorithm(name: str, kind: str, record_property: Any) -> None:
    prediction, model, mean = MODELS[kind]
    z = 10.0 * noise(*SHAPE)
    given = problem(y=0.3 * noise(4, 2, 16, 16, seed=1).abs())
    y = given["y"]
    if name == "cm inversion":
        del given["scale"]
        more: Any = {"iterations": 3, "rate": lambda t: 0.2 * (t + 0.5), "tau": 0.1, "parameterization": "x0"}
        ours = most(lambda: cm_inversion_sample(jump, z, LEVELS, **more, **given), z, y)
        theirs = most(lambda: plain_inversion(z, y), z, y)
    else:
        solve = SOLVERS[name][0]
        ours = most(lambda: solve(model, z, SCHEDULE, prediction=prediction, **extras(name), **given), z, y)
        theirs = most(lambda: plain(name, z, y, SCHEDULE, mean), z, y)
    record_property("peak", f"{ours} of {theirs}")
    # Ours forms the times of all levels at once: (N + 1)·B numbers, where a state has B·d.
    assert 3 * state_bytes(z) < ours <= theirs + (SCHEDULE.steps + 1) * len(z) * z.element_size()


@pytest.mark.parametrize("name", SOLVERS)
def test_a_run_leaves_nothing_to_the_collector(name: str) -> None:
    z, given = 10.0 * noise(4, 3, 5), problem()
    measure = given["operator"]
    given["operator"] = lambda x0: measure(x0)
    refs = [weakref.ref(given["operator"]), weakref.ref(z)]
    gc.collect()
    gc.disable()
    try:
        SOLVERS[name][0](clean, z, SCHEDULE, prediction="x0", **extras(name), **given)
        del z, given
        assert [ref() for ref in refs] == [None, None]
    finally:
        gc.enable()
