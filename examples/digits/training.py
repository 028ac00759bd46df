"""The training loop of both digits models: keyed batches, AdamW, an averaged copy, checkpoints that go on to the bit.

An `Objective` tells one run from another; the loop knows nothing of what it minimises.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bicm_diffusion.ema import update_average
from bicm_kernels import fold_in, uniform
from examples.digits import checkpoints
from examples.digits.data import Digits, load_split
from examples.digits.network import NO_LABEL

REPORT_EVERY = 1000
# Purposes that need random numbers of their own beside the noise: each gets its key from the run's seed.
ORDER, LABEL_DROP = 1, 3

#: Called with (name, value, step).
Log: TypeAlias = Callable[[str, float, int], object]


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


Config = TypeVar("Config", bound=TrainingConfig)
Network = TypeVar("Network", bound=nn.Module)


class Loss(NamedTuple):
    """total: 0-d, what is minimised; terms: what it is made of, by name, each 0-d."""

    total: Tensor
    terms: Mapping[str, Tensor]


@dataclass(frozen=True)
class Objective(Generic[Config, Network]):
    """What is trained, and towards what.

    network(config) makes the network. loss(network, digits, config, step) is that of one batch, whose labels have been
    dropped. figures(network) tells how a run goes. initial: the purpose of the first weights' random numbers. fused:
    whether AdamW's fused form runs, whose bits are other ones.
    """

    network: Callable[[Any], Network]
    loss: Callable[[Network, Digits, Config, int], Loss]
    figures: Callable[[Network], dict[str, float]]
    initial: int
    fused: bool


@dataclass(frozen=True)
class Run(Generic[Config, Network]):
    """An objective with everything that decides its bits: the run's configuration and the network's."""

    objective: Objective[Config, Network]
    config: Config
    network: Any

    def configurations(self) -> dict[str, dict[str, Any]]:
        """Return both configurations as a checkpoint holds them."""
        return {"config": asdict(self.config), "network_config": asdict(self.network)}


@dataclass
class State(Generic[Network]):
    """The run after `step` steps."""

    step: int
    network: Network
    average: Network
    optimizer: torch.optim.AdamW


def start(run: Run[Config, Network]) -> State[Network]:
    """Return the state before the first step; a pure function of its argument."""
    objective, config = run.objective, run.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold_in(config.seed, objective.initial))
        network = objective.network(run.network)
        average = objective.network(run.network)
    average.load_state_dict(network.state_dict())
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        betas=(0.9, 0.99),
        fused=objective.fused or None,
    )
    return State(0, network, average.requires_grad_(False).eval(), optimizer)


def train_step(state: State[Network], run: Run[Config, Network], data: Digits) -> Loss:
    """Advance the state by one step and return its loss."""
    step, config = state.step, run.config
    state.network.train()
    for group in state.optimizer.param_groups:
        group["lr"] = config.learning_rate * _learning_rate_factor(step, config)
    state.optimizer.zero_grad(set_to_none=True)
    chosen = batch_indices(step, len(data.images), config)
    batch = Digits(data.images[chosen], dropped_labels(data.labels[chosen], step, config))
    loss = run.objective.loss(state.network, batch, config, step)
    torch.autograd.backward(loss.total)
    nn.utils.clip_grad_norm_(state.network.parameters(), 1.0)
    state.optimizer.step()
    state.step = step + 1
    update_average(state.average, state.network, step=state.step, decay=config.ema)
    return loss


def batch_indices(step: int, count: int, config: TrainingConfig) -> Tensor:
    """Return the images of this step: an epoch is a keyed permutation less its incomplete last batch."""
    per_epoch = max(1, count // config.batch_size)
    keys = uniform((count,), seed=fold_in(config.seed, ORDER), step=step // per_epoch)
    first = step % per_epoch * config.batch_size
    return torch.argsort(keys, stable=True)[first : first + config.batch_size]


def dropped_labels(labels: Tensor, step: int, config: TrainingConfig) -> Tensor:
    """Return the labels with a share `label_drop` of them replaced by `NO_LABEL`."""
    draws = uniform(labels.shape, seed=fold_in(config.seed, LABEL_DROP), step=step)
    return torch.where(draws <= config.label_drop, NO_LABEL, labels)


def train(
    run: Run[Config, Network],
    *,
    checkpoint: Path,
    checkpoint_every: int,
    log: Log | None = None,
    progress: bool = True,
) -> State[Network]:
    """Run to `config.steps`, going on from the checkpoint where there is one, and return the last state.

    log: called with (name, value, step) for the terms of every loss and the figures that `REPORT_EVERY` steps bring.
    Raises ValueError where the checkpoint belongs to another configuration.
    """
    config = run.config
    state = resume(checkpoint, run) if checkpoint.exists() else start(run)
    data = load_split().train
    means: dict[str, float] = {}
    with tqdm(total=config.steps, initial=state.step, unit="step", disable=not progress, mininterval=1.0) as bar:
        while state.step < config.steps:
            loss = train_step(state, run, data)
            told = {name: term.item() for name, term in loss.terms.items()}
            means = {name: 0.99 * means.get(name, value) + 0.01 * value for name, value in told.items()}
            bar.update()
            rate = (bar.format_dict["rate"] or 0.0) * config.batch_size
            bar.set_postfix_str(f"{_listed(means)}, {rate:.0f} images/s", refresh=False)
            if state.step % checkpoint_every == 0 or state.step == config.steps:
                save_checkpoint(checkpoint, state, run)
            if state.step % REPORT_EVERY == 0:
                figures = run.objective.figures(state.average)
                bar.write(f"step {state.step}: {_listed(figures)}")
                told |= figures
            if log is not None:
                for name, value in told.items():
                    log(name, value, state.step)
    return state


def save_checkpoint(path: Path, state: State[Network], run: Run[Config, Network]) -> None:
    """Write the whole state; a kill at any moment leaves the former file or the new one, whole."""
    content = {
        "step": state.step,
        **run.configurations(),
        "network": state.network.state_dict(),
        "average": state.average.state_dict(),
        "optimizer": state.optimizer.state_dict(),
    }
    checkpoints.save_checkpoint(path, content)


def resume(path: Path, run: Run[Config, Network]) -> State[Network]:
    """Return the state that `save_checkpoint` wrote; raises ValueError for another configuration."""
    content = checkpoints.load_checkpoint(path, run.configurations())
    state = start(run)
    state.network.load_state_dict(content["network"])
    state.average.load_state_dict(content["average"])
    state.optimizer.load_state_dict(content["optimizer"])
    state.step = content["step"]
    return state


def save_weights(path: Path, state: State[Network], run: Run[Config, Network], notes: Mapping[str, str]) -> None:
    """Write the averaged weights, with both configurations and the notes as metadata, in one atomic move."""
    metadata = {
        "network": json.dumps(asdict(run.network)),
        "training": json.dumps(asdict(run.config)),
        "steps": str(state.step),
        **notes,
    }
    checkpoints.save_weights(path, state.average.state_dict(), metadata)


def _learning_rate_factor(step: int, config: TrainingConfig) -> float:
    warm = min(1.0, (step + 1) / config.warmup)
    return warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def _listed(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
