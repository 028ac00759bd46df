"""The moving average of a network: warm-up or none, buffers, dtypes, and modules that do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bicm_diffusion import update_average


def pair(dtype: torch.dtype = torch.float32, other: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    modules = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2)]
    with torch.no_grad():
        modules[1][1].running_mean.fill_(2.0)
        modules[1][1].num_batches_tracked.fill_(7)
    return modules[0].to(dtype), modules[1].to(other)


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().double().clone() for name, x in module.state_dict().items()}


@pytest.mark.parametrize(("step", "kept"), [(None, 0.99993), (0, 0.1), (8, 0.5), (128_563, 0.99993), (10**6, 0.99993)])
def test_decay_with_and_without_warm_up(step: int | None, kept: float) -> None:
    average, network = pair(torch.float64, torch.float64)
    before, new = values(average), values(network)
    update_average(average, network, step=step, decay=0.99993)
    for name, mean in values(average).items():
        if name != "1.num_batches_tracked":
            torch.testing.assert_close(mean, kept * before[name] + (1 - kept) * new[name], rtol=1e-12, atol=1e-12)


def test_floating_buffers_are_averaged_and_counters_copied() -> None:
    average, network = pair()
    update_average(average, network, decay=0.75)
    assert torch.equal(average[1].running_mean, torch.full((4,), 0.5))  # type: ignore[index]
    assert average[1].num_batches_tracked == 7  # type: ignore[index]
    average, network = pair()
    update_average(average, network, decay=0.75, buffers=False)
    assert not average[1].running_mean.any() and average[1].num_batches_tracked == 0  # type: ignore[index]


@pytest.mark.parametrize("other", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_pair_of_dtypes(dtype: torch.dtype, other: torch.dtype) -> None:
    average, network = pair(dtype, other)
    before, new = values(average), values(network)
    update_average(average, network, decay=0.9)
    for name, mean in average.state_dict().items():
        if mean.is_floating_point():
            exact = 0.9 * before[name] + 0.1 * new[name]
            assert mean.dtype == dtype
            torch.testing.assert_close(mean.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_complex_parameters_are_averaged() -> None:
    average, model = nn.Module(), nn.Module()
    average.weight, model.weight = (nn.Parameter(torch.full((2,), x, dtype=torch.complex64)) for x in (1j, 3.0))
    update_average(average, model, decay=0.5)
    torch.testing.assert_close(average.weight.detach(), torch.full((2,), 1.5 + 0.5j))


def test_tied_parameters_move_once() -> None:
    average, network = (nn.ModuleList([nn.Linear(2, 2, bias=False)] * 2) for _ in range(2))
    before, new = average[0].weight.detach().clone(), network[0].weight.detach().clone()
    update_average(average, network, decay=0.5)
    torch.testing.assert_close(average[0].weight.detach(), 0.5 * before + 0.5 * new)


@pytest.mark.parametrize(
    "other", [nn.Linear(3, 4), nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))], ids=["fewer", "shape"]
)
def test_modules_that_differ_are_refused(other: nn.Module) -> None:
    average, _ = pair()
    before = values(average)
    with pytest.raises(ValueError, match="average: expected the parameters of the network"):
        update_average(average, other, decay=0.9)
    assert all(torch.equal(x, before[name]) for name, x in values(average).items())


@pytest.mark.parametrize("decay", [-0.1, 1.5, float("nan")])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="decay: expected a value in"):
        update_average(*pair(), decay=decay)
