"""The digits' denoiser and a small flow model, tuned for a reward: DDPO and Flow-GRPO on one core, in minutes."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from bicm_diffusion import flow_schedule, vp_schedule
from bicm_diffusion.distributed.atomic import write_text
from bicm_diffusion.policy import (
    PolicyTable,
    ddim_table,
    flow_grpo_table,
    group_advantages,
    policy_loss,
    recorded_log_prob,
    rollout,
    step_divergence,
)
from bicm_kernels import add_noise, fold_in, normal, uniform
from examples.digits.classifiers import guide, judge, share
from examples.digits.data import SIDE, load_split
from examples.digits.denoising import load_denoiser
from examples.digits.network import NO_LABEL
from examples.digits.small_network import SmallConfig, SmallNetwork

SEVEN = 7
METHODS = ("DDPO", "Flow-GRPO")
REWARDS = ("sevens", "thickness")
# Purposes with separate random numbers: each gets its key from the run's seed.
INITIAL, PAIRS, TIMES, LATENTS = range(31, 35)
SHOWN = 10

Model = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    """Settings of every run. batch: rollouts per update; inner: optimizer steps on each of them."""

    updates: int = 25
    batch: int = 48
    inner: int = 2
    steps: int = 6
    rate_of_denoiser: float = 3e-4
    rate_of_flow: float = 5e-4
    noise_level: float = 0.7
    clip: float = 0.2
    divergence_weight: float = 0.02
    flow_steps: int = 3000


@dataclass(frozen=True)
class Result:
    """The results of a run: the mean reward of every update's rollouts, and images before and after from equal noise.

    ratio_is_one: whether every ratio of the first update was exactly 1. sevens: the fraction of the last rollouts that
    a classifier not used in training takes for sevens; ink: their mean ink, from 0 for paper to 1.
    """

    rewards: list[float]
    ratio_is_one: bool
    sevens: list[float]
    ink: list[float]
    before: list[list[float]]
    after: list[list[float]]
    seconds: float


class Unlabelled(nn.Module):
    """The denoiser without a class, with samplers' signature."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, z: Tensor, times: Tensor) -> Tensor:
        output: Tensor = self.denoiser(z, times, torch.full(times.shape, NO_LABEL))
        return output


@lru_cache(maxsize=2)
def flow_model(steps: int, width: int = SmallConfig.width) -> nn.Module:
    """Return a network trained for a number of steps to predict n - x from (1 - t)·x + t·n, images (B, 1, 8, 8)."""
    torch.manual_seed(fold_in(0, INITIAL))
    network, images = SmallNetwork(SmallConfig(width)), load_split().train.images
    average = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        chosen = (uniform((128, 1), seed=fold_in(0, PAIRS), step=step)[:, 0] * len(images)).long() % len(images)
        x, t = images[chosen], uniform((128, 1), seed=fold_in(0, TIMES), step=step)[:, 0]
        z = add_noise(x, t, scale=1 - t, seed=0, step=step)
        loss = functional.mse_loss(network(z, t), normal(x.shape, seed=0, step=step, dtype=x.dtype) - x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        with torch.no_grad():
            for mean, value in zip(average.parameters(), network.parameters(), strict=True):
                mean.lerp_(value, 0.005 if step > 200 else 1 / (step + 1))
    return average.eval()


def sevens(images: Tensor) -> Tensor:
    """Return a classifier's log-probability that images show a seven, (B,)."""
    found: Tensor = guide()(images.clamp(-1, 1)).softmax(1)[:, SEVEN]
    return found


def thickness(images: Tensor) -> Tensor:
    """Return the mean ink of images (B, 1, 8, 8), 0 for paper and 1 for ink: thick strokes have more, of any class."""
    return (images.clamp(-1, 1).flatten(1).mean(1) + 1) / 2


REWARD: dict[str, Callable[[Tensor], Tensor]] = {"sevens": sevens, "thickness": thickness}


def starting_point(method: str, setting: Setting) -> tuple[nn.Module, PolicyTable, float]:
    """Return the network that a method tunes, its stochastic steps and its learning rate."""
    if method == "DDPO":
        table = ddim_table(vp_schedule(setting.steps))
        return Unlabelled(load_denoiser().eval()), table, setting.rate_of_denoiser
    table = flow_grpo_table(flow_schedule(setting.steps), noise_level=setting.noise_level)
    return copy.deepcopy(flow_model(setting.flow_steps)), table, setting.rate_of_flow


def tune(method: str, reward: str, seed: int, setting: Setting) -> Result:
    """Tune a network for a reward and return the results."""
    begun = time.perf_counter()
    network, table, rate = starting_point(method, setting)
    reference = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.requires_grad_(True).parameters(), lr=rate, weight_decay=0.0)
    rewards: list[float] = []
    judged: list[tuple[float, float]] = []
    ratio_is_one = True
    bar = tqdm(range(setting.updates), desc=f"{method}, {reward}, seed {seed}", leave=False)
    for update in bar:
        # Every sample of a run has a unique id, and so unique noise, for any batch size.
        first = update * setting.batch
        done = rollout(network, latents(setting.batch, seed, first), table, seed=seed, sample_id=first, reduction="sum")
        scores = REWARD[reward](done.sample)
        rewards.append(scores.mean().item())
        bar.set_postfix(reward=f"{rewards[-1]:.3f}")
        judged.append((_share_of_sevens(done.sample), thickness(done.sample).mean().item()))
        advantages = group_advantages(scores, setting.batch)
        for turn in range(setting.inner):
            optimizer.zero_grad()
            for i in done.steps:
                log_prob, output = recorded_log_prob(network, done, table, i, reduction="sum")
                with torch.no_grad():
                    theirs = reference(done.state(i), torch.full((setting.batch,), table.schedule.times[i]))
                loss = policy_loss(
                    log_prob,
                    done.log_prob(i),
                    advantages,
                    clip=setting.clip,
                    divergence=step_divergence(table, i, done.state(i), output, theirs),
                    divergence_weight=setting.divergence_weight * SIDE * SIDE,
                )
                if update == turn == 0:
                    ratio = (log_prob - done.log_prob(i)).exp()
                    ratio_is_one = ratio_is_one and torch.equal(ratio, torch.ones_like(ratio))
                (loss.total / len(done.steps)).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
    edges = judged[0], judged[-1]
    before, after = (_shown(model, table, seed) for model in (reference, network))
    of_sevens, ink = [seven for seven, _ in edges], [mean for _, mean in edges]
    seconds = round(time.perf_counter() - begun, 1)  # as the file has it, so that a table is the same on a rerun
    return Result(rewards, ratio_is_one, of_sevens, ink, before, after, seconds)


def latents(batch: int, seed: int, first: int) -> Tensor:
    """Return the noise that rollouts start from, (B, 1, 8, 8)."""
    return normal((batch, 1, SIDE, SIDE), seed=fold_in(seed, LATENTS), sample_id=first, dtype=torch.float32)


def _share_of_sevens(images: Tensor) -> float:
    return share(judge(), images, torch.full((len(images),), SEVEN))


def _shown(model: Model, table: PolicyTable, seed: int) -> list[list[float]]:
    images = rollout(model, latents(SHOWN, seed, 0), table, seed=seed).sample
    return [[round(x, 3) for x in image.flatten().tolist()] for image in images.clamp(-1, 1)]


def run_all(seeds: int, setting: Setting, folder: Path) -> dict[tuple[str, str], list[Result]]:
    """Return the runs of every method, reward and seed, from existing files of the same setting where possible."""
    results: dict[tuple[str, str], list[Result]] = {}
    for method in METHODS:
        for reward in REWARDS:
            results[method, reward] = [_kept(method, reward, seed, setting, folder) for seed in range(seeds)]
    return results


def _kept(method: str, reward: str, seed: int, setting: Setting, folder: Path) -> Result:
    path = folder / f"{method.lower()}-{reward}-{seed}.json"
    about = {"setting": asdict(setting)}
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.get("setting") == about["setting"]:
            return Result(**found["result"])
    folder.mkdir(parents=True, exist_ok=True)
    result = tune(method, reward, seed, setting)
    write_text(path, json.dumps(about | {"result": asdict(result)}) + "\n")
    return result


def table_of(results: dict[tuple[str, str], list[Result]]) -> str:
    """Return the runs as a Markdown table."""
    lines = [
        "| method | reward | seed | reward, first → last update | taken for sevens | mean ink | first ratio | s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (method, reward), runs in results.items():
        for seed, run in enumerate(runs):
            ends = [f"{a:.2f} → {b:.2f}" for a, b in (run.rewards[:: len(run.rewards) - 1], run.sevens, run.ink)]
            ratio = "exactly 1" if run.ratio_is_one else "not 1"
            lines.append(f"| {method} | {reward} | {seed} | {' | '.join(ends)} | {ratio} | {run.seconds:.0f} |")
    return "\n".join(lines) + "\n"
