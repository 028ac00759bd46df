"""Training of the digits' bidirectional consistency model, resumable to the bit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from tqdm import tqdm

from bicm_diffusion.consistency.grid import P_MEAN, P_STD, LevelTable, discretization, karras_levels
from bicm_diffusion.consistency.objective import BctLoss, bct_loss, draw_levels
from bicm_diffusion.digits import checkpoints
from bicm_diffusion.digits.consistency_measurements import evaluate
from bicm_diffusion.digits.consistency_network import ConsistencyConfig, ConsistencyNetwork
from bicm_diffusion.digits.data import Digits, load_split
from bicm_diffusion.digits.training import batch_indices, dropped_labels
from bicm_diffusion.ema import update_average
from bicm_kernels import fold_in

REPORT_EVERY = 1000
WEIGHTS = Path(__file__).parent / "weights" / "consistency.safetensors"
# Purposes that need random numbers of their own: each gets its key from the run's seed.
INITIAL, OBJECTIVE = range(11, 13)

Log: TypeAlias = Callable[[str, float, int], object]


@dataclass(frozen=True)
class BctConfig:
    """What a run depends on beside the network: runs with equal configurations give equal bits."""

    seed: int = 0
    steps: int = 8_000
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: int = 200
    label_drop: float = 0.5
    ema: float = 0.999
    t_max: float = 20.0
    s0: int = 10
    s1: int = 320
    p_mean: float = P_MEAN
    p_std: float = P_STD
    c: float | None = None


@dataclass
class BctState:
    """The run after `step` steps."""

    step: int
    network: ConsistencyNetwork
    average: ConsistencyNetwork
    optimizer: torch.optim.AdamW


def start(config: BctConfig, network: ConsistencyConfig) -> BctState:
    """Return the state before the first step; a pure function of its arguments."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold_in(config.seed, INITIAL))
        model = ConsistencyNetwork(network)
    average = ConsistencyNetwork(network)
    average.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        betas=(0.9, 0.99),
        fused=True,
    )
    return BctState(0, model, average.requires_grad_(False).eval(), optimizer)


def level_table(step: int, config: BctConfig) -> LevelTable:
    """Return the levels of this step."""
    count = discretization(step, config.steps, s0=config.s0, s1=config.s1)
    return LevelTable(karras_levels(count, t_max=config.t_max), p_mean=config.p_mean, p_std=config.p_std)


def train_step(state: BctState, config: BctConfig, data: Digits) -> BctLoss:
    """Advance the state by one step and return its loss."""
    step = state.step
    state.network.train()
    for group in state.optimizer.param_groups:
        group["lr"] = config.learning_rate * _learning_rate_factor(step, config)
    state.optimizer.zero_grad(set_to_none=True)
    chosen = batch_indices(step, len(data.images), config)
    seed = int(fold_in(config.seed, OBJECTIVE))
    levels = draw_levels(level_table(step, config), len(chosen), seed=seed, step=step)
    labels = dropped_labels(data.labels[chosen], step, config)
    extra_args = {"labels": labels}
    loss = bct_loss(state.network, data.images[chosen], levels, seed=seed, step=step, extra_args=extra_args, c=config.c)
    torch.autograd.backward(loss.total)
    nn.utils.clip_grad_norm_(state.network.parameters(), 1.0)
    state.optimizer.step()
    state.step = step + 1
    update_average(state.average, state.network, step=state.step, decay=config.ema)
    return loss


def train(
    config: BctConfig,
    network: ConsistencyConfig,
    *,
    checkpoint: Path,
    checkpoint_every: int,
    log: Log | None = None,
    progress: bool = True,
) -> BctState:
    """Run to `config.steps`, going on from the checkpoint where there is one, and return the last state.

    log: called with (name, value, step) for both loss terms and what `REPORT_EVERY` steps bring.
    Raises ValueError where the checkpoint belongs to another configuration.
    """
    state = resume(checkpoint, config, network) if checkpoint.exists() else start(config, network)
    split = load_split()
    means: dict[str, float] = {}
    with tqdm(total=config.steps, initial=state.step, unit="step", disable=not progress, mininterval=1.0) as bar:
        while state.step < config.steps:
            loss = train_step(state, config, split.train)
            terms = {"consistency": loss.consistency.item(), "trajectory": loss.trajectory.item()}
            means = {name: 0.99 * means.get(name, value) + 0.01 * value for name, value in terms.items()}
            bar.update()
            rate = (bar.format_dict["rate"] or 0.0) * config.batch_size
            shown = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
            bar.set_postfix_str(f"{shown}, {rate:.0f} images/s", refresh=False)
            if state.step % checkpoint_every == 0 or state.step == config.steps:
                save_checkpoint(checkpoint, state, config)
            if state.step % REPORT_EVERY == 0:
                figures = evaluate(state.average)
                bar.write(f"step {state.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in figures.items()))
                terms |= figures
            if log is not None:
                for name, value in terms.items():
                    log(name, value, state.step)
    return state


def save_checkpoint(path: Path, state: BctState, config: BctConfig) -> None:
    """Write the whole state; a kill at any moment leaves the former file or the new one, whole."""
    content = {
        "step": state.step,
        **_configurations(config, state.network.config),
        "network": state.network.state_dict(),
        "average": state.average.state_dict(),
        "optimizer": state.optimizer.state_dict(),
    }
    checkpoints.save_checkpoint(path, content)


def resume(path: Path, config: BctConfig, network: ConsistencyConfig) -> BctState:
    """Return the state that `save_checkpoint` wrote; raises ValueError for another configuration."""
    content = checkpoints.load_checkpoint(path, _configurations(config, network))
    state = start(config, network)
    state.network.load_state_dict(content["network"])
    state.average.load_state_dict(content["average"])
    state.optimizer.load_state_dict(content["optimizer"])
    state.step = content["step"]
    return state


def save_weights(path: Path, state: BctState, config: BctConfig, notes: dict[str, str]) -> None:
    """Write the averaged weights, with both configurations and the notes as metadata, in one atomic move."""
    metadata = {
        "network": json.dumps(asdict(state.average.config)),
        "training": json.dumps(asdict(config)),
        "steps": str(state.step),
        **notes,
    }
    checkpoints.save_weights(path, state.average.state_dict(), metadata)


def load_network(path: Path = WEIGHTS, *, dtype: torch.dtype = torch.float32) -> ConsistencyNetwork:
    """Return the trained network, ready for evaluation, computing in `dtype`.

    Raises FileNotFoundError where there is no such file.
    """
    tensors, metadata = checkpoints.load_weights(path, "train")
    network = ConsistencyNetwork(ConsistencyConfig(**json.loads(metadata["network"])))
    network.load_state_dict(tensors)
    return network.requires_grad_(False).eval().to(dtype)


def _configurations(config: BctConfig, network: ConsistencyConfig) -> dict[str, dict[str, Any]]:
    return {"config": asdict(config), "network_config": asdict(network)}


def _learning_rate_factor(step: int, config: BctConfig) -> float:
    warm = min(1.0, (step + 1) / config.warmup)
    return warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))
