"""What a sampler draws never repeats the latents that the caller drew from the same seed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import bicm_kernels as bk
from bicm_diffusion import (
    ConsistencySchedule,
    ancestral_sample,
    consistency_invert,
    consistency_multistep_sample,
    consistency_sample,
    edm_sample,
    karras_schedule,
    keys,
    sign_masked,
)
from bicm_diffusion.adapters.k_diffusion import keyed_noise_sampler, sample_euler
from bicm_diffusion.inverse import lgd_sample

SHAPE = (4, 3, 16, 16)
SCHEDULE = ConsistencySchedule((80.0, 2.0))
ZIGZAG = ConsistencySchedule((80.0,), zigzags=((0.2, 0.8),))


def churned(z: Tensor, seen: Callable[..., Tensor], seed: int) -> Tensor:
    return edm_sample(seen, z, karras_schedule(4), churn=2.0, seed=seed)


def k_diffusion_churned(z: Tensor, seen: Callable[..., Tensor], seed: int) -> Tensor:
    sigmas = torch.tensor([80.0, 10.0, 1.0, 0.0])
    drawn = keyed_noise_sampler(z, sigmas, seed=seed)
    return sample_euler(seen, z, sigmas, disable=True, s_churn=2.0, noise_sampler=drawn)


def solved(z: Tensor, seen: Callable[..., Tensor], seed: int) -> Tensor:
    still = {"operator": lambda x0: x0, "y": z, "scale": 0.0, "radius": 0.0}
    return lgd_sample(lambda x, t: seen(x) + 0 * x, z, karras_schedule(4), prediction="x0", seed=seed, **still)


SAMPLERS: dict[str, Callable[[Tensor, Callable[..., Tensor], int], Tensor]] = {
    "edm_sample": churned,
    "sign_masked": lambda z, seen, seed: sign_masked(seen, z, [2.0, 1.0], seed=seed),
    "consistency_sample": lambda z, seen, seed: consistency_sample(seen, 80 * z, ZIGZAG, seed=seed),
    "consistency_multistep_sample": lambda z, seen, seed: consistency_multistep_sample(
        seen, 80 * z, SCHEDULE, seed=seed
    ),
    "consistency_invert": lambda z, seen, seed: consistency_invert(seen, z, SCHEDULE, seed=seed),
    "keyed_noise_sampler": k_diffusion_churned,
    "lgd_sample": solved,
    "ancestral_sample": lambda z, seen, seed: ancestral_sample(seen, z, karras_schedule(4, t_max=80.0), seed=seed),
}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("seed", [0, 7])
def test_fresh_noise_does_not_repeat_the_latents(name: str, seed: int) -> None:
    latents = [bk.normal(SHAPE, seed=seed, step=step) for step in range(8)]
    inputs: list[Tensor] = []

    def record(x: Tensor, *_: object) -> Tensor:
        inputs.append(x.clone())
        return torch.zeros_like(x)

    # The network answers zero and the latents are zero: what varies in its inputs is fresh noise alone.
    SAMPLERS[name](torch.zeros(SHAPE), record, seed)
    noisy = [x.flatten() for x in inputs if x.std() > 0]
    assert noisy
    for x in noisy:
        for latent in latents:
            assert torch.corrcoef(torch.stack([x, latent.flatten()]))[0, 1].abs() < 0.1


def test_every_purpose_stands_in_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "reproducibility.md").read_text()
    purposes = [name for name in vars(keys) if name.isupper() and name != "RESERVED"]
    assert [name for name in purposes if f"`{name}`" not in text] == []


def test_purposes_differ_and_stay_clear_of_small_numbers() -> None:
    purposes = [value for name, value in vars(keys).items() if name.isupper() and name != "RESERVED"]
    assert len(set(purposes)) == len(purposes) >= 9
    assert all(2**60 < purpose < 2**63 for purpose in purposes)
