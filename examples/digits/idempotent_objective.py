"""Idempotent networks trained on the digits: each run's loss, its data, and the committed weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from bicm_diffusion import Schedule, ddim_sample, edm_sample, karras_schedule, vp_schedule, vp_time
from bicm_diffusion.distributed import PairDataset, sample_pairs
from bicm_diffusion.objectives import Loss, ign_loss, sign_loss
from bicm_diffusion.train import Step, Trainer, TrainingOptions
from bicm_kernels import fold_in
from examples.digits import checkpoints
from examples.digits.data import SIDE, load_split
from examples.digits.denoising import WEIGHTS as TEACHER
from examples.digits.denoising import load_denoiser
from examples.digits.idempotent_network import IdempotentConfig, IdempotentNetwork
from examples.digits.network import NO_LABEL, Denoiser

WEIGHTS = Path(__file__).parent / "weights" / "idempotent.safetensors"
# Purposes with separate random numbers: each gets its key from the run's seed.
INITIAL, RUN = 31, 32
PAIR_SEED = 33
T_MAX = 20.0
PAIRS, PAIR_STEPS, PAIR_BATCH = 40_000, 10, 500


@dataclass(frozen=True)
class Method:
    """A row of the table: the loss, the number of steps, and the initial weights.

    weights: of the terms of `ign_loss` or `sign_loss`. options: further arguments of them. start: the method whose
    weights of the same seed it starts from.
    """

    name: str
    weights: Mapping[str, float]
    steps: int
    options: Mapping[str, Any] = field(default_factory=dict)
    start: str = ""
    learning_rate: float = 1e-3

    @property
    def pairs(self) -> bool:
        """Whether stored pairs are needed."""
        return self.weights.get("reg", 0) > 0

    @property
    def teacher(self) -> bool:
        """Whether the noise predictor is used."""
        return self.weights.get("dmd", 0) > 0


FLOW = {"flow": 1.0, "idem": 0.01}
METHODS = {
    "ign": Method("IGN", {"recon": 20.0, "idem": 20.0, "tight": 2.5}, 4_000),
    "flow": Method("SIGN: flow", FLOW, 10_000),
    "denoise": Method("SIGN: flow, denoise", {**FLOW, "denoise": 0.1}, 4_000),
    "control": Method("SIGN: flow, then flow", FLOW, 1_500, start="flow", learning_rate=2e-4),
    "dmd": Method(
        "SIGN: flow, then flow and dmd",
        {**FLOW, "dmd": 0.1},
        1_500,
        {"dmd_weight": "normalised"},
        start="flow",
        learning_rate=2e-4,
    ),
    "reg": Method("SIGN: reg", {"reg": 1.0, "flow": 0.0}, 12_000),
    "reg-flow": Method("SIGN: reg, flow", {"reg": 1.0}, 4_000),
}


@dataclass(frozen=True)
class Training:
    """Settings of all runs. first, last: steps N of flow's schedule, which grow exponentially."""

    batch_size: int = 128
    weight_decay: float = 0.01
    warmup: int = 200
    ema: float = 0.999
    first: int = 20
    last: int = 160


class Teacher(nn.Module):
    """The noise predictor without labels: (z, times) -> the noise."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, z: Tensor, times: Tensor) -> Tensor:
        labels = torch.full((len(z),), NO_LABEL, device=z.device)
        predicted: Tensor = self.denoiser(z, times, labels)
        return predicted


class Together(nn.Module):
    """The idempotent network, and the diffusion model trained on its samples."""

    def __init__(self, network: nn.Module, learned: nn.Module) -> None:
        super().__init__()
        self.network, self.learned = network, learned


def make_pairs(
    directory: Path, *, count: int = PAIRS, steps: int = PAIR_STEPS, sampler: str = "heun", progress: bool = True
) -> None:
    """Sample digits without labels with the noise predictor, and store them with their noise.

    sampler: "heun", EDM's on levels up to 20 with two evaluations in all steps but the last, or "ddim" with one per
    step, which loses variance.
    """
    teacher = Teacher(load_denoiser())

    def at_level(x: Tensor, level: Tensor) -> Tensor:
        return teacher(x / (1 + level * level).sqrt()[:, None, None, None].to(x.dtype), vp_time(level.double()))

    @torch.no_grad()
    def sample(noise: Tensor) -> Tensor:
        if sampler == "heun":
            return edm_sample(at_level, T_MAX * noise, karras_schedule(steps, t_max=T_MAX)).clamp(-1, 1)
        return ddim_sample(teacher, noise, vp_schedule(steps)).clamp(-1, 1)

    sample_pairs(
        sample,
        count,
        directory,
        shape=(1, SIDE, SIDE),
        batch=min(PAIR_BATCH, count),
        seed=PAIR_SEED,
        settings={"weights": TEACHER.name, "sampler": f"{sampler}_sample", "steps": steps},
        progress=progress,
    )


@lru_cache(maxsize=8)
def schedule_of(steps: int) -> Schedule:
    """Return the variance-preserving schedule with this number of steps."""
    return vp_schedule(steps)


def start(method: Method, seed: int, training: Training, *, pairs: Path, initial: nn.Module | None = None) -> Trainer:
    """Return a run before its first step. initial: the network that it starts from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(fold_in(seed, INITIAL)))
        network: nn.Module = IdempotentNetwork() if initial is None else copy.deepcopy(initial).requires_grad_(True)
    teacher = Teacher(load_denoiser()) if method.teacher else None
    if teacher is not None:
        network = Together(network, copy.deepcopy(teacher).requires_grad_(True))
    options = TrainingOptions(
        steps=method.steps,
        batch_size=training.batch_size,
        seed=int(fold_in(seed, RUN)),
        optimizer="adamw",
        learning_rate=method.learning_rate,
        weight_decay=training.weight_decay,
        optimizer_args={"betas": (0.9, 0.99)},
        warmup=min(training.warmup, method.steps),
        decay="cosine",
        ema=training.ema,
    )
    loss = partial(_loss, method, training, teacher)
    notes = {"method": json.loads(json.dumps(asdict(method))), "training": asdict(training)}
    return Trainer(network, data(pairs if method.pairs else None), loss, options, device="cpu", notes=notes)


def data(pairs: Path | None) -> TensorDataset:
    """Return the training images, repeated to the number of pairs and combined with them if there are any."""
    images = load_split().train.images
    if pairs is None:
        return TensorDataset(images)
    noise, made = PairDataset(pairs).tensors()
    return TensorDataset(images[torch.arange(len(noise)) % len(images)], noise, made)


def _loss(
    method: Method, training: Training, teacher: nn.Module | None, network: nn.Module, batch: Any, step: Step
) -> Loss:
    x, *pair = batch
    named: dict[str, Any] = {**method.weights, **method.options}
    if "tight" in method.weights:
        return ign_loss(network, x, **step.key, **named)
    grown = (training.last / training.first) ** (step.step / step.options.steps)
    named["schedule"] = schedule_of(round(training.first * grown))
    if isinstance(network, Together):
        named |= {"teacher": teacher, "learned": network.learned, "solver": "empirical"}
        network = network.network
    return sign_loss(network, x, **step.key, **named, pairs=pair or None)


def trained(run: Trainer) -> nn.Module:
    """Return the averaged idempotent network of a run."""
    average = run.average
    chosen = average.network if isinstance(average, Together) else average
    return chosen.eval()


def save_network(path: Path, network: nn.Module, notes: Mapping[str, str]) -> None:
    """Write a network with its configuration and notes."""
    metadata = {"network": json.dumps(asdict(network.config)), **notes}  # type: ignore[call-overload]
    checkpoints.save_weights(path, network.state_dict(), metadata)


def load_network(path: Path = WEIGHTS, *, dtype: torch.dtype = torch.float32) -> IdempotentNetwork:
    """Return a trained network, ready for evaluation, computing in `dtype`.

    Raises FileNotFoundError where there is no such file.
    """

    def make(config: dict[str, Any]) -> IdempotentNetwork:
        return IdempotentNetwork(IdempotentConfig(**config))

    return checkpoints.load_network(path, "train-idempotent", make, dtype=dtype)


def shortened(method: Method, steps: int | None) -> Method:
    """Return a method with another number of steps."""
    return method if steps is None else replace(method, steps=steps)
