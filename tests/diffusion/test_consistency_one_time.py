"""Sampling from a consistency model whose network takes one time, as parameterization="cm" trains it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bicm_diffusion import (
    ConsistencySchedule,
    consistency_invert,
    consistency_multistep_sample,
    consistency_sample,
)
from bicm_kernels import denoise, normal, scale_input


class OneTime(nn.Module):
    """F(c_in·x, t)."""

    def forward(self, scaled: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(scaled)


@pytest.mark.parametrize("function", [consistency_sample, consistency_multistep_sample, consistency_invert])
@pytest.mark.parametrize("network", [OneTime(), lambda scaled, t: scaled], ids=["module", "function"])
def test_it_is_told_how_networks_are_called(function: Callable[..., Tensor], network: Any) -> None:
    x, schedule = torch.ones(2, 3), ConsistencySchedule((80.0, 1.2))
    message = (
        r"model: called as model\(x, t, u\), but it takes .*lambda x, t, u: network\(x, t\) ignores u, which consi"
    )
    with pytest.raises(TypeError, match=message):
        function(network, x, schedule)


def test_other_arguments_are_named() -> None:
    x, schedule = torch.ones(2, 3), ConsistencySchedule((80.0,))
    with pytest.raises(TypeError, match=r"model: called as model\(x, t, u, label=…\), but .* a lambda$"):
        consistency_sample(lambda scaled, t, u: scaled, x, schedule, extra_args={"label": 1})


def test_a_type_error_of_the_network_itself_is_left_as_it_is() -> None:
    def broken(scaled: Tensor, t: Tensor, u: Tensor) -> Tensor:
        raise TypeError("of the network")

    with pytest.raises(TypeError, match=r"^of the network$"):
        consistency_sample(broken, torch.ones(2, 3), ConsistencySchedule((80.0,)))


@pytest.mark.parametrize("sigma_data", [0.1, 0.5, 3.0])
@pytest.mark.parametrize("level", [0.01, 0.6, 5.0, 80.0])
def test_a_leap_differs_from_that_of_cm_by_at_most_t_min(level: float, sigma_data: float) -> None:
    network, schedule = OneTime(), ConsistencySchedule((level,), sigma_data=sigma_data)
    x = level * normal((4, 50), seed=0, dtype=torch.float64)
    t = torch.full((len(x),), level, dtype=torch.float64)
    scaled = scale_input(x, t, sigma_data=sigma_data)
    expected = denoise(x, network(scaled, t), t, parameterization="cm", sigma_data=sigma_data)
    found = consistency_multistep_sample(lambda x, t, u: network(x, t), x, schedule)
    assert ((found - expected).abs() <= 1.01 * schedule.t_min * scaled.abs() + 1e-12).all()
