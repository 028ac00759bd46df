"""Steps with their log-probability, as policy-gradient trainers call them, on accelerated schedulers.

The signatures are those of the functions used by published trainers: Flow-GRPO's for flow matching, DDPO's for
DDIM. A state that is formed here and one that is given have the same log-probability, bit for bit; it is that of the
rounded state. A step whose standard deviation is 0 has no density: its log-probability is 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bicm_diffusion.adapters.diffusers.drawing import Generators
from bicm_diffusion.described import described
from bicm_diffusion.samplers.checks import check_state
from bicm_kernels import affine_step, gaussian_log_prob, gaussian_step, pseudo_huber

#: A number for the batch, or one for each sample.
Number: TypeAlias = float | Tensor


def wide(x: Tensor) -> Tensor:
    """A tensor in float32; float64 tensors unchanged."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def timesteps_of(timestep: Any, batch: int) -> list[Any]:
    """The timesteps of a batch, or its single one; raises TypeError, ValueError for others, or another number."""
    if not isinstance(timestep, Tensor | Real) and getattr(timestep, "ndim", None) == 0:
        timestep = timestep.item()  # NumPy's
    if not isinstance(timestep, Tensor | Real):
        raise TypeError(f"timestep: expected a number or a tensor, got {described(timestep)}")
    if not isinstance(timestep, Tensor) or timestep.dim() == 0:
        return [timestep]
    if timestep.dim() != 1 or len(timestep) not in (1, batch) or not len(timestep):
        expected = f"one, or one for each of {batch}" if batch else "one for an empty batch"
        raise ValueError(f"timestep: expected {expected}, got shape {tuple(timestep.shape)}")
    first = timestep[:1]
    return [*(first if bool((timestep == first).all()) else timestep)]


def scheduled(timestep: Any, batch: int, known: Sequence[float]) -> list[int]:
    """The timesteps of a batch, or its single one, as whole numbers; raises ValueError for one that is not known."""
    given = [t.item() if isinstance(t, Tensor) else t for t in timesteps_of(timestep, batch)]
    if not all(t in known for t in given):
        raise ValueError(f"timestep: expected timesteps of the schedule, {_some(known)}, got {_some(given)}")
    return [int(t) for t in given]


def check_range(name: str, value: Any, least: float, most: float = math.inf) -> None:
    """Raise unless an argument is a number in a range."""
    if not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {described(value)}")
    number = float(value)
    if not (least <= number <= most and math.isfinite(number)):
        expected = f"of at least {least:g}" if most == math.inf else f"in [{least:g}, {most:g}]"
        raise ValueError(f"{name}: expected a number {expected}, got {value}")


def _some(numbers: Sequence[Any]) -> str:
    words = [f"{x:.9g}" if isinstance(x, float) else str(x) for x in numbers]
    return ", ".join(words if len(words) <= 8 else [*words[:4], "…", *words[-2:]])


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
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The next state in a dtype, formed or given, and its log-probability (B,) under the mean of tensors and weights.

    like: the template for a generator's noise, the model's output. at: the step that keys the noise, or that of
    every sample.
    """
    state = tensors[0]
    if prev_sample is None:
        if scheduler._noise == "keyed":
            seed, sample_id = scheduler._key(generator, state, at[0] if len(at) == 1 else tuple(at))
            step = at[0] if len(at) == 1 else torch.tensor(at, device=state.device)
            formed = gaussian_step(tensors, weights, std=std, seed=seed, step=step, sample_id=sample_id)
            if formed[0].dtype is dtype:
                return formed
            prev_sample = formed[0]
        else:
            noise = scheduler._drawn(like, state, generator)
            with torch.no_grad():
                prev_sample = affine_step([*tensors, noise], [*weights, std])
    # A caller gets, and gives back, the rounded state.
    prev_sample = prev_sample.to(dtype)
    return prev_sample, gaussian_log_prob(prev_sample.detach(), tensors, weights, std=std)


class FlowLogProb:
    """The log-probability of stochastic steps of flow matching."""

    sigmas: Tensor
    timesteps: Tensor

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
        constants. noise_level: at least 0, for "cps" at most 1.

        Returns (prev_sample, log_prob, prev_sample_mean, std_dev_t): states in float32 (float64 where sample is),
        log_prob (B,) as a mean over elements, std_dev_t (B, 1, …), or (1, 1, …) for a single timestep without a
        dimension; then √(-dt) if return_sqrt_dt. The step
        index is unchanged. log_prob and the mean are differentiable in model_output, the former by a kernel.
        Raises TypeError, ValueError for an argument of another type, shape or range, or levels that do not fall.
        """
        check_states(model_output, sample, prev_sample, generator)
        if sde_type not in FORMULAS:
            raise ValueError(f"sde_type: expected 'sde' or 'cps', got {sde_type!r}")
        formula, most = FORMULAS[sde_type]
        check_range("noise_level", noise_level, 0.0, most)
        scheduler: Any = self
        indices = [self._index_of(t) for t in timesteps_of(timestep, len(sample))]
        levels = self.sigmas.double().tolist()
        rows = [_row(formula, levels, i, float(noise_level)) for i in indices]
        of_state, of_output, std, told, root = per_sample(rows, sample)
        tensors = [wide(sample), wide(model_output)]
        given = None if prev_sample is None else wide(prev_sample)
        weights = [of_state, of_output]
        mean = affine_step(tensors, weights)
        if sde_type == "cps" and given is not None:
            after = given
        else:
            after, log_prob = with_log_prob(
                scheduler, tensors, weights, std, given, generator, tensors[1], indices, tensors[0].dtype
            )
        if sde_type == "cps":
            squares = pseudo_huber(mean, after.detach(), kind="squared", reduction="none")
            log_prob = -squares / math.prod(sample.shape[1:])
        # As in the published functions: a row for each sample where timesteps have a dimension.
        count = len(sample) if isinstance(timestep, Tensor) and timestep.dim() else 1
        about = [
            torch.as_tensor(x, dtype=torch.float32, device=sample.device)
            .repeat(count if torch.as_tensor(x).numel() == 1 else 1)
            .reshape(count, *[1] * (sample.dim() - 1))
            for x in (told, root)
        ]
        return (after, log_prob, mean, *about[: 1 + return_sqrt_dt])

    def _index_of(self, timestep: Any) -> int:
        """The index of a timestep; raises ValueError for one that is not of the schedule."""
        scheduler: Any = self
        try:
            index: int = scheduler.index_for_timestep(timestep)
        except IndexError:
            known, given = _some(self.timesteps.tolist()), _some([float(timestep)])
            raise ValueError(f"timestep: expected timesteps of the schedule, {known}, got {given}") from None
        return index


def _row(formula: Any, levels: Sequence[float], index: int, noise_level: float) -> tuple[float, ...]:
    """A formula's numbers of the step at an index; raises ValueError where it has none."""
    here, below = levels[index], levels[index + 1]
    if below > here:
        raise ValueError(f"sigmas: expected levels that fall, as without invert_sigmas, got {below:g} after {here:g}")
    try:
        row: tuple[float, ...] = formula(here, below, levels[1], noise_level)
    except (ArithmeticError, ValueError):
        raise ValueError(f"timestep: expected a step of levels in (0, 1], got {here:g} to {below:g}") from None
    return row


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


#: By the type of an SDE, its formula and the largest noise level that it is defined for.
FORMULAS = {"sde": (_sde, math.inf), "cps": (_cps, 1.0)}
