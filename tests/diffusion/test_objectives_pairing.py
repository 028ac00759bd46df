"""Batch-OT: the pairing against every permutation, and noisy pairs that are drawn with its ids."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from bicm_diffusion.objectives import optimal_pairing
from bicm_diffusion.objectives.diagnostics import transport_cost
from bicm_kernels import noisy_pair, normal

KEY: dict[str, Any] = {"seed": 5, "step": 3}
X = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0))


def costs(x: Tensor, sample_id: int | Tensor, power: float) -> Tensor:
    """‖x_b - z_j‖^power, (B, B)."""
    z = normal(x.shape, **KEY, sample_id=sample_id, dtype=torch.float64)
    return (x.double()[:, None] - z[None]).flatten(2).norm(dim=2) ** power


@pytest.mark.parametrize(("cost", "power"), [("squared", 2.0), ("norm", 1.0)])
@pytest.mark.parametrize("sample_id", [0, 40, torch.tensor([9, 4, 77, 0, 12, 3])])
def test_no_permutation_is_cheaper(cost: str, power: float, sample_id: int | Tensor) -> None:
    ids = sample_id if isinstance(sample_id, Tensor) else torch.arange(6) + sample_id
    table = costs(X, ids, power)
    best = min(permutations(range(6)), key=lambda order: sum(table[b, j].item() for b, j in enumerate(order)))
    found = optimal_pairing(X, **KEY, sample_id=sample_id, cost=cost)
    assert found.dtype == torch.int64 and torch.equal(found, ids[list(best)])
    assert list(best) != list(range(6))


def test_the_two_costs_differ() -> None:
    """In a large batch of few dimensions they pick other pairs, and each is the better by its own measure."""
    x = 3 * torch.randn(128, 2, generator=torch.Generator().manual_seed(1))
    squared, norm = (optimal_pairing(x, **KEY, cost=cost) for cost in ("squared", "norm"))
    assert (squared != norm).any() and squared.unique().numel() == 128
    first, second = (
        (x.double() - normal(x.shape, **KEY, sample_id=ids, dtype=torch.float64)) for ids in (squared, norm)
    )
    assert first.square().sum() < second.square().sum()
    assert second.norm(dim=1).sum() < first.norm(dim=1).sum()


def test_pairs_drawn_with_the_ids_have_the_paired_noise() -> None:
    """The whole of batch-OT: no tensor is moved, and levels stay with their samples."""
    ids = optimal_pairing(X, **KEY)
    z = normal(X.shape, **KEY)[ids]
    t = torch.linspace(0.1, 2.0, 6)
    low, high = noisy_pair(X, t, 2 * t, **KEY, sample_id=ids)
    assert torch.equal(low, X + t[:, None, None] * z) and torch.equal(high, X + (2 * t)[:, None, None] * z)
    unpaired, paired = (transport_cost(lambda x, t: x, X, 0.0, **KEY, sample_id=i).sum() for i in (0, ids))
    assert paired < unpaired


def test_a_step_is_another_pairing_and_dtypes_agree() -> None:
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(optimal_pairing(x, seed=5, step=3), optimal_pairing(x, seed=5, step=4))
    assert torch.equal(optimal_pairing(x.double(), **KEY), optimal_pairing(x, **KEY))
    assert optimal_pairing(x[:0], **KEY).shape == (0,) and optimal_pairing(x[:1], **KEY).tolist() == [0]


def test_wrong_calls() -> None:
    with pytest.raises(ValueError, match="cost: expected one of squared, norm, got 'l1'"):
        optimal_pairing(X, **KEY, cost="l1")
    with pytest.raises(ValueError, match="seed: expected one for the batch"):
        optimal_pairing(X, seed=torch.arange(6), step=0)
    with pytest.raises(TypeError, match=r"x: expected a tensor \(B, …\), got a numpy.ndarray"):
        optimal_pairing(X.numpy(), **KEY)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="step"):
        optimal_pairing(X, seed=0)  # type: ignore[call-arg]
