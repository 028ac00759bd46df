"""Training of the digits' noise predictor by denoising score matching, resumable to the bit."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from bicm_diffusion.digits import checkpoints
from bicm_diffusion.digits.data import Digits, load_split
from bicm_diffusion.digits.network import NO_LABEL, Denoiser, NetworkConfig
from bicm_diffusion.ema import update_average
from bicm_diffusion.schedules import vp_alpha_sigma
from bicm_kernels import add_noise, fold_in, normal, uniform

REPORT_EVERY = 1000
WEIGHTS = Path(__file__).parent / "weights" / "denoiser.safetensors"
# Purposes that need random numbers of their own beside the noise: each gets its key from the run's seed.
ORDER, TIMES, LABEL_DROP, INITIAL, DROPOUT, EVALUATION = range(1, 7)


class BatchConfig(Protocol):
    """What the choice of a batch and of its labels wants to know of a run."""

    @property
    def seed(self) -> int:
        """Return the run's seed."""

    @property
    def batch_size(self) -> int:
        """Return the number of images in a batch."""

    @property
    def label_drop(self) -> float:
        """Return the share of labels that are left out."""


@dataclass(frozen=True)
class TrainingConfig:
    """What a run depends on beside the network: runs with equal configurations give equal bits."""

    seed: int = 0
    steps: int = 8_000
    batch_size: int = 100
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warmup: int = 200
    label_drop: float = 0.1
    ema: float = 0.999


@dataclass
class TrainingState:
    """The run after `step` steps."""

    step: int
    network: Denoiser
    average: Denoiser
    optimizer: torch.optim.AdamW


def start(config: TrainingConfig, network: NetworkConfig) -> TrainingState:
    """Return the state before the first step; a pure function of its arguments."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold_in(config.seed, INITIAL))
        model = Denoiser(network)
    average = Denoiser(network)
    average.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.99)
    )
    return TrainingState(0, model, average.requires_grad_(False), optimizer)


def train_step(state: TrainingState, config: TrainingConfig, data: Digits) -> float:
    """Advance the state by one step and return its loss, mean |eps(alpha·x + sigma·n, t) - n|²."""
    step = state.step
    # Dropout draws from torch's own generator: seeding it per step keeps the run a function of (seed, step).
    torch.manual_seed(fold_in(fold_in(config.seed, DROPOUT), step))
    state.network.train()
    for group in state.optimizer.param_groups:
        group["lr"] = config.learning_rate * _learning_rate_factor(step, config)
    state.optimizer.zero_grad(set_to_none=True)
    chosen = batch_indices(step, len(data.images), config)
    labels = dropped_labels(data.labels[chosen], step, config)
    loss = denoising_loss(state.network, data.images[chosen], labels, stratified_times(step, config), config.seed, step)
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(state.network.parameters(), 1.0)
    state.optimizer.step()
    state.step = step + 1
    update_average(state.average, state.network, step=state.step, decay=config.ema)
    return loss.item()


def denoising_loss(network: Denoiser, x: Tensor, labels: Tensor, times: Tensor, seed: int, step: int) -> Tensor:
    """Return mean |eps(alpha·x + sigma·n, t) - n|², n keyed by (seed, place in the batch, step)."""
    alpha, sigma = vp_alpha_sigma(times)
    z = add_noise(x, sigma, scale=alpha, seed=seed, step=step)
    noise = normal(x.shape, seed=seed, step=step, dtype=x.dtype)
    return functional.mse_loss(network(z, times, labels), noise)


def batch_indices(step: int, count: int, config: BatchConfig) -> Tensor:
    """Return the images of this step: an epoch is a keyed permutation less its incomplete last batch."""
    per_epoch = max(1, count // config.batch_size)
    keys = uniform((count,), seed=fold_in(config.seed, ORDER), step=step // per_epoch)
    first = step % per_epoch * config.batch_size
    return torch.argsort(keys, stable=True)[first : first + config.batch_size]


def stratified_times(step: int, config: TrainingConfig) -> Tensor:
    """Return (B,) float64 times in (0, 1], one in every B-th of it, for a loss that varies less."""
    count = config.batch_size
    jitter = uniform((count,), seed=fold_in(config.seed, TIMES), step=step, dtype=torch.float64)
    return (torch.arange(count, dtype=torch.float64) + jitter) / count


def dropped_labels(labels: Tensor, step: int, config: BatchConfig) -> Tensor:
    """Return the labels with a share `label_drop` of them replaced by `NO_LABEL`."""
    draws = uniform(labels.shape, seed=fold_in(config.seed, LABEL_DROP), step=step)
    return torch.where(draws <= config.label_drop, NO_LABEL, labels)


@torch.no_grad()
def evaluate(network: Denoiser, data: Digits, *, repeats: int = 20) -> float:
    """Return the loss over data with their labels, `repeats` noises and evenly spread times each."""
    network.eval()
    count = len(data.images)
    # Steps of the golden ratio spread the times of one image, and of all, over the interval.
    grid = (torch.arange(count * repeats, dtype=torch.float64) * 0.618033988749895 + 0.5) % 1.0
    losses = [
        denoising_loss(network, data.images, data.labels, grid[k * count : (k + 1) * count], EVALUATION, k).item()
        for k in range(repeats)
    ]
    return math.fsum(losses) / repeats


def train(
    config: TrainingConfig,
    network: NetworkConfig,
    *,
    checkpoint: Path,
    checkpoint_every: int,
    progress: bool = True,
) -> TrainingState:
    """Run to `config.steps`, going on from the checkpoint where there is one, and return the last state.

    Raises ValueError where the checkpoint belongs to another configuration.
    """
    state = resume(checkpoint, config, network) if checkpoint.exists() else start(config, network)
    split = load_split()
    mean_loss = math.nan
    with tqdm(total=config.steps, initial=state.step, unit="step", disable=not progress) as bar:
        while state.step < config.steps:
            loss = train_step(state, config, split.train)
            mean_loss = loss if math.isnan(mean_loss) else 0.99 * mean_loss + 0.01 * loss
            bar.update()
            rate = (bar.format_dict["rate"] or 0.0) * config.batch_size
            bar.set_postfix_str(f"loss {mean_loss:.4f}, {rate:.0f} images/s", refresh=False)
            if state.step % checkpoint_every == 0 or state.step == config.steps:
                save_checkpoint(checkpoint, state, config)
            if state.step % REPORT_EVERY == 0:
                held_out = evaluate(state.average, split.held_out)
                bar.write(f"step {state.step}: loss on held-out images {held_out:.4f}")
    return state


def save_checkpoint(path: Path, state: TrainingState, config: TrainingConfig) -> None:
    """Write the whole state; a kill at any moment leaves the former file or the new one, whole."""
    content = {
        "step": state.step,
        **_configurations(config, state.network.config),
        "network": state.network.state_dict(),
        "average": state.average.state_dict(),
        "optimizer": state.optimizer.state_dict(),
    }
    checkpoints.save_checkpoint(path, content)


def resume(path: Path, config: TrainingConfig, network: NetworkConfig) -> TrainingState:
    """Return the state that `save_checkpoint` wrote; raises ValueError for another configuration."""
    content = checkpoints.load_checkpoint(path, _configurations(config, network))
    state = start(config, network)
    state.network.load_state_dict(content["network"])
    state.average.load_state_dict(content["average"])
    state.optimizer.load_state_dict(content["optimizer"])
    state.step = content["step"]
    return state


def save_weights(path: Path, state: TrainingState, config: TrainingConfig, notes: dict[str, str]) -> None:
    """Write the averaged weights, with both configurations and the notes as metadata, in one atomic move."""
    metadata = {
        "network": json.dumps(asdict(state.average.config)),
        "training": json.dumps(asdict(config)),
        "steps": str(state.step),
        **notes,
    }
    checkpoints.save_weights(path, state.average.state_dict(), metadata)


def load_denoiser(path: Path = WEIGHTS, *, dtype: torch.dtype = torch.float32) -> Denoiser:
    """Return the trained network, ready for evaluation, computing in `dtype`.

    Raises FileNotFoundError where there is no such file.

    >>> load_denoiser().config.fine_channels > 0
    True
    """
    tensors, metadata = checkpoints.load_weights(path, "train-denoiser")
    widths = json.loads(metadata["network"])
    known = {f.name for f in fields(NetworkConfig)}
    network = Denoiser(NetworkConfig(**{k: v for k, v in widths.items() if k in known}))
    network.load_state_dict(tensors)
    return network.requires_grad_(False).eval().to(dtype)


def read_metadata(path: Path = WEIGHTS) -> dict[str, str]:
    """Return the notes in a weights file: configurations, command, date, steps, losses."""
    return checkpoints.load_weights(path, "train-denoiser")[1]


def _configurations(config: TrainingConfig, network: NetworkConfig) -> dict[str, dict[str, Any]]:
    return {"config": asdict(config), "network_config": asdict(network)}


def _learning_rate_factor(step: int, config: TrainingConfig) -> float:
    warm = min(1.0, (step + 1) / config.warmup)
    return warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))
