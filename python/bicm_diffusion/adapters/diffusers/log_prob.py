"""Steps with their log-probability, as policy-gradient trainers call them, on accelerated schedulers.

The signatures are those of the functions used by published trainers: Flow-GRPO's for flow matching, DDPO's for
DDIM. A state that is formed here and one that is given have the same log-probability, bit for bit; it is that of the
rounded state. A step whose standard deviation is 0 has no density: its log-probability is 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bicm_diffusion.adapters.diffusers.arguments import numbers
from bicm_diffusion.adapters.diffusers.drawing import Generators
from bicm_diffusion.samplers.checks import check_state
from bicm_kernels import affine_step, gaussian_log_prob, gaussian_step, pseudo_huber

#: A number for the batch, or one for each sample.
Number: TypeAlias = float | Tensor


def wide(x: Tensor) -> Tensor:
    """A tensor in float32; float64 tensors unchanged."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def timesteps_of(timestep: Any, batch: int) -> list[Any]:
    """The timesteps of a batch, or its single one; raises ValueError for another number of them."""
    if not isinstance(timestep, Tensor) or timestep.dim() == 0:
        return [timestep]
    if timestep.dim() != 1 or len(timestep) not in (1, batch):
        raise ValueError(f"timestep: expected one, or one for each of {batch}, got shape {tuple(timestep.shape)}")
    first = timestep[:1]
    return [*(first if bool((timestep == first).all()) else timestep)]


def per_sample(rows: Sequence[Sequence[float]], like: Tensor) -> list[Number]:
    """Weights of one step, or one per sample, by name."""
    columns = list(zip(*rows, strict=True))
    if len(rows) == 1:
        return [column[0] for column in columns]
    return [torch.tensor(column, dtype=torch.float64, device=like.device) for column in columns]


def check_states(model_output: object, sample: object, prev_sample: object, generator: object) -> None:
    """Raise unless the states of a step are tensors of one shape, and noise is requested only without prev_sample."""
    check_state("sample", sample)
    assert isinstance(sample, Tensor)
    for name, x in (("model_output", model_output), ("prev_sample", prev_sample)):
        if name == "prev_sample" and x is None:
            continue
        check_state(name, x)
        if isinstance(x, Tensor) and x.shape != sample.shape:
            raise ValueError(f"{name}: expected shape {tuple(sample.shape)}, as sample has, got {tuple(x.shape)}")
    if prev_sample is not None and generator is not None:
        raise ValueError("generator: expected None with prev_sample, which needs no noise")


def with_log_prob(
    scheduler: Any,
    tensors: list[Tensor],
    weights: Sequence[Number],
    std: Number,
    prev_sample: Tensor | None,
    generator: Generators,
    like: Tensor,
    at: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The next state, formed or given, and its log-probability (B,) under the mean of tensors and weights.

    like: the template for a generator's noise, the model's output. at: the step that keys the noise, or that of
    every sample.
    """
    state = tensors[0]
    if prev_sample is None:
        if scheduler._noise == "keyed":
            seed, sample_id = scheduler._key(generator, state, at[0] if len(at) == 1 else tuple(at))
            step = at[0] if len(at) == 1 else torch.tensor(at, device=state.device)
            return gaussian_step(tensors, weights, std=std, seed=seed, step=step, sample_id=sample_id)
        noise = scheduler._drawn(like, state, generator)
        with torch.no_grad():
            prev_sample = affine_step([*tensors, noise], [*weights, std])
    recorded = prev_sample.detach()
    return prev_sample, gaussian_log_prob(recorded, tensors, weights, std=std)


class FlowLogProb:
    """The log-probability of stochastic steps of flow matching."""

    sigmas: Tensor

    def step_with_log_prob(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        noise_level: float = 0.7,
        prev_sample: Tensor | None = None,
        generator: Generators = None,
        sde_type: str = "sde",
        return_sqrt_dt: bool = False,
    ) -> tuple[Tensor, ...]:
        """Take a step of Flow-GRPO's SDE, or of CPS, or find the log-probability of one that was taken.

        model_output, sample: (B, …), computed with in float32. timestep: one of the schedule's, or (B,) of them.
        prev_sample: the state that was taken; None takes a new one, with noise from generator or from the scheduler's
        key. sde_type: "sde", or "cps", whose log-probability is the published one, -(prev_sample - mean)² without its
        constants.

        Returns (prev_sample, log_prob, prev_sample_mean, std_dev_t): states in float32 (float64 where sample is),
        log_prob (B,) as a mean over elements, std_dev_t (B, 1, …); then √(-dt) if return_sqrt_dt. The step
        index is unchanged. log_prob and the mean are differentiable in model_output, the former by a kernel.
        Raises TypeError, ValueError for an argument of another type, shape or range.
        """
        check_states(model_output, sample, prev_sample, generator)
        if sde_type not in ("sde", "cps"):
            raise ValueError(f"sde_type: expected 'sde' or 'cps', got {sde_type!r}")
        numbers(noise_level=noise_level)
        scheduler: Any = self
        indices = [scheduler.index_for_timestep(t) for t in timesteps_of(timestep, len(sample))]
        levels = self.sigmas.double().tolist()
        formula = _sde if sde_type == "sde" else _cps
        rows = [formula(levels[i], levels[i + 1], levels[1], noise_level) for i in indices]
        of_state, of_output, std, told, root = per_sample(rows, sample)
        tensors = [wide(sample), wide(model_output)]
        given = None if prev_sample is None else wide(prev_sample)
        weights = [of_state, of_output]
        mean = affine_step(tensors, weights)
        if sde_type == "cps" and given is not None:
            after = given
        else:
            step = with_log_prob(scheduler, tensors, weights, std, given, generator, tensors[1], indices)
            after, log_prob = step
        if sde_type == "cps":
            squares = pseudo_huber(mean, after.detach(), kind="squared", reduction="none")
            log_prob = -squares / math.prod(sample.shape[1:])
        columns = (-1, *[1] * (sample.dim() - 1))
        # As in the published functions: a row for each sample where timesteps are per sample.
        about = [torch.as_tensor(x, dtype=torch.float32, device=sample.device).reshape(columns) for x in (told, root)]
        return (after, log_prob, mean, *about[: 1 + return_sqrt_dt])


def _sde(here: float, below: float, second: float, noise_level: float) -> tuple[float, ...]:
    """Weights of state and velocity, the noise's deviation, σ_t and √(-dt)."""
    step = below - here
    spread = noise_level**2 * here / (1.0 - (second if here == 1.0 else here))
    of_state = 1.0 + spread * step / (2.0 * here)
    of_velocity = (1.0 + spread * (1.0 - here) / (2.0 * here)) * step
    return of_state, of_velocity, math.sqrt(spread * -step), math.sqrt(spread), math.sqrt(-step)


def _cps(here: float, below: float, _: float, noise_level: float) -> tuple[float, ...]:
    std, kept = below * math.sin(noise_level * math.pi / 2.0), below * math.cos(noise_level * math.pi / 2.0)
    of_velocity = (1.0 - here) * kept - here * (1.0 - below)
    return (1.0 - below) + kept, of_velocity, std, std, math.sqrt(here - below)
