"""Whether a scheduler's tables still describe it: every change of what they were read from is noticed."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra [diffusers]")

from bicm_diffusion.adapters.diffusers.tables import noted, version_of
from tests.support.step_inputs import WAYS, functions_of

Own = dict[str, Any]
NAMES = ("sigmas", "timesteps", "absent")


def attributes() -> Own:
    configuration = SimpleNamespace(prediction_type="epsilon", sigma_data=0.5)
    sigmas, timesteps = torch.tensor([3.0, 1.0, 0.0]), torch.tensor([900.0, 1.0])
    return {"sigmas": sigmas, "timesteps": timesteps, "num_inference_steps": 2, "_internal_dict": configuration}


class Reading:
    """What was noted of attributes, by the native library or in Python."""

    def __init__(self, own: Own, functions: Any, monkeypatch: pytest.MonkeyPatch, used: bool = True) -> None:
        sources = tuple((name, own.get(name), version_of(own.get(name))) for name in NAMES)
        options = tuple((name, getattr(own["_internal_dict"], name)) for name in ("prediction_type", "sigma_data"))
        monkeypatch.setattr("bicm_diffusion.adapters.diffusers.tables.note", functions.note)
        self.functions, self.inputs = functions, noted(own, sources, options, used)

    def stale(self, own: Own) -> bool:
        answer = self.functions.unchanged(self.inputs, own)
        assert bool(self.functions.ready(self.inputs, own, (torch.ones(2),), {})) is answer
        return not answer


@pytest.fixture(params=WAYS)
def functions(request: pytest.FixtureRequest) -> Any:
    return functions_of(request.param)


CHANGES: dict[str, Callable[[Own], Any]] = {
    "another tensor": lambda own: own.update(sigmas=own["sigmas"].flip(0)),
    "another tensor of equal numbers": lambda own: own.update(timesteps=own["timesteps"].clone()),
    "a write": lambda own: own["sigmas"].mul_(2),
    "a write to a view": lambda own: own["timesteps"][1:].sub_(3),
    "no tensor any more": lambda own: own.update(sigmas=None),
    "an attribute that is gone": lambda own: own.pop("timesteps"),
    "an attribute that was absent": lambda own: own.update(absent=torch.ones(2)),
    "another number of steps": lambda own: own.update(num_inference_steps=3),
    "an option": lambda own: setattr(own["_internal_dict"], "sigma_data", 1.0),
    "an option that is gone": lambda own: delattr(own["_internal_dict"], "prediction_type"),
    "a gradient": lambda own: own["sigmas"].requires_grad_(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_noticed(name: str, functions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = attributes()
    reading = Reading(own, functions, monkeypatch)
    assert not reading.stale(own) and not reading.stale(own)
    CHANGES[name](own)
    assert reading.stale(own)


def test_what_does_not_matter_is_not_noticed(functions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = attributes()
    reading = Reading(own, functions, monkeypatch)
    own["num_inference_steps"] = int("2")  # equal numbers
    own["something"] = torch.ones(3)
    own["_internal_dict"].clip_sample = True
    assert not reading.stale(own)
    own["sigmas"].requires_grad_()
    with torch.no_grad():
        assert not reading.stale(own)
    # Tables without weights, whose reason to fall back was found before.
    assert not Reading(own, functions, monkeypatch, used=False).stale(own)
