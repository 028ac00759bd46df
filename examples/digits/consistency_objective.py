"""The consistency model's objective, bidirectional consistency training, and its trained weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from bicm_diffusion import LevelTable, bct_loss, draw_levels, karras_levels, level_count
from bicm_diffusion.consistency.grid import P_MEAN, P_STD
from bicm_kernels import fold_in
from examples.digits.checkpoints import load_network as load
from examples.digits.consistency_measurements import evaluate
from examples.digits.consistency_network import ConsistencyConfig, ConsistencyNetwork
from examples.digits.data import Digits
from examples.digits.training import Loss, Objective, TrainingConfig

WEIGHTS = Path(__file__).parent / "weights" / "consistency.safetensors"
# Purposes with separate random numbers: each gets its key from the run's seed.
INITIAL, OBJECTIVE = range(11, 13)


@dataclass(frozen=True)
class BctConfig(TrainingConfig):
    """The settings of a run besides the network: the loop's numbers, the levels with probabilities, the loss's c."""

    batch_size: int = 128
    learning_rate: float = 1e-3
    label_drop: float = 0.5
    t_max: float = 20.0
    s0: int = 10
    s1: int = 320
    p_mean: float = P_MEAN
    p_std: float = P_STD
    c: float | None = None


def level_table(step: int, config: BctConfig) -> LevelTable:
    """Return the levels of this step."""
    count = level_count(step, config.steps, s0=config.s0, s1=config.s1)
    return LevelTable(karras_levels(count, t_max=config.t_max), p_mean=config.p_mean, p_std=config.p_std)


def batch_loss(network: ConsistencyNetwork, batch: Digits, config: BctConfig, step: int) -> Loss:
    """Return the loss of one batch of a run."""
    seed = int(fold_in(config.seed, OBJECTIVE))
    levels = draw_levels(level_table(step, config), len(batch.images), seed=seed, step=step)
    extra_args = {"labels": batch.labels}
    loss = bct_loss(network, batch.images, levels, seed=seed, step=step, extra_args=extra_args, c=config.c)
    return Loss(loss.total, {"consistency": loss.consistency, "trajectory": loss.trajectory})


CONSISTENCY = Objective(ConsistencyNetwork, batch_loss, evaluate, INITIAL, fused=True)


def load_network(path: Path = WEIGHTS, *, dtype: torch.dtype = torch.float32) -> ConsistencyNetwork:
    """Return the trained network, ready for evaluation, computing in `dtype`.

    Raises FileNotFoundError where there is no such file.
    """
    return load(path, "train", lambda config: ConsistencyNetwork(ConsistencyConfig(**config)), dtype=dtype)
