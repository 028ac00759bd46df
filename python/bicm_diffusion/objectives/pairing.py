"""Batch-OT: the permutation of a batch's noises with the least total transport cost."""

from __future__ import annotations

import torch
from torch import Tensor

from bicm_diffusion.extras import extra
from bicm_diffusion.samplers.checks import check_state
from bicm_kernels import normal

COSTS = ("squared", "norm")


@torch.no_grad()
def optimal_pairing(
    x: Tensor, *, seed: int | Tensor, step: int | Tensor, sample_id: int | Tensor = 0, cost: str = "squared"
) -> Tensor:
    """Return ids π (B,) int64 with the least Σ‖x_b - z_{π(b)}‖² of all permutations of the batch's ids.

    Pass the result as `sample_id=`: `noisy_pair` and the objectives draw the noise of the given
    ids, and no tensor is moved. Draw levels, masks and everything else keyed by sample with the original ids.

    x: clean samples (B, …), floating, on any device; their noises are compared in float64.
    seed, step, sample_id: the key of the noise, see `bicm_kernels.normal`; one seed per sample is not supported.
    cost: "squared", or "norm" for Σ‖x_b - z_{π(b)}‖, as in the GC authors' code.
    The assignment is computed on the host and depends on the whole batch.
    Raises ImportError without SciPy, ValueError for another cost and one seed for every sample.

    >>> x = 10 * normal((4, 2), seed=0, step=7).flip(0)
    >>> optimal_pairing(x, seed=0, step=7)
    tensor([3, 2, 1, 0])
    """
    with extra("diffusion"):
        from scipy.optimize import linear_sum_assignment
    check_state("x", x)
    if cost not in COSTS:
        raise ValueError(f"cost: expected one of {', '.join(COSTS)}, got {cost!r}")
    if isinstance(seed, Tensor) and seed.dim() == 1:
        raise ValueError("seed: expected one for the batch, whose samples are distinguished by ids, got one for each")
    named = isinstance(sample_id, Tensor) and sample_id.dim() == 1
    ids = torch.as_tensor(sample_id, dtype=torch.int64, device=x.device)
    ids = ids if named else ids + torch.arange(len(x), device=x.device)
    z = normal(x.shape, seed=seed, step=step, sample_id=ids, dtype=torch.float64, device=x.device)
    a, b = (y.double().reshape(len(x), x[0].numel() if len(x) else 0) for y in (x, z))
    # ‖x‖² and ‖z‖² are the same for every permutation.
    costs = -(a @ b.T) if cost == "squared" else torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    _, columns = linear_sum_assignment(costs.cpu().numpy())
    return ids[torch.from_numpy(columns).to(ids.device)]
