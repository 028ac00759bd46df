"""A model that answers in another dtype than the state's: states, denoised samples and results keep the state's."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from bicm_diffusion import (
    ConsistencySchedule,
    Evaluation,
    ancestral_sample,
    bdia_sample,
    ddim_sample,
    edict_sample,
    edm_sample,
    karras_schedule,
    obelm_sample,
    sign_masked,
    sign_recursive,
    vp_schedule,
)
from bicm_diffusion.inverse import (
    cm_inversion_sample,
    cm_posterior_sample,
    dps_sample,
    freedom_sample,
    lgd_sample,
    mpgd_sample,
)
from tests.support.closed_forms import noise

HALF, FULL = torch.bfloat16, torch.float32
#: The dtype of the state, and of the model's output.
DTYPES = [(FULL, HALF), (FULL, torch.float64), (HALF, FULL)]
SAMPLERS = (ancestral_sample, bdia_sample, ddim_sample, edict_sample, edm_sample, obelm_sample)
SOLVERS = (cm_posterior_sample, dps_sample, freedom_sample, lgd_sample, mpgd_sample)
LEAPS = ConsistencySchedule((10.0, 2.0, 0.5))


def answering(dtype: torch.dtype) -> Callable[..., Tensor]:
    return lambda z, *times: (0.3 * z).to(dtype)


@pytest.mark.parametrize(("own", "answer"), DTYPES, ids=str)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.__name__)
def test_guides_and_callbacks_see_the_state_s_dtype(sampler: Any, own: torch.dtype, answer: torch.dtype) -> None:
    seen: set[torch.dtype] = set()

    def guide(at: Evaluation) -> None:
        seen.update((at.z.dtype, at.x0.dtype, at.tracked().x0.dtype))

    for prediction in ("noise", "v", "x0"):
        z, schedule = noise(2, 3, dtype=own), vp_schedule(4, final_time=0.05)
        options: Any = {"prediction": prediction, "guide": guide, "callback": lambda info: seen.add(info.z.dtype)}
        found = sampler(answering(answer), z, schedule, **options)
        seen.update([found.dtype] if isinstance(found, Tensor) else [part.dtype for part in found])
    assert seen == {own}


def problem(seen: set[torch.dtype]) -> dict[str, Any]:
    def operator(x0: Tensor) -> Tensor:
        seen.add(x0.dtype)
        return x0.double()

    return {"operator": operator, "y": noise(2, 3, seed=1)}


@pytest.mark.parametrize(("own", "answer"), DTYPES, ids=str)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: solver.__name__)
def test_operators_see_the_state_s_dtype(solver: Any, own: torch.dtype, answer: torch.dtype) -> None:
    seen: set[torch.dtype] = set()
    extra: Any = {"consistency_model": answering(answer)} if solver is cm_posterior_sample else {}
    for form in ("bcm", "x0") if extra else ("",):
        given = {**extra, "parameterization": form} if extra else {}
        z, schedule = 10.0 * noise(2, 3, dtype=own), karras_schedule(4, t_min=0.05, t_max=10.0)
        found = solver(answering(answer), z, schedule, prediction="x0", **given, **problem(seen))
        seen.add(found.dtype)
    assert seen == {own}


@pytest.mark.parametrize(("own", "answer"), DTYPES, ids=str)
def test_cm_inversion_keeps_the_state_s_dtype(own: torch.dtype, answer: torch.dtype) -> None:
    for form, tau in product(("bcm", "cm", "x0"), (0.0, 0.1)):
        seen: set[torch.dtype] = set()

        def model(x: Tensor, *times: Tensor, seen: set[torch.dtype] = seen) -> Tensor:
            seen.add(x.dtype)
            return answering(answer)(x)

        given: Any = {"parameterization": form, "tau": tau, "callback": lambda info, seen=seen: seen.add(info.x.dtype)}
        found = cm_inversion_sample(model, 10.0 * noise(2, 3, dtype=own), LEAPS, **given, **problem(seen))
        assert seen == {own} and found.dtype == own, (form, tau)


@pytest.mark.parametrize(("own", "answer"), DTYPES, ids=str)
def test_idempotent_samplers_keep_the_state_s_dtype(own: torch.dtype, answer: torch.dtype) -> None:
    x, model = noise(2, 3, dtype=own), answering(answer)
    assert sign_recursive(model, x, steps=2).dtype == own
    for mask in (None, torch.tensor([True, False, True])):
        assert sign_masked(model, x, [0.5, 0.2], mask=mask, seed=0).dtype == own
