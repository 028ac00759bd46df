"""Calls of schedulers that must come out as the original's do: results, state, the generator and what is told."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from tests.support.diffusers_cases import CLASSES


def seen(x: Any) -> Any:
    """What a result is, in a form that can be compared."""
    if isinstance(x, Tensor):
        values = x.detach()
        if x.device.type == "meta":
            values = torch.zeros(0)
        elif x.layout is not torch.strided:
            values = values.to_dense()
        values = values.as_subclass(Tensor).resolve_conj().resolve_neg()
        if values.dtype.itemsize == 1 and values.is_floating_point():
            values = values.float()
        return type(x), x.dtype, x.layout, tuple(x.shape), x.device.type, x.requires_grad, values
    return type(x), torch.from_numpy(x) if isinstance(x, np.ndarray) else x


def outcome(scheduler: Any, run: Callable[[Any], Any]) -> tuple[list[Any], list[str]]:
    """What a call comes to, the state it leaves behind, and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.manual_seed(0)
        try:
            results = [seen(x) for x in run(scheduler)]
        except Exception as error:
            results = [type(error)]
        kept = getattr(scheduler, "model_outputs", None) or []
        state = [seen(x) if isinstance(x, Tensor) else type(x) for x in kept]
        index = getattr(scheduler, "step_index", None)
    told = [str(w.message) for w in caught if "is not accelerated" in str(w.message)]
    drawn = torch.get_rng_state()
    return [results, state, index if isinstance(index, int | None) else "other", drawn], told


def same(expected: Any, got: Any, near: float = 1e-4) -> None:
    if isinstance(expected, list | tuple):
        assert isinstance(got, list | tuple) and len(got) == len(expected), (got, expected)
        for a, b in zip(expected, got, strict=True):
            same(a, b, near)
    elif isinstance(expected, Tensor):
        wide = torch.complex128 if expected.is_complex() else torch.float64
        expected, got = expected.to(wide), got.to(wide)
        # An element may be a small difference of large ones.
        size = expected[expected.isfinite()].abs().amax().item() if expected.isfinite().any() else 0.0
        torch.testing.assert_close(got, expected, rtol=near, atol=near * max(1.0, size), equal_nan=True)
    else:
        assert got == expected, (got, expected)


def alike(schedulers: tuple[Any, Any], run: Callable[[Any], Any], near: float = 1e-4) -> list[str]:
    """Both do the same, and what is told is told once; returned."""
    (theirs, _), (ours, told) = (outcome(scheduler, run) for scheduler in schedulers)
    same(theirs, ours, near)
    assert len(told) == len(set(told))
    return told


CONFIGS: tuple[tuple[type[Any], dict[str, Any]], ...] = (
    *((cls, {}) for cls in CLASSES),
    (DDIMScheduler, {"clip_sample": False, "prediction_type": "v_prediction"}),
    (LCMScheduler, {"clip_sample": True}),
    (EulerDiscreteScheduler, {"prediction_type": "sample"}),
    (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
    (DPMSolverMultistepScheduler, {"prediction_type": "sample"}),
    (DPMSolverMultistepScheduler, {"variance_type": "learned"}),
    (EDMDPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    (FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}),
    (UniPCMultistepScheduler, {"solver_order": 3, "predict_x0": False, "final_sigmas_type": "sigma_min"}),
    (UniPCMultistepScheduler, {"prediction_type": "sample"}),
    (PNDMScheduler, {"skip_prk_steps": True}),
    (DPMSolverSinglestepScheduler, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
    (DDPMScheduler, {"clip_sample": False, "prediction_type": "v_prediction"}),
)
