"""BDIA-DDIM as a diffusers scheduler, in both directions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor

from bicm_diffusion.adapters.diffusers.alphas import PREDICTIONS, reading
from bicm_diffusion.adapters.diffusers.bdia_steps import BdiaSteps, check_gamma
from bicm_diffusion.adapters.diffusers.drawing import traced
from bicm_diffusion.adapters.diffusers.outputs import as_output


class BDIADDIMScheduler(BdiaSteps, DDIMScheduler):
    """BDIA-DDIM (BDIA eq. 24) and its inversion (eq. 28), wherever diffusers takes a DDIMScheduler.

    gamma in [0, 1]: 1 is time-symmetric, 0 is DDIM; inversion needs gamma > 0. exact: the states are integers, gamma is
    the nearest fraction with a denominator up to 1024, and a retraced trajectory returns every bit, given a
    network that returns the same bits twice; True by default, as in `bdia_sample`. False keeps floats, as gamma = 0,
    which has no inverse, always does. The other arguments are DDIMScheduler's; predicted samples are never
    clipped, since a clipped step has no inverse. After a loop `pair` holds the states to retrace the trajectory from:
    by `turn_round()` here, by `turn_round(pair)` in another scheduler or process, with as many steps and the same
    configuration. `set_timesteps(..., last_sample=...)` takes the other state of a pair as a tensor. Raises ValueError
    for a gamma or a prediction type out of range.

    >>> scheduler = BDIADDIMScheduler(gamma=0.96)
    >>> scheduler.set_timesteps(4)
    >>> scheduler.timesteps.tolist()
    [750, 500, 250, 0]
    """

    # The module path that saved pipelines record.
    __module__ = "bicm_diffusion.adapters.diffusers"

    _ignored = (
        "clip_sample",
        "thresholding",
        "use_karras_sigmas",
        "use_exponential_sigmas",
        "use_beta_sigmas",
        "use_lu_lambdas",
        "use_flow_sigmas",
        "use_dynamic_shifting",
    )
    _sources = ("alphas_cumprod",)
    config: Any
    alphas_cumprod: Tensor
    final_alpha_cumprod: Tensor

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "leading",
        gamma: float = 1.0,
        exact: bool = True,
    ) -> None:
        check_gamma(gamma, exact)
        if prediction_type not in PREDICTIONS:
            raise ValueError(f"prediction_type: expected one of {', '.join(PREDICTIONS)}, got {prediction_type!r}")
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            trained_betas=trained_betas,
            clip_sample=False,
            set_alpha_to_one=set_alpha_to_one,
            steps_offset=steps_offset,
            prediction_type=prediction_type,
            timestep_spacing=timestep_spacing,
        )
        self._indices = []

    @classmethod
    def _refuse(cls, config: Mapping[str, Any]) -> None:
        if config.get("rescale_betas_zero_snr"):
            given = config["rescale_betas_zero_snr"]
            raise ValueError(
                f"rescale_betas_zero_snr: expected False, got {given!r}: at the first level z is noise alone"
            )
        if "num_train_timesteps" in config and "beta_schedule" not in config:
            raise ValueError(f"config: expected one with a beta_schedule, got one with {', '.join(config)}")

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: str | torch.device | None = None,
        *,
        inverse: bool | None = None,
        last_sample: Tensor | None = None,
    ) -> None:
        """Set the timesteps of N steps from noise to data, or with inverse of N steps from data to noise.

        last_sample: the other state of a pair, to retrace its trajectory: `timesteps` then holds the N - 1 evaluations
        that are left, the first of them at the pair's inner state. Neither is needed after `turn_round`.
        Raises ValueError for inverse with gamma = 0, or where a pair was made with other steps or another
        configuration.
        """
        way = self._direction(num_inference_steps, inverse, last_sample)
        super().set_timesteps(num_inference_steps, device)  # type: ignore[misc, unused-ignore]
        times = self.timesteps.tolist()
        levels = [self.final_alpha_cumprod.item(), *(self.alphas_cumprod[t].item() for t in times[::-1])]
        self._start(way, {"alphas_cumprod": levels}, times, device)

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Take one step in the direction that `set_timesteps` chose.

        model_output, sample: (B, …); the result has the sample's dtype. Deterministic: eta must be 0; clipped outputs,
        generator and variance_noise are ignored. Without a `last_sample` the first step is DDIM's.
        Raises ValueError where eta is not 0, timesteps were not set or changed since, or a loop starts from a state
        that it cannot start from, TypeError for a pair in place of a sample. Warns (`RetraceWarning`) where a pair of
        integers was retraced and did not return to the start of its trajectory.
        """
        if eta:
            raise ValueError(f"eta: expected 0, since BDIA is deterministic, got {eta}")
        out, x0 = self._advance(model_output, timestep, sample)
        if not return_dict:
            return out, x0
        return as_output(traced(), DDIMSchedulerOutput, out, "pred_original_sample", x0)

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "prediction_type": self.config.prediction_type}

    def _watched(self) -> tuple[Any, ...]:
        return self.config.gamma, self.config.prediction_type

    def _reading(self, level: float) -> tuple[float, float, float, float]:
        x0_sample, x0_output, eps_sample, eps_output = reading(self.config.prediction_type, level)
        return float(x0_sample), float(x0_output), float(eps_sample), float(eps_output)

    def _transfer(self, i: int, j: int) -> tuple[float, float]:
        """DDIM's step a·z + b·eps from level i to level j (BDIA eq. 6 and 8)."""
        here, there = self._levels[i], self._levels[j]
        a = math.sqrt(there / here)
        return a, math.sqrt(1.0 - there) - math.sqrt(1.0 - here) * a
