"""Steps between neighbouring timesteps, where weights are quotients of small differences."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import CogVideoXDDIMScheduler, DDIMInverseScheduler, DDIMScheduler, DDPMScheduler

from bicm_diffusion.adapters.diffusers import accelerate_scheduler
from tests.support.diffusers_observed import agree, both

CASES: list[tuple[type[Any], dict[str, Any]]] = [
    (DDPMScheduler, {}),
    (DDIMScheduler, {}),
    (DDIMScheduler, {"eta": 1.0}),
    (DDIMInverseScheduler, {}),
    (CogVideoXDDIMScheduler, {}),
]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("cls", "how"), CASES)
def test_a_step_of_a_thousand_differs_by_rounding(cls: type[Any], how: dict[str, Any], prediction: str) -> None:
    original = cls(prediction_type=prediction)
    ours = accelerate_scheduler(cls(prediction_type=prediction))
    for scheduler in (original, ours):
        scheduler.set_timesteps(1000)
    source = torch.Generator().manual_seed(0)
    for t in (1, 2, 3, 5, 8, 20, 100, 500, 900, 998):
        x, output = (torch.randn(2, 3, 6, 6, generator=source) for _ in range(2))
        expected, seen = (
            scheduler.step(
                output, t, x, **how, **({"generator": torch.Generator().manual_seed(t)} if noisy(cls) else {})
            ).prev_sample
            for scheduler in (original, ours)
        )
        torch.testing.assert_close(seen, expected, rtol=0.0, atol=3e-6 * max(1.0, expected.abs().max().item()))


def noisy(cls: type[Any]) -> bool:
    return cls in (DDPMScheduler, DDIMScheduler)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("cls", "how"), [(DDPMScheduler, {}), (DDIMScheduler, {"eta": 0.5})])
def test_a_step_between_two_levels_without_signal(cls: type[Any], how: dict[str, Any], prediction: str) -> None:
    """The quotient of two zeros: the original step runs, and NumPy has nothing to warn of."""
    config = {"trained_betas": [0.1] * 8 + [1.0, 1.0], "num_train_timesteps": 10, "prediction_type": prediction}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        agree(*both(cls, config, 10), **how)
    assert not [each for each in caught if issubclass(each.category, RuntimeWarning)]
