"""Whether a scheduler's tables still describe it: every change of what they were read from is noticed."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra [diffusers]")

from bicm_diffusion.adapters.diffusers.tables import Reading, version_of

Own = dict[str, Any]
NAMES = ("sigmas", "timesteps", "absent")


def attributes() -> Own:
    configuration = SimpleNamespace(prediction_type="epsilon", sigma_data=0.5)
    sigmas, timesteps = torch.tensor([3.0, 1.0, 0.0]), torch.tensor([900.0, 1.0])
    return {"sigmas": sigmas, "timesteps": timesteps, "num_inference_steps": 2, "_internal_dict": configuration}


def read(own: Own) -> Reading:
    sources = tuple((name, own.get(name), version_of(own.get(name))) for name in NAMES)
    chosen = itemgetter("prediction_type", "sigma_data")
    reading = Reading(own, sources, chosen)
    reading.options = chosen(vars(own["_internal_dict"]))
    return reading


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
def test_every_change_is_noticed(name: str) -> None:
    own = attributes()
    reading = read(own)
    assert not reading.stale(own) and not reading.stale(own)
    CHANGES[name](own)
    assert reading.stale(own)


def test_what_does_not_matter_is_not_noticed() -> None:
    own = attributes()
    reading = read(own)
    own["num_inference_steps"] = int("2")  # equal numbers
    own["something"] = torch.ones(3)
    own["_internal_dict"].clip_sample = True
    assert not reading.stale(own)
    own["sigmas"].requires_grad_()
    with torch.no_grad():
        assert not reading.stale(own)
    reading.used = False  # tables without weights, whose reason to fall back was found before
    assert not reading.stale(own)
