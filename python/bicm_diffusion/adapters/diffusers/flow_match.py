"""Euler's method for flow matching, with its stochastic form, and with a timestep for every token."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor

from bicm_diffusion.adapters.diffusers.arguments import is_whole
from bicm_diffusion.adapters.diffusers.drawing import Generators, traced
from bicm_diffusion.adapters.diffusers.log_prob import FlowLogProb
from bicm_diffusion.adapters.diffusers.outputs import as_output
from bicm_diffusion.adapters.diffusers.scheduler import fused
from bicm_diffusion.adapters.diffusers.sigmas import ROWS, Counted
from bicm_diffusion.adapters.diffusers.tables import Row
from bicm_kernels import affine_step, normal

#: How far below a token's level the original requires the next one to be.
BELOW = 1e-6


class FlowMatchEuler(FlowLogProb, Counted):
    _options = ("num_train_timesteps", "stochastic_sampling")

    def _row(self, tables: Any, index: int) -> Row:
        """Weights of sample, of output and of noise: z + (s' - s)·v, or (1 - s')·(z - s·v) + s'·n."""
        here, below = tables.levels[index], tables.levels[index + 1]
        if not self.config.stochastic_sampling:
            return 1.0, below - here, 0.0
        return 1.0 - below, -(1.0 - below) * here, below

    @fused
    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        graph = traced()
        tables = self._ready(graph)
        if tables is None or is_whole(timestep):
            return None
        index = self._index(timestep)
        noisy = self._internal_dict.stochastic_sampling
        # The original computes in float32 for every input dtype; only a float64 output keeps its dtype.
        given = model_output.dtype
        dtype = given if given is torch.float64 else torch.float32
        if per_token_timesteps is not None:
            if not self._one_for_each_token(per_token_timesteps, sample, model_output):
                return None
            dtype = torch.promote_types(dtype, per_token_timesteps.dtype)
            weights = self._token_weights(per_token_timesteps, noisy)
        else:
            row: Any = tables.row(ROWS, index, sample.device if graph else None)
            if row is None:
                return None
            weights = list(row)
        if not noisy:
            weights.pop()
        tensors = [sample if sample.dtype is dtype else sample.to(dtype), model_output]
        if per_token_timesteps is not None:
            out = self._tokens(tensors, weights, index, generator)
        else:
            keyed: dict[str, Any] = {}
            if noisy:
                deviation = weights.pop()
                keyed = self._noisy(tensors, weights, deviation, index, generator, model_output, sample, torch.float32)
            out = affine_step(tensors, weights, **keyed)
            out = out if given is dtype else out.to(given)
        self._step_index = index + 1
        return as_output(graph, FlowMatchEulerDiscreteSchedulerOutput, out) if return_dict else (out,)

    def _one_for_each_token(self, timesteps: Any, sample: Tensor, output: Tensor) -> bool:
        """Whether (B, L) timesteps go with a (B, L, C) sample, so that each token can be a row."""
        if not isinstance(timesteps, Tensor) or timesteps.requires_grad or timesteps.device != sample.device:
            return False
        return sample.dim() == 3 and timesteps.shape == sample.shape[:2] and output.shape == sample.shape

    def _token_weights(self, timesteps: Tensor, noisy: bool) -> list[Tensor]:
        """The same three weights of every token, from its own level to the largest one below it."""
        here = timesteps / self._internal_dict.num_train_timesteps
        levels = self.sigmas[:, None, None]
        below = (levels * (levels < here - BELOW)).amax(dim=0)
        here, below = here.double().flatten(), below.double().flatten()
        if noisy:
            return [1.0 - below, (below - 1.0) * here, below]
        # The original's sign: its output points from the data to noise here.
        return [torch.ones_like(here), here - below, below]

    def _tokens(self, tensors: list[Tensor], weights: list[Tensor], index: int, generator: Generators) -> Tensor:
        state, output = tensors
        if len(weights) == 3:
            if self._noise == "keyed":
                seed, sample_id = self._key(generator, state, index)
                noise = normal(state.shape, seed=seed, step=index, sample_id=sample_id, device=state.device)
            else:
                noise = self._drawn(output, state, generator, torch.float32)
            tensors = [*tensors, noise]
        return affine_step([x.flatten(0, 1) for x in tensors], weights).view_as(state)
