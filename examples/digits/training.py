"""Shared by the digits' runs, as calls of `bicm_diffusion.train`: options, data, dropped labels, weights.

An `Objective` defines a run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from bicm_diffusion.train import Step, Trainer, TrainingOptions
from bicm_diffusion.train.logs import Log
from bicm_kernels import fold_in, uniform
from examples.digits import checkpoints
from examples.digits.data import Digits, load_split
from examples.digits.network import NO_LABEL

REPORT_EVERY = 1000
# Purposes with separate random numbers, besides the noise: each gets its key from the run's seed.
ORDER, LABEL_DROP = 1, 3


@dataclass(frozen=True)
class TrainingConfig:
    """The settings of a run besides the network: runs with equal configurations give equal bits."""

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
    """total: 0-d, to be minimised; terms: by name, each 0-d."""

    total: Tensor
    terms: Mapping[str, Tensor]


@dataclass(frozen=True)
class Objective(Generic[Config, Network]):
    """The network and its loss.

    network(config) makes the network. loss(network, digits, config, step) is that of one batch, whose labels have been
    dropped. figures(network) returns figures of a run's progress. initial: the purpose of the initial weights' random
    numbers. fused: whether AdamW's fused form runs, whose bits differ.
    """

    network: Callable[[Any], Network]
    loss: Callable[[Network, Digits, Config, int], Loss]
    figures: Callable[[Network], dict[str, float]]
    initial: int
    fused: bool


@dataclass(frozen=True)
class Run(Generic[Config, Network]):
    """An objective with everything that determines its bits: the run's configuration and the network's."""

    objective: Objective[Config, Network]
    config: Config
    network: Any

    def configurations(self) -> dict[str, dict[str, Any]]:
        """Return both configurations as stored in a checkpoint."""
        return {"config": asdict(self.config), "network_config": asdict(self.network)}


def start(run: Run[Config, Network]) -> Trainer:
    """Return the run before its first step; a pure function of its argument."""
    objective, config = run.objective, run.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold_in(config.seed, objective.initial))
        network = objective.network(run.network)
        average = objective.network(run.network)
    average.load_state_dict(network.state_dict())
    options = TrainingOptions(
        steps=config.steps,
        batch_size=config.batch_size,
        seed=config.seed,
        optimizer="adamw",
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        optimizer_args={"betas": (0.9, 0.99), "fused": objective.fused or None},
        warmup=config.warmup,
        decay="cosine",
        clip=1.0,
        ema=config.ema,
    )
    data = load_split().train
    return Trainer(
        network,
        TensorDataset(data.images, data.labels),
        partial(_loss, run),
        options,
        average=average,
        order=partial(batch_indices, count=len(data.images), config=config),
        device="cpu",
        notes=run.configurations(),
    )


def _loss(run: Run[Any, Any], network: nn.Module, batch: tuple[Tensor, Tensor], step: Step) -> Loss:
    images, labels = batch
    digits = Digits(images, dropped_labels(labels, step.step, run.config))
    return run.objective.loss(network, digits, run.config, step.step)


def batch_indices(step: int, count: int, config: TrainingConfig) -> Tensor:
    """Return the images of this step: an epoch is a keyed permutation less its incomplete last batch."""
    per_epoch = max(1, count // config.batch_size)
    keys = uniform((count,), seed=fold_in(config.seed, ORDER), step=step // per_epoch)
    first = step % per_epoch * config.batch_size
    return torch.argsort(keys, stable=True)[first : first + config.batch_size]


def dropped_labels(labels: Tensor, step: int, config: TrainingConfig) -> Tensor:
    """Return the labels with a fraction `label_drop` of them replaced by `NO_LABEL`."""
    draws = uniform(labels.shape, seed=fold_in(config.seed, LABEL_DROP), step=step)
    return torch.where(draws <= config.label_drop, NO_LABEL, labels)


def train(
    run: Run[Config, Network],
    *,
    checkpoint: Path,
    checkpoint_every: int,
    log: Log | None = None,
    progress: bool = True,
) -> Trainer:
    """Run to `config.steps`, resuming from the checkpoint if there is one, and return the last state.

    log: called with (name, value, step) for the terms of every loss and the figures every `REPORT_EVERY` steps.
    Raises ValueError where the checkpoint belongs to another configuration.
    """
    state = resume(checkpoint, run) if checkpoint.exists() else start(run)
    state.run(
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        log=log,
        report=run.objective.figures,
        report_every=REPORT_EVERY,
        progress=progress,
    )
    return state


def resume(path: Path, run: Run[Config, Network]) -> Trainer:
    """Return the run of a checkpoint; raises ValueError for another configuration."""
    state = start(run)
    state.load(path)
    return state


def save_weights(path: Path, state: Trainer, run: Run[Config, Network], notes: Mapping[str, str]) -> None:
    """Write the averaged weights, with both configurations and the notes as metadata, in one atomic move."""
    metadata = {
        "network": json.dumps(asdict(run.network)),
        "training": json.dumps(asdict(run.config)),
        "steps": str(state.step),
        **notes,
    }
    checkpoints.save_weights(path, state.average.state_dict(), metadata)
