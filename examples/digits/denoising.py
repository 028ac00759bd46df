"""The noise predictor's objective, denoising score matching, and its trained weights."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from bicm_diffusion.schedules import vp_alpha_sigma
from bicm_kernels import add_noise, fold_in, normal, uniform
from examples.digits.checkpoints import load_network
from examples.digits.data import Digits, load_split
from examples.digits.network import Denoiser, NetworkConfig
from examples.digits.training import Loss, Objective, TrainingConfig

WEIGHTS = Path(__file__).parent / "weights" / "denoiser.safetensors"
# Purposes with separate random numbers, besides the noise: each gets its key from the run's seed.
TIMES, INITIAL, DROPOUT, EVALUATION = 2, 4, 5, 6


def batch_loss(network: Denoiser, batch: Digits, config: TrainingConfig, step: int) -> Loss:
    """Return the loss of one batch of a run."""
    # Dropout draws from torch's own generator: seeding it per step keeps the run a function of (seed, step).
    torch.manual_seed(fold_in(fold_in(config.seed, DROPOUT), step))
    times = stratified_times(step, config)
    loss = denoising_loss(network, batch.images, batch.labels, times, config.seed, step)
    return Loss(loss, {"loss": loss})


def denoising_loss(network: Denoiser, x: Tensor, labels: Tensor, times: Tensor, seed: int, step: int) -> Tensor:
    """Return mean |eps(alpha·x + sigma·n, t) - n|², n keyed by (seed, place in the batch, step)."""
    alpha, sigma = vp_alpha_sigma(times)
    z = add_noise(x, sigma, scale=alpha, seed=seed, step=step)
    noise = normal(x.shape, seed=seed, step=step, dtype=x.dtype)
    return functional.mse_loss(network(z, times, labels), noise)


def stratified_times(step: int, config: TrainingConfig) -> Tensor:
    """Return (B,) float64 times in (0, 1], stratified into B intervals to reduce the variance of the loss."""
    count = config.batch_size
    jitter = uniform((count,), seed=fold_in(config.seed, TIMES), step=step, dtype=torch.float64)
    return (torch.arange(count, dtype=torch.float64) + jitter) / count


@torch.no_grad()
def evaluate(network: Denoiser, data: Digits, *, repeats: int = 20) -> float:
    """Return the loss over data with their labels, `repeats` noises and evenly spread times each."""
    network.eval()
    count = len(data.images)
    # Golden-ratio steps distribute the times of one image, and of all, evenly over the interval.
    grid = (torch.arange(count * repeats, dtype=torch.float64) * 0.618033988749895 + 0.5) % 1.0
    losses = [
        denoising_loss(network, data.images, data.labels, grid[k * count : (k + 1) * count], EVALUATION, k).item()
        for k in range(repeats)
    ]
    return math.fsum(losses) / repeats


def figures(network: Denoiser) -> dict[str, float]:
    """Return the loss on the training images and on held-out ones."""
    return {f"loss_{name}": evaluate(network, part) for name, part in load_split()._asdict().items()}


DENOISING = Objective(Denoiser, batch_loss, figures, INITIAL, fused=False)


def load_denoiser(path: Path = WEIGHTS, *, dtype: torch.dtype = torch.float32) -> Denoiser:
    """Return the trained network, ready for evaluation, computing in `dtype`.

    Raises FileNotFoundError where there is no such file.

    >>> load_denoiser().config.fine_channels > 0
    True
    """
    known = {field.name for field in fields(NetworkConfig)}
    return load_network(
        path,
        "train-denoiser",
        lambda config: Denoiser(NetworkConfig(**{name: config[name] for name in config if name in known})),
        dtype=dtype,
    )
