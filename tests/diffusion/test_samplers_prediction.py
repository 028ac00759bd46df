"""What a model predicts, as the noise it stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bicm_diffusion import Preconditioned
from bicm_diffusion.samplers.prediction import Level, folded, read
from bicm_kernels import denoise, scale_input
from tests.support.closed_forms import noise

LEVELS = {"VP": Level(0.3, 0.8, 0.6), "VE": Level(2.0, 1.0, 2.0), "VE, low": Level(0.003, 1.0, 0.003)}


def noise_of(prediction: Any, level: Level, z: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    of_state, of_output = folded(read(prediction, level), 0.0, 1.0)
    return of_state * z + of_output * output


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS.keys())
def test_every_kind_stands_for_the_same_noise(level: Level) -> None:
    x, n = noise(4, 3), noise(4, 3, seed=1)
    z, v = level.alpha * x + level.sigma * n, level.alpha * n - level.sigma * x
    for kind, output in (("noise", n), ("x0", x), ("v", v)):
        torch.testing.assert_close(noise_of(kind, level, z, output), n, rtol=0, atol=1e-12)


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS.keys())
@pytest.mark.parametrize("kind", ["edm", "bcm", "cm"])
def test_a_raw_output_is_read_as_its_preconditioning(kind: Any, level: Level) -> None:
    z, output = noise(4, 3), noise(4, 3, seed=1)
    prediction, t = Preconditioned(kind, sigma_data=0.7, t_min=0.001), level.sigma / level.alpha
    options: dict[str, Any] = {"parameterization": kind, "sigma_data": 0.7, "sigma_min": 0.001}
    x0 = denoise(z / level.alpha, output, t, **options)
    expected = (z - level.alpha * x0) / level.sigma
    torch.testing.assert_close(noise_of(prediction, level, z, output), expected, rtol=1e-9, atol=1e-11)
    scaled = prediction.input_scale(level) * z
    torch.testing.assert_close(scaled, scale_input(z / level.alpha, t, sigma_data=0.7), rtol=1e-13, atol=0)


def test_low_noise_keeps_its_digits() -> None:
    """1 - c_skip as a difference would keep six digits here."""
    of_state, _ = read(Preconditioned(), Level(1e-5, 1.0, 1e-5))
    assert of_state == pytest.approx(1e-5 / (0.25 + 1e-10), rel=1e-15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parameterization": "vp"}, "parameterization: expected one of edm, bcm, cm, got 'vp'"),
        ({"sigma_data": 0.0}, "sigma_data"),
        ({"t_min": -1.0}, "t_min"),
    ],
)
def test_bad_preconditionings_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preconditioned(**arguments)
