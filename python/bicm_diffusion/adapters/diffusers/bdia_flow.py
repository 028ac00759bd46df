"""BDIA on rectified flows as a diffusers scheduler, in both directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor

from bicm_diffusion.adapters.diffusers.bdia_steps import BdiaSteps, check_gamma
from bicm_diffusion.adapters.diffusers.drawing import Generators, traced
from bicm_diffusion.adapters.diffusers.outputs import as_output


class BDIAFlowMatchScheduler(BdiaSteps, FlowMatchEulerDiscreteScheduler):
    """BDIA (eq. 23) on the levels of flow matching and its inversion, wherever diffusers takes a flow-matching Euler.

    A step is z_{i-1} = γ·z_{i+1} + Δ(i → i-1) - γ·Δ(i → i+1), Δ(i → j) = z_i + (σ_j - σ_i)·v: for SD3, Flux and
    other models that predict v = n - x. gamma in [0, 1]: 1 is time-symmetric (leapfrog), 0 is Euler's; inversion needs
    gamma > 0. exact: the states are integers, gamma is the nearest fraction with a denominator up to 1024, and a
    retraced trajectory returns every bit, given a network that returns the same bits twice; False keeps floats,
    as gamma = 0, which has no inverse, always does. The other arguments are those of FlowMatchEulerDiscreteScheduler,
    whose levels these are, and `mu` is given to `set_timesteps` as there; stochastic sampling has no inverse. After a
    loop `pair` holds the states to retrace it from: by `turn_round()` here, by `turn_round(pair)` in another
    scheduler or process, with as many steps, the same configuration and the same mu.
    Raises ValueError for a gamma out of range.

    >>> scheduler = BDIAFlowMatchScheduler(gamma=0.96, shift=3.0)
    >>> scheduler.set_timesteps(sigmas=[1.0, 0.5])
    >>> scheduler.timesteps.tolist()
    [1000.0, 750.0]
    """

    # The module path that saved pipelines record.
    __module__ = "bicm_diffusion.adapters.diffusers"

    _ignored = ("stochastic_sampling", "scale_factors")
    _sources = ("sigmas",)
    _gives_x0 = False
    config: Any
    sigmas: Tensor

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: str = "exponential",
        gamma: float = 1.0,
        exact: bool = True,
    ) -> None:
        check_gamma(gamma, exact)
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            shift=shift,
            use_dynamic_shifting=use_dynamic_shifting,
            base_shift=base_shift,
            max_shift=max_shift,
            base_image_seq_len=base_image_seq_len,
            max_image_seq_len=max_image_seq_len,
            invert_sigmas=invert_sigmas,
            shift_terminal=shift_terminal,
            use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas,
            time_shift_type=time_shift_type,  # type: ignore[arg-type, unused-ignore]
        )
        self._indices = []

    @classmethod
    def _refuse(cls, config: Mapping[str, Any]) -> None:
        if config and "shift" not in config:
            raise ValueError(f"config: expected one of flow matching, with a shift, got one with {', '.join(config)}")

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
        *,
        inverse: bool | None = None,
        last_sample: Tensor | None = None,
    ) -> None:
        """Set the timesteps of N steps from noise to data, or with inverse of N steps from data to noise.

        sigmas, mu, timesteps: as FlowMatchEulerDiscreteScheduler takes them, from noise to data in either direction.
        last_sample: the other state of a pair, to retrace its trajectory: `timesteps` then holds the N - 1 evaluations
        that are left, the first of them at the pair's inner state. Neither is needed after `turn_round`.
        `sigmas` then holds the levels in the loop's order, that of its end as the last.
        Raises ValueError for inverse with gamma = 0, or where a pair was made with other steps or another
        configuration.
        """
        steps = num_inference_steps
        if steps is None:
            steps = len(sigmas if sigmas is not None else timesteps)  # type: ignore[arg-type]
        way = self._direction(steps, inverse, last_sample)
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)  # type: ignore[misc, arg-type, unused-ignore]
        levels = self.sigmas.tolist()[::-1]
        given = self.timesteps.tolist()
        first = 1 if way[1] is not None else 0
        passed = levels[first:] if way[0] else levels[len(levels) - 1 - first :: -1]
        self.sigmas = torch.tensor(passed, dtype=self.sigmas.dtype).to(self.sigmas.device)
        self._start(way, {"sigmas": levels}, given, device)

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
        """Take one step in the direction that `set_timesteps` chose.

        model_output, sample: (B, …); the result has the sample's dtype. Deterministic: s_churn and its bounds, which
        diffusers' Euler step ignores too, and the generator are ignored. Without a `last_sample` the first step
        is Euler's.
        Raises ValueError where per_token_timesteps are given, timesteps were not set or changed since, or a loop starts
        from a state that it cannot start from, TypeError for a pair in place of a sample. Warns (`RetraceWarning`)
        where a pair of integers was retraced and did not return to the start of its trajectory.
        """
        if per_token_timesteps is not None:
            raise ValueError("per_token_timesteps: expected None, since all elements of a sample have the same level")
        out, _ = self._advance(model_output, timestep, sample)
        return as_output(traced(), FlowMatchEulerDiscreteSchedulerOutput, out) if return_dict else (out,)

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "prediction_type": "flow_prediction"}

    def _watched(self) -> tuple[Any, ...]:
        return (self.config.gamma,)

    def _reading(self, level: float) -> tuple[float, float, float, float]:
        return 1.0, -level, 0.0, 1.0

    def _transfer(self, i: int, j: int) -> tuple[float, float]:
        """Euler's step z + (σ_j - σ_i)·v from level i to level j: DDIM's of a flow."""
        return 1.0, self._levels[j] - self._levels[i]
