"""Samples and outputs of two dtypes: what the original computes is computed here, in one launch, to the same dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="needs the extra [diffusers]")

from diffusers import (
    CogVideoXDPMScheduler,
    DPMSolverSinglestepScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    UniPCMultistepScheduler,
)

from tests.support.diffusers_cases import network
from tests.support.diffusers_observed import NEAR, SHAPE, agree, both, label, observed
from tests.support.diffusers_odd import CONFIGS
from tests.support.tensors import BF16, F16, F32, F64

#: Either may be the wider one, or neither.
PAIRS = [(F32, BF16), (BF16, F32), (F16, F32), (F16, BF16), (F64, F32), (F32, F64)]
#: What else a step's dtypes depend on.
FURTHER: list[tuple[type[Any], dict[str, Any]]] = [
    (HeunDiscreteScheduler, {"prediction_type": "sample", "clip_sample": True}),
    (HeunDiscreteScheduler, {"prediction_type": "sample"}),
    (LMSDiscreteScheduler, {"prediction_type": "sample"}),
    (UniPCMultistepScheduler, {"solver_order": 1}),
    (UniPCMultistepScheduler, {"solver_order": 3}),
    (UniPCMultistepScheduler, {"predict_x0": False, "final_sigmas_type": "sigma_min"}),
    (DPMSolverSinglestepScheduler, {"prediction_type": "sample"}),
    (DPMSolverSinglestepScheduler, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
]


def originals_steps(monkeypatch: pytest.MonkeyPatch, cls: type[Any]) -> list[str]:
    """The names of the original's methods that run from now on, each as often as it does."""
    ran: list[str] = []
    for name in ("step", "step_prk", "step_plms", "scale_model_input"):
        method = getattr(cls, name, None)
        if method is not None:

            def counted(self: Any, *args: Any, method: Any = method, name: str = name, **kwargs: Any) -> Any:
                ran.append(name)
                return method(self, *args, **kwargs)

            monkeypatch.setattr(cls, name, counted)
    return ran


@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda pair: "-".join(str(x).removeprefix("torch.") for x in pair))
@pytest.mark.parametrize(("cls", "config"), [*CONFIGS, *FURTHER], ids=label)
def test_no_step_of_the_original_runs(
    cls: type[Any], config: dict[str, Any], dtypes: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, ours = both(cls, config)
    refused = any(isinstance(x, type) and issubclass(x, Exception) for x in observed(original, dtypes=dtypes))
    agree(*both(cls, config), dtypes=dtypes)
    if refused:
        return
    ran = originals_steps(monkeypatch, cls)
    for _ in observed(ours, dtypes=dtypes):
        pass
    # Schedulers that scale nothing keep the original's method.
    assert not [name for name in ran if name != "scale_model_input" or hasattr(type(ours)._mixin, name)]


@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda pair: "-".join(str(x).removeprefix("torch.") for x in pair))
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_no_step_of_cogvideox_s_original_runs(
    prediction: str, dtypes: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pipelines narrow the state after every step and widen every output."""
    ends: list[list[Tensor]] = []
    ran: list[str] = []
    for scheduler in both(CogVideoXDPMScheduler, {"prediction_type": prediction}):
        if ends:
            ran = originals_steps(monkeypatch, CogVideoXDPMScheduler)
        torch.manual_seed(0)
        x, old, times = torch.randn(SHAPE).to(dtypes[0]), None, scheduler.timesteps
        ends.append([])
        for k, t in enumerate(times):
            output = network(x, k).to(dtypes[1])
            x, old = scheduler.step(output, old, t, times[k - 1] if k else None, x)
            ends[-1] += [x, old]
            x = x.to(dtypes[0])
    assert not ran
    near = max(NEAR[dtype] for dtype in dtypes)
    for expected, got in zip(*ends, strict=True):
        assert got.dtype is expected.dtype
        torch.testing.assert_close(got.double(), expected.double(), rtol=near, atol=near * expected.abs().max().item())


def test_what_a_launch_cannot_take_is_told_once(recwarn: pytest.WarningsRecorder) -> None:
    """A state that the caller narrows half-way, which the original corrects in the dtype of the state before."""
    _, ours = both(UniPCMultistepScheduler, {})
    x = torch.ones(SHAPE)
    for t in ours.timesteps:
        x = ours.step(torch.tanh(x), t, x).prev_sample.half()
    told = [str(w.message) for w in recwarn if "the original step runs" in str(w.message)]
    assert len(told) == 1 and "dtypes" in told[0]
