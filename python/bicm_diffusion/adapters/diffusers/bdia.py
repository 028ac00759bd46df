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

from bicm_diffusion.adapters.diffusers.ddim import PREDICTIONS, reading
from bicm_diffusion.adapters.diffusers.drawing import traced
from bicm_diffusion.adapters.diffusers.integers import Integers
from bicm_diffusion.adapters.diffusers.outputs import as_output, as_state
from bicm_diffusion.adapters.diffusers.retrace import METHOD, Retraced, check_no_pair, check_start
from bicm_diffusion.adapters.diffusers.tables import version_of
from bicm_diffusion.described import described
from bicm_diffusion.rational import MAX_DENOMINATOR, nearest
from bicm_diffusion.samplers.notices import warn
from bicm_diffusion.samplers.record import Record, hand_out
from bicm_diffusion.samplers.states import ExactPair
from bicm_kernels import denoised_step

#: Options of other schedulers that change samples or levels and that no step here heeds.
_IGNORED = (
    "clip_sample",
    "thresholding",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "use_flow_sigmas",
    "use_dynamic_shifting",
)


class BDIADDIMScheduler(Retraced, DDIMScheduler):
    """BDIA-DDIM (BDIA eq. 24) and its inversion (eq. 28), wherever diffusers takes a DDIMScheduler.

    gamma in [0, 1]: 1 is time-symmetric, 0 is DDIM; inversion needs gamma > 0. exact: the states are integers, gamma is
    the nearest fraction with a denominator up to 1024, and a trajectory that is retraced returns every bit, given a
    network that returns the same bits twice; True by default, as in `bdia_sample`. False keeps floats, as gamma = 0,
    which has no inverse, always does. The other arguments are DDIMScheduler's; predicted samples are never
    clipped, since a clipped step has no inverse. After a loop `pair` holds what the trajectory is retraced from: by
    `turn_round()` here, by `turn_round(pair)` in another scheduler or process, with as many steps and the same
    configuration. `set_timesteps(..., last_sample=...)` takes the other state of a pair as a tensor.
    Raises ValueError for a gamma or a prediction type out of range.

    >>> scheduler = BDIADDIMScheduler(gamma=0.96)
    >>> scheduler.set_timesteps(4)
    >>> scheduler.timesteps.tolist()
    [750, 500, 250, 0]
    """

    # The path under which saved pipelines name it.
    __module__ = "bicm_diffusion.adapters.diffusers"

    #: The tensors that `set_timesteps` made or read, with their versions.
    _given: tuple[tuple[str, Tensor, int | None], ...] = ()
    _configured: tuple[float, str] | None = None
    _begin_index: int | None = None
    _inverse = False
    config: Any
    timesteps: Tensor
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
        if not 0.0 <= gamma <= 1.0:
            raise ValueError(f"gamma: expected a value in [0, 1], got {gamma}")
        if exact and gamma and not nearest(gamma)[0]:
            raise ValueError(f"gamma: with exact=True, expected 0 or at least 1/{MAX_DENOMINATOR}, got {gamma}")
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
        self._ratio: tuple[int, int] | None = None
        self._levels: list[float] = []
        self._indices = []
        self._times: list[int] = []

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Make a scheduler of another one's configuration, as diffusers' `from_config` does.

        Raises ValueError for levels that BDIA-DDIM does not have: zero terminal SNR, flow matching, EDM's; TypeError
        for a scheduler in place of its configuration. Warns of options that are on in another class's configuration and
        have no part in a step that can be inverted, as clipping and thresholding.
        """
        if not (config is None or isinstance(config, Mapping)):
            hint = "; pass its .config" if hasattr(config, "config") else ""
            raise TypeError(f"config: expected a scheduler's configuration, got {described(config)}{hint}")
        known: Mapping[str, Any] = config or {}
        if known.get("rescale_betas_zero_snr"):
            given = known["rescale_betas_zero_snr"]
            raise ValueError(
                f"rescale_betas_zero_snr: expected False, got {given!r}: at the first level z is noise alone"
            )
        if "num_train_timesteps" in known and "beta_schedule" not in known:
            raise ValueError(f"config: expected one with a beta_schedule, got one with {', '.join(known)}")
        ignored = [name for name in _IGNORED if {**known, **kwargs}.get(name)]
        if ignored and "gamma" not in known:  # its own keeps them for the class that they came from
            warn(f"BDIADDIMScheduler ignores {', '.join(ignored)}, on in this configuration", UserWarning)
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @property
    def begin_index(self) -> int | None:
        """The step that the next loop starts at, if it was set."""
        return self._begin_index

    @property
    def step_index(self) -> int | None:
        """The step that comes next, counted from the first of `timesteps`."""
        return self._at

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Set the step that the next loop starts at."""
        self._begin_index = begin_index

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
        Raises ValueError where inverse meets gamma = 0, or where a pair was made with other steps or another
        configuration.
        """
        check_no_pair("last_sample", last_sample)
        turned = self._turned and inverse is None and last_sample is None
        pair, made = self._next if turned else None, None
        if pair is not None:
            made, last_sample = pair.record, pair.z
        elif last_sample is not None and last_sample is self._reached:
            if self._at != len(self._indices):
                raise ValueError(
                    "last_sample: expected a state that a loop ended in, got one from the middle of a loop"
                )
            made = self._record
        if turned:
            inverse = made is None or made.index == 0
        if inverse and self.config.gamma == 0.0:
            raise ValueError("inverse: expected gamma > 0 in the configuration, got 0")
        if made is not None and made.steps != num_inference_steps:
            raise ValueError(
                f"num_inference_steps: expected {made.steps}, as the pair was made in, got {num_inference_steps}"
            )
        super().set_timesteps(num_inference_steps, device)  # type: ignore[misc, unused-ignore]
        self._times = self.timesteps.tolist()
        count = len(self._times)
        # Index N is the noisiest level and 0 the data, as in the paper.
        self._levels = [self.final_alpha_cumprod.item(), *(self.alphas_cumprod[t].item() for t in self._times[::-1])]
        if self._record is not None and self._reached is not None and self._at == len(self._indices):
            hand_out(self._reached, self._record)
        self._record = self._recorded(bool(inverse))
        if made is not None:
            self._record.check(made, "set_timesteps", "turn_round", pair="pair", levels="scheduler")
        self._ratio = nearest(self.config.gamma) if self._exact else None
        self._integers, self._made = None, None if self._edit else made
        if isinstance(pair, ExactPair) and self._ratio is not None and self._inner is not None:
            self._integers = Integers.turned(pair, self._ratio, self._inner)
        self._turned, self._edit, self._next, self._inner, self._inverse = False, False, None, None, bool(inverse)
        self._begin_index, self._at, self.last_sample, self._reached = None, None, last_sample, None
        if inverse:
            self._indices = [*range(1 if last_sample is not None else 0, count)]
        else:
            self._indices = [*range(count - 1 if last_sample is not None else count, 0, -1)]
        # The data level has no timestep: the model is asked there about the first one above it.
        self._times = [self._times[count - max(i, 1)] for i in self._indices]
        self.timesteps = torch.tensor(self._times, dtype=torch.int64).to(device)
        given = {"timesteps": self.timesteps, "alphas_cumprod": self.alphas_cumprod}
        self._given = tuple((name, x, version_of(x)) for name, x in given.items())
        self._configured = self.config.gamma, self.config.prediction_type

    def _recorded(self, inverse: bool) -> Record:
        times = tuple(float(t) for t in reversed(self._times))
        levels = {"alphas_cumprod": tuple(self._levels), "timesteps": (times[0], *times)}
        return Record(METHOD, levels, self._settings(), len(times) if inverse else 0)

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
        generator and variance_noise have no part in it. Without a `last_sample` the first step is DDIM's.
        Raises ValueError where eta is not 0, timesteps were not set or changed since, or a loop starts from a state
        that it cannot start from, TypeError for a pair in place of a sample. Warns (`RetraceWarning`) where a pair of
        integers was retraced and did not come back to what its trajectory began with.
        """
        if eta:
            raise ValueError(f"eta: expected 0, since BDIA is deterministic, got {eta}")
        check_no_pair("sample", sample)
        if not self._indices:
            raise ValueError("timesteps: expected a call of set_timesteps before the first step")
        if not traced():
            self._check_given()
        if self._at is None:
            self._at = self._first(timestep)
            self._whole = self._at == 0
            if self._record is not None and not traced():
                check_start(sample, self.last_sample, self._record)
        if self._at >= len(self._indices):
            raise ValueError(
                f"timesteps: expected at most {len(self._indices)} steps, got one more; set_timesteps first"
            )
        i = self._indices[self._at]
        x0_sample, x0_output, eps_sample, eps_output = (
            float(x) for x in reading(self.config.prediction_type, self._levels[max(i, 1)])
        )
        last = self.last_sample
        of_last, of_sample, of_eps = self._weights(i, last is not None)
        weights = [of_sample + of_eps * eps_sample, of_eps * eps_output, of_last]
        state = as_state(sample, model_output)
        if self._ratio is not None:
            if self._integers is None:
                self._integers = Integers(state, last, self._ratio)
            out, x0 = self._integers.step(
                state,
                model_output,
                weights[:2],
                x0_weights=[x0_sample, x0_output],
                inverse=self._inverse,
                mark=i + self._inverse,
            )
        else:
            tensors = [state, model_output] if last is None else [state, model_output, last]
            count = len(tensors)
            out, x0, _ = denoised_step(tensors, [x0_sample, x0_output, 0.0][:count], weights[:count], x0_weight=0.0)
        self.last_sample, self._reached = sample, out
        self._at += 1
        if self._at == len(self._indices) and self._made is not None and not traced():
            self._report(self._made)
        if not return_dict:
            return out, x0
        return as_output(traced(), DDIMSchedulerOutput, out, "pred_original_sample", x0)

    def _check_given(self) -> None:
        """Raise where what the loop's weights were made of is no longer what it was: no pair could say what made it."""
        if self._record is not None and self._configured != (self.config.gamma, self.config.prediction_type):
            raise ValueError(
                "config: expected gamma and prediction_type as at set_timesteps, but they were changed since"
            )
        for name, x, version in self._given:
            if getattr(self, name) is not x or version_of(x) != version:
                raise ValueError(f"{name}: expected what set_timesteps made or read, but it was changed since")

    def _first(self, timestep: Any) -> int:
        if self._begin_index is not None:
            return self._begin_index
        value = int(timestep)
        if value not in self._times:
            raise ValueError(f"timestep: expected one of {self._times}, got {value}")
        return self._times.index(value)

    def _weights(self, i: int, paired: bool) -> tuple[float, float, float]:
        """Weights of the last state, of the current one at index i and of its predicted noise.

        With integers, both directions add or subtract the same increment: its weights are the way down's.
        """
        if not paired:
            return 0.0, *self._transfer(i, i + 1 if self._inverse else i - 1)
        gamma = self.config.gamma if self._ratio is None else self._ratio[0] / self._ratio[1]
        (down, down_eps), (up, up_eps) = self._transfer(i, i - 1), self._transfer(i, i + 1)
        if self._inverse and self._ratio is None:
            return 1.0 / gamma, up - down / gamma, up_eps - down_eps / gamma
        return gamma, down - gamma * up, down_eps - gamma * up_eps

    def _transfer(self, i: int, j: int) -> tuple[float, float]:
        """DDIM's step a·z + b·eps from level i to level j (BDIA eq. 6 and 8)."""
        here, there = self._levels[i], self._levels[j]
        a = math.sqrt(there / here)
        return a, math.sqrt(1.0 - there) - math.sqrt(1.0 - here) * a
