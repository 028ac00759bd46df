"""Churn: how far noise raises a level before a step, and the raised state (EDM Alg. 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bicm_diffusion.adapters.diffusers.drawing import Generators
from bicm_diffusion.adapters.diffusers.sigmas import Counted
from bicm_diffusion.adapters.diffusers.tables import single
from bicm_diffusion.adapters.k_diffusion import MOST_LIFT
from bicm_kernels import add_noise, affine_step


class Churning(Counted):
    """Schedulers whose steps take churn."""

    def _lift(self, tables: Any, index: int, churn: float, low: float, high: float) -> float:
        """The relative increase of the level at an index."""
        # PyTorch compares a level with a number in the level's dtype.
        rounded = single if self.sigmas.dtype is torch.float32 else float
        if not rounded(low) <= tables.levels[index] <= rounded(high):
            return 0.0
        return min(churn / (len(tables.levels) - 1), MOST_LIFT)

    def _churned(
        self, state: Tensor, model_output: Tensor, deviation: float, index: int, generator: Generators
    ) -> Tensor:
        if self._noise == "keyed":
            seed, sample_id = self._key(generator, state, index)
            return add_noise(state, deviation, seed=seed, step=index, sample_id=sample_id)
        return affine_step([state, self._drawn(model_output, state, generator)], [1.0, deviation])
