"""Diagnostics of couplings of noise and data: the variance of the velocity, and the cost of transport.

A pair of data x and noise z defines the path x_t = x + t·z. The independent coupling is the usual one; a permutation of
the samples' noise by `sample_id` gives batch-OT's; a predictor gives the generator-augmented one (GC eq. 13 and 14), x̂
= f(x + t·z, t) and x̃_t = x̂ + t·z. z is the noise of training pairs, `normal(x.shape, seed=seed, step=step,
sample_id=sample_id)`. Every function returns one number per sample, float64: the mean over samples estimates the
paper's quantity, however they are split over batches and machines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from bicm_diffusion.objectives.evaluation import noise_key
from bicm_diffusion.samplers.checks import check_model, check_output, check_per_sample, check_state
from bicm_kernels import affine_step, normal

Number: TypeAlias = float | Tensor
Integer: TypeAlias = int | Tensor

#: A function of a noisy sample (B, …) and its level t (B,), which returns a sample: a denoiser, or a consistency model.
Prediction: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def velocity_variance(
    denoiser: Prediction,
    x: Tensor,
    t: Number,
    *,
    seed: Integer,
    step: Integer,
    sample_id: Integer = 0,
    predictor: Prediction | None = None,
) -> Tensor:
    """Return ‖ẋ_t - v_t(x_t)‖² of every sample, (B,) float64, whose mean is R̃_t (GC eq. 17).

    ẋ_t = z and v_t(x_t) = (x_t - D(x_t, t))/t, so that the difference is (D(x_t, t) - x̂)/t, without noise.

    denoiser: D(x_t, t), trained on the coupling that is measured. x: clean samples (B, …), floating. t: a noise level
    above 0, float, 0-d or (B,). predictor: f(x_t, t) of the generator-augmented coupling; None: x̂ is x. seed, step,
    sample_id: the key of the noise.
    Raises TypeError for arguments of another kind, and ValueError for a level out of range or an output of another
    shape.

    >>> velocity_variance(lambda x, t: 0 * x, torch.ones(2, 3), 2.0, seed=0, step=0)
    tensor([0.7500, 0.7500], dtype=torch.float64)
    """
    check_model(denoiser, "denoiser(x, t)", "denoiser")
    noise, levels = _drawn(x, t, seed, step, sample_id)
    _check_above_zero(t)
    clean = x if predictor is None else _predicted("predictor", predictor, x, noise, levels)
    denoised = _asked("denoiser", denoiser, affine_step([clean, noise], [1.0, levels]), levels)
    return _squares(denoised, clean) / levels.double() ** 2


@torch.no_grad()
def transport_cost(
    predictor: Prediction, x: Tensor, t: Number, *, seed: Integer, step: Integer, sample_id: Integer = 0
) -> Tensor:
    """Return ‖f(x_t, t) - z‖² of every sample, (B,) float64, whose mean is the transport cost c(t) (GC eq. 19).

    At t = 0, f(x, 0) = x, it is the cost of the coupling of x and z itself: independent, or batch-OT's by `sample_id`.

    predictor: f(x_t, t), the consistency model, which is not called at t = 0. x: clean samples (B, …), floating. t: a
    noise level of at least 0, float, 0-d or (B,). seed, step, sample_id: the key of the noise.
    Raises TypeError for arguments of another kind, and ValueError for a level out of range or an output of another
    shape.

    >>> transport_cost(lambda x, t: x, torch.zeros(1, 2), 1.0, seed=0, step=0)
    tensor([0.], dtype=torch.float64)
    """
    check_model(predictor, "predictor(x, t)", "predictor")
    noise, levels = _drawn(x, t, seed, step, sample_id)
    if not isinstance(t, Tensor) and t == 0:
        return _squares(x, noise)
    return _squares(_predicted("predictor", predictor, x, noise, levels), noise)


def transport_cost_derivative(
    predictor: Prediction,
    denoiser: Prediction,
    x: Tensor,
    t: Number,
    *,
    seed: Integer,
    step: Integer,
    sample_id: Integer = 0,
) -> Tensor:
    """Return -2⟨J_f(x_t, t)·w, w⟩ of every sample, (B,) float64, whose mean is c'(t) for the exact flow f (GC eq. 20).

    w = z - E[z|x_t] = (D(x_t, t) - x)/t; σ_t = t. The product with the Jacobian is one backward pass.

    predictor: f(x_t, t), differentiable in x_t, each sample's result from that sample alone. denoiser: D(x_t, t), of
    the independent coupling. x: clean samples (B, …), floating. t: a noise level above 0, float, 0-d or (B,). seed,
    step, sample_id: the key of the noise.
    Raises TypeError for arguments of another kind, and ValueError for a level out of range or an output of another
    shape.

    >>> transport_cost_derivative(lambda x, t: x, lambda x, t: 0 * x, torch.ones(1, 2), 2.0, seed=0, step=0)
    tensor([-1.], dtype=torch.float64)
    """
    check_model(predictor, "predictor(x, t)", "predictor")
    check_model(denoiser, "denoiser(x, t)", "denoiser")
    noise, levels = _drawn(x, t, seed, step, sample_id)
    _check_above_zero(t)
    with torch.no_grad():
        noisy = affine_step([x, noise], [1.0, levels])
        inverse = 1.0 / levels
        w = affine_step([_asked("denoiser", denoiser, noisy, levels), x], [inverse, -inverse])
    with torch.enable_grad():
        noisy = noisy.detach().requires_grad_()
        predicted = _asked("predictor", predictor, noisy, levels)
        (gradient,) = torch.autograd.grad(predicted, noisy, w.to(predicted.dtype))
    return -2.0 * _sums(gradient.double() * w.double())


def _drawn(x: Tensor, t: Number, seed: Integer, step: Integer, sample_id: Integer) -> tuple[Tensor, Tensor]:
    """The noise, and the level of every sample as networks take it."""
    check_state("x", x)
    check_per_sample("t", t, len(x))
    if not isinstance(t, Tensor) and not 0.0 <= t < float("inf"):
        raise ValueError(f"t: expected a finite noise level of at least 0, got {t}")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    noise = normal(x.shape, **noise_key(x, seed, step, sample_id), dtype=x.dtype, device=x.device)
    return noise, torch.as_tensor(t, dtype=dtype, device=x.device).expand(len(x)).contiguous()


def _check_above_zero(t: Number) -> None:
    if not isinstance(t, Tensor) and t == 0:
        raise ValueError("t: expected a noise level above 0, got 0")


def _predicted(name: str, predictor: Prediction, x: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
    """f(x + t·z, t); x where t is 0, where the network is not called."""
    tiny = torch.finfo(levels.dtype).tiny
    predicted = _asked(name, predictor, affine_step([x, noise], [1.0, levels]), levels.clamp_min(tiny))
    at_zero = (levels == 0).reshape(-1, *[1] * (x.dim() - 1))
    return torch.where(at_zero, x, predicted.to(x.dtype))


def _asked(name: str, function: Prediction, noisy: Tensor, levels: Tensor) -> Tensor:
    output = function(noisy, levels)
    check_output(output, noisy, name=name)
    return output


def _squares(first: Tensor, second: Tensor) -> Tensor:
    return _sums((first.double() - second.double()).square())


def _sums(terms: Tensor) -> Tensor:
    """The sum of each sample, (B,), also of samples (B,) of one element and of an empty batch."""
    return terms.unsqueeze(-1).flatten(1).sum(1)
