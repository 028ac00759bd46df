"""Noise levels of a batch on a schedule, and diffusion models there: a step of the ODE, differences of scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bicm_diffusion.consistency.frozen import asked
from bicm_diffusion.keys import LEVELS, device_of
from bicm_diffusion.objectives.evaluation import level_dtype, noise_key
from bicm_diffusion.samplers.checks import check_output
from bicm_diffusion.samplers.prediction import Level, Preconditioned, Prediction, denoised_weights, folded, read
from bicm_diffusion.schedules import Schedule
from bicm_kernels import affine_step, fold_in, pseudo_huber, uniform


def draw_indices(count: int, schedule: Schedule, *, seed: Any, step: Any, sample_id: Any) -> Tensor:
    """Return n of every sample, (count,) int64, uniform in 1 … N.

    >>> n = draw_indices(500, Schedule((0.0, 1.0, 2.0), (1.0,) * 3, (0.0, 1.0, 2.0)), seed=0, step=0, sample_id=0)
    >>> n.unique().tolist()
    [1, 2]
    """
    key: dict[str, Any] = {"seed": fold_in(seed, LEVELS), "step": step, "sample_id": sample_id}
    u = uniform((count, 1), **key, dtype=torch.float64, device=device_of(*key.values()))[:, 0]
    return (u * schedule.steps).ceil().long()


def levels_at(schedule: Schedule, index: Tensor, device: torch.device) -> Level:
    """Return time, alpha and sigma at the indices (B,) of a schedule, each (B,) float64 on a device."""
    return Level(*schedule.table.to(index.device)[:, index].to(device).unbind())


class Answer(NamedTuple):
    """A model's output at a state and a level."""

    state: Tensor
    level: Level
    output: Tensor


@dataclass(frozen=True)
class ScoreModel:
    """A diffusion model with its prediction type, called at the levels of a batch; all calls share their dropout masks.

    role: the caller's name of the model, for messages.
    """

    model: Callable[..., Tensor]
    prediction: Prediction
    alike: Callable[[], Any]
    role: str

    def __call__(self, state: Tensor, level: Level) -> Answer:
        """Call the model on a batch of states, each at its level."""
        given = state
        if isinstance(self.prediction, Preconditioned):
            given = affine_step([state], [self.prediction.input_scale(level)])
        with self.alike():
            times = torch.as_tensor(level.time, dtype=level_dtype(state))
            output = asked(self.model, (given, times), name=self.role)
        check_output(output, state, name=self.role)
        return Answer(state, level, output)

    def denoised_weights(self, level: Level) -> tuple[Any, Any]:
        """Return the weights of state and output in the denoised sample, also where alpha is 0."""
        if self.prediction == "flow":
            total = level.alpha + level.sigma
            return 1 / total, -level.sigma / total
        return denoised_weights(self.prediction, level)


@torch.no_grad()
def ode_step(model: ScoreModel, schedule: Schedule, x_n: Tensor, n: Tensor, *, heun: bool) -> Tensor:
    """Return x_{n-1} from x_n by one step of the probability-flow ODE, Euler's (SIGN eq. 2) or Heun's.

    The step is that of z/alpha over sigma/alpha, which for Euler's is DDIM's; of a velocity on a flow's schedule, that
    of z over sigma. Heun's is Euler's where it ends on a level at which the model is not called.
    x_n: (B, …). n: (B,) int64, in 1 … N.
    """
    high, low = (levels_at(schedule, index, x_n.device) for index in (n, n - 1))
    prediction = model.prediction
    first = model(x_n, high)
    if prediction == "flow" and schedule.flow:
        # dz/dt = v, which is defined at alpha = 0 too; it holds only where alpha + sigma = 1.
        one = high.sigma / high.sigma
        high, low, prediction = Level(high.time, one, high.sigma), Level(low.time, one, low.sigma), "noise"
    kept = low.alpha / high.alpha
    moved = low.sigma - high.sigma * kept
    of_first = read(prediction, high)
    x_s = affine_step([x_n, first.output], folded(of_first, kept, moved))
    if not heun:
        return x_s
    again = n - 1 >= schedule.lowest
    second = model(x_s, levels_at(schedule, (n - 1).clamp_min(schedule.lowest), x_n.device))
    again = again.to(x_n.device)
    # Where there is no second slope, its level is not used: sigma may be 0 there.
    end = Level(*(torch.where(again, a, b) for a, b in zip(low, high, strict=True)))
    of_second = read(prediction, end)
    half = moved * torch.where(again, 0.5, 0.0)
    of_state, of_output = folded(of_first, kept, moved - half)
    of_end, of_end_output = folded(of_second, torch.zeros_like(half), half)
    return affine_step([x_n, first.output, x_s, second.output], [of_state, of_output, of_end, of_end_output])


class _Injected(torch.autograd.Function):
    """An identity on an output whose gradient is passed to the sample."""

    @staticmethod
    def forward(ctx: Any, sample: Tensor, output: Tensor) -> Tensor:
        ctx.dtype = sample.dtype
        # In the wider dtype: the gradient is formed in the output's, and may leave a half's range.
        wide = torch.promote_types(sample.dtype, output.dtype)
        return output.view_as(output) if output.dtype == wide else output.to(wide)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].to(ctx.dtype), None


class _Valued(torch.autograd.Function):
    """A loss with another value and the same gradient."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, factor: Tensor) -> Tensor:
        return loss * factor.to(loss.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def matching_loss(
    sample: Tensor, learned: Answer, teacher: Answer, of: ScoreModel, *, weight: str, alpha_power: int
) -> Tensor:
    """Return ½‖g‖² of every sample, (B,), whose gradient is g = α^p·(D_l - D_d)/w (SIGN eq. 7).

    sample: f(z), which receives the gradient. learned, teacher: outputs at one state, predictions of one type,
    that of `of`. weight: "variance" has w = sigma², so that p = 1 is s_l - s_d; "normalised" the mean of |f(z) - D_d|.

    D_l - D_d is a number times the difference of the outputs: their squared distance, weighted by half of the factor
    in g, has gradient g, which is passed to the sample; its value differs by a factor per sample.
    """
    level = learned.level
    of_state, of_output = of.denoised_weights(level)
    if weight == "variance":
        scale = 1 / (level.sigma * level.sigma)
    else:
        with torch.no_grad():
            denoised = affine_step([teacher.state, teacher.output], [of_state, of_output])
            mean = pseudo_huber(sample.detach(), denoised, c=0.0, kind="elementwise", reduction="none")
            scale = torch.where(mean > 0, 1 / mean, 0.0)
    factor = level.alpha**alpha_power * of_output * scale
    options: dict[str, Any] = {"weight": factor / 2, "kind": "squared", "reduction": "none"}
    return _Valued.apply(pseudo_huber(_Injected.apply(sample, learned.output), teacher.output, **options), factor)


def learning_loss(learned: ScoreModel, sample: Tensor, schedule: Schedule, *, seed: Any, step: Any, ids: Any) -> Tensor:
    """Return the denoising loss of a model on samples, mean (output - goal)² over elements, at separately drawn levels.

    The goal is the exact prediction for alpha·x + sigma·n given x: the noise, v, x, or F.
    seed: that of the noise; levels have one folded from it.
    """
    n = draw_indices(len(sample), schedule, seed=seed, step=step, sample_id=ids)
    level = levels_at(schedule, n, sample.device)
    noise = noise_key(sample, seed, step, ids)
    of_state, of_output = learned.denoised_weights(level)
    noisy = affine_step([sample], [level.alpha], noise_weight=level.sigma, **noise)
    weights = (1 - of_state * level.alpha) / of_output, -of_state * level.sigma / of_output
    goal = affine_step([sample], [weights[0]], noise_weight=weights[1], **noise)
    elements = math.prod(sample.shape[1:])
    return pseudo_huber(learned(noisy, level).output, goal, kind="squared", weight=1 / max(1, elements))
