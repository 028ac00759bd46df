"""Objectives compared on the digits: one small network, several seeds, one table and one plot."""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from tqdm import tqdm

from bicm_diffusion import LevelTable, bct_loss, draw_levels, karras_levels, level_count
from bicm_diffusion.distributed.atomic import write_text
from bicm_diffusion.objectives import (
    denoising_loss,
    draw_denoising_levels,
    draw_ect_times,
    ect_loss,
    gc_loss,
    ict_loss,
    optimal_pairing,
)
from bicm_diffusion.objectives.diagnostics import transport_cost, velocity_variance
from bicm_diffusion.objectives.gc import generated
from bicm_diffusion.train import Step, Trainer, TrainingOptions
from bicm_kernels import affine_step, denoise, fold_in, normal, scale_input
from examples.digits.consistency_measurements import frechet_distance, judge
from examples.digits.data import SIDE, load_split
from examples.digits.denoising import load_denoiser
from examples.digits.network import NO_LABEL
from examples.digits.small_network import FromDenoiser, SmallConfig, SmallNetwork

T_MAX = 20.0
#: The level at which couplings are measured.
LEVEL = 1.0
# Purposes with separate random numbers: each gets its key from the run's seed.
INITIAL, RUN, COUPLING, SAMPLES, MEASURED = range(21, 26)
CURVE = 10


@dataclass(frozen=True)
class Setting:
    """Settings of every run of the comparison."""

    steps: int = 1500
    tuning_steps: int = 300
    coupling_steps: int = 600
    batch_size: int = 128
    learning_rate: float = 2e-3
    tuning_rate: float = 2e-4
    ema: float = 0.995
    s0: int = 10
    s1: int = 160
    width: int = 320


@dataclass(frozen=True)
class Method:
    """A row of the table. mu, predictor: GC's; "frozen" is the model trained by iCT from the same seed."""

    name: str
    kind: str
    mu: float = 0.0
    predictor: str = ""


MUS = (0.3, 0.5, 0.7, 1.0)
METHODS = (
    Method("iCT (GC at μ = 0)", "ict"),
    Method("BCT", "bct"),
    Method("batch-OT", "ot"),
    *(Method(f"GC, {who}, μ = {mu}", "gc", mu, who) for who in ("online", "average", "frozen") for mu in MUS),
    Method("ECT from the denoiser", "ect"),
    Method("ECT with GC, μ = 0.3", "ect", 0.3, "online"),
)


@dataclass(frozen=True)
class Result:
    """A run's figures: distances of its samples to the training images, and its coupling's cost.

    frechet, variance, recognised: of as many samples as held-out digits, by one evaluation. curve: (step, Fréchet
    distance) during training. transport, velocity: c(t) and R̃_t per element, at t = 1; None without a coupling.
    """

    frechet: float
    variance: float
    recognised: float
    transport: float | None
    velocity: float | None
    curve: list[tuple[int, float]]
    seconds: float


def run_method(method: Method, seed: int, setting: Setting, frozen: nn.Module | None) -> tuple[Result, nn.Module]:
    """Train a method from a seed and return its figures and its averaged network."""
    begun = time.perf_counter()
    form = "edm" if method.kind == "ect" else "bcm"
    trainer = _trainer(method, seed, setting, frozen)
    every, curve = max(1, trainer.options.steps // CURVE), []
    while trainer.step < trainer.options.steps:
        trainer.advance()
        if trainer.step % every == 0:
            curve.append((trainer.step, _frechet(draw(trainer.average, form, seed))))
    images = draw(trainer.average, form, seed)
    found = judge(images, torch.full((len(images),), NO_LABEL))
    transport, velocity = None, None
    if method.kind in ("ict", "ot", "gc"):
        predictor = frozen if method.predictor == "frozen" else trainer.average
        transport, velocity = measure_coupling(method, seed, setting, predictor)
    variance = images.flatten(1).double().var(dim=0).sum().item()
    seconds = time.perf_counter() - begun
    result = Result(_frechet(images), variance, found.confident, transport, velocity, curve, seconds)
    return result, trainer.average


def _trainer(method: Method, seed: int, setting: Setting, frozen: nn.Module | None) -> Trainer:
    tuned = method.kind == "ect"
    network = FromDenoiser(load_denoiser()) if tuned else _network(fold_in(seed, INITIAL), setting)
    options = _options(setting, seed=int(fold_in(seed, RUN)), steps=setting.tuning_steps if tuned else setting.steps)
    if tuned:
        options = replace(options, learning_rate=setting.tuning_rate)
    return _start(network.requires_grad_(True), partial(_loss, method, setting, frozen), options)


def _network(seed: int | Tensor, setting: Setting) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed))
        return SmallNetwork(SmallConfig(width=setting.width))


def _options(setting: Setting, *, seed: int, steps: int) -> TrainingOptions:
    return TrainingOptions(
        steps=steps,
        batch_size=setting.batch_size,
        seed=seed,
        optimizer="adamw",
        learning_rate=setting.learning_rate,
        weight_decay=0.01,
        optimizer_args={"betas": (0.9, 0.99)},
        warmup=min(100, steps),
        decay="cosine",
        clip=1.0,
        ema=setting.ema,
    )


def _start(network: nn.Module, loss: Callable[..., Any], options: TrainingOptions) -> Trainer:
    return Trainer(network, TensorDataset(load_split().train.images), loss, options, device="cpu")


def _loss(
    method: Method, setting: Setting, frozen: nn.Module | None, network: nn.Module, batch: Any, step: Step
) -> Any:
    (x,) = batch
    if method.kind == "ect":
        stage = 8 * step.step // step.options.steps
        return ect_loss(network, x, draw_ect_times(len(x), stage=stage, **step.key), mu=method.mu, **step.key)
    count = level_count(step.step, step.options.steps, s0=setting.s0, s1=setting.s1)
    levels = draw_levels(LevelTable(karras_levels(count, t_max=T_MAX)), len(x), **step.key)
    if method.kind == "bct":
        return bct_loss(network, x, levels, **step.key)
    if method.kind == "gc":
        predictor = {"online": None, "average": step.average, "frozen": frozen}[method.predictor]
        return gc_loss(network, x, levels, mu=method.mu, predictor=predictor, **step.key)
    return ict_loss(network, x, levels, **paired(method, x, step.key))


def paired(method: Method, x: Tensor, key: Mapping[str, Any]) -> dict[str, Any]:
    """Return the key of a coupling's noise: batch-OT permutes the ids."""
    return {**key, "sample_id": optimal_pairing(x, **key)} if method.kind == "ot" else dict(key)


@torch.no_grad()
def predicted(network: nn.Module, x: Tensor, t: Tensor, form: str) -> Tensor:
    """Return f(x, t); ECT trains the denoiser's form and is evaluated in the consistency model's."""
    scaled = scale_input(x, t)
    times = (t, torch.full_like(t, 0.002)) if form == "bcm" else (t,)
    return denoise(x, network(scaled, *times), t, parameterization="bcm" if form == "bcm" else "cm")


def draw(network: nn.Module, form: str, seed: int) -> Tensor:
    """Return as many samples as there are held-out digits, by one evaluation, from noise that all methods share."""
    network.eval()
    count = len(load_split().held_out.images)
    z = T_MAX * normal((count, 1, SIDE, SIDE), seed=fold_in(seed, SAMPLES))
    return predicted(network, z, torch.full((count,), T_MAX), form).clamp(-1, 1)


def _frechet(images: Tensor) -> float:
    return frechet_distance(images, load_split().train.images)


def measure_coupling(method: Method, seed: int, setting: Setting, predictor: nn.Module | None) -> tuple[float, float]:
    """Return c(t) and R̃_t of a coupling, per element, with a denoiser that is trained on it."""

    def clean(x: Tensor, t: Tensor, key: Mapping[str, Any]) -> Tensor:
        """x̂ of the coupling, for levels t."""
        if method.kind != "gc" or predictor is None:
            return x
        z = normal(x.shape, **key, dtype=x.dtype)
        x_hat = predicted(predictor, affine_step([x, z], [1.0, t]), t, "bcm")
        return torch.where(generated(len(x), method.mu, **key)[:, None, None, None], x_hat, x)

    def loss(network: nn.Module, batch: Any, step: Step) -> Any:
        (x,) = batch
        t = draw_denoising_levels(len(x), **step.key)
        key = paired(method, x, step.key)
        return denoising_loss(network, clean(x, t.to(x.dtype), key), t, **key)

    options = _options(setting, seed=int(fold_in(seed, COUPLING)), steps=setting.coupling_steps)
    trainer = _start(_network(options.seed, setting), loss, options)
    trainer.run()
    costs, variances = [], []
    for step, x in enumerate(load_split().train.images.split(setting.batch_size)):
        key = paired(method, x, {"seed": int(fold_in(seed, MEASURED)), "step": step, "sample_id": 0})
        x_hat = clean(x, torch.full((len(x),), LEVEL), key)
        # c(t) = E‖x̂ - z‖², the cost of the coupling that x̂ and z make.
        costs.append(transport_cost(lambda x, t: x, x_hat, 0.0, **key))
        denoiser = partial(_denoised, trainer.average)
        variances.append(velocity_variance(denoiser, x_hat, LEVEL, **key))
    pixels = SIDE * SIDE
    return torch.cat(costs).mean().item() / pixels, torch.cat(variances).mean().item() / pixels


def _denoised(network: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return denoise(x, network(scale_input(x, t), t), t, parameterization="edm")


def run_all(seeds: int, setting: Setting, folder: Path, *, progress: bool = True) -> dict[str, list[Result]]:
    """Run every method with every seed, or read the results of an earlier call from `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[Result]] = {method.name: [] for method in METHODS}
    with tqdm(total=seeds * len(METHODS), unit="run", disable=not progress) as bar:
        for seed in range(seeds):
            frozen: nn.Module | None = None
            for number, method in enumerate(METHODS):
                bar.set_postfix_str(f"{method.name}, seed {seed}")
                written = folder / f"{number:02d}-seed-{seed}.json"
                told = {"method": asdict(method), "setting": asdict(setting)}
                known = json.loads(written.read_text()) if written.exists() else {}
                weights = folder / f"ict-seed-{seed}.pt"
                if {name: known.get(name) for name in told} != told:
                    if method.predictor == "frozen" and frozen is None:
                        frozen = _network(0, setting)
                        frozen.load_state_dict(torch.load(weights, weights_only=True))
                        frozen.eval()
                    result, average = run_method(method, seed, setting, frozen)
                    if method.kind == "ict":
                        torch.save(average.state_dict(), weights)
                        frozen = copy.deepcopy(average)
                    known = {**told, "result": asdict(result)}
                    write_text(written, json.dumps(known))
                results[method.name].append(Result(**known["result"]))
                bar.update()
    return results


def table(results: Mapping[str, list[Result]], setting: Setting) -> str:
    """Return the figures as Markdown: means over the seeds, and their standard deviations."""
    real = load_split().held_out.images
    variance = real.flatten(1).double().var(dim=0).sum().item()
    judged = judge(real, torch.full((len(real),), NO_LABEL))
    seeds = len(next(iter(results.values())))
    lines = [
        f"{seeds} seeds, {setting.steps} steps ({setting.tuning_steps} of ECT), batch {setting.batch_size}, one "
        "evaluation per sample; mean ± standard deviation over the seeds. c(t) and R̃_t at t = 1, per element. "
        "Seconds: the median of the runs.",
        "",
        "| method | Fréchet distance | total variance | p ≥ .9 | transport cost c | R̃ | seconds a run |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, runs in results.items():
        cells = [
            _cell([run.frechet for run in runs], 2),
            _cell([run.variance for run in runs], 1),
            _cell([run.recognised for run in runs], 3),
            _cell([run.transport for run in runs], 3),
            _cell([run.velocity for run in runs], 4),
            f"{statistics.median(run.seconds for run in runs):.0f}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append(f"| real digits, held out | {_frechet(real):.2f} | {variance:.1f} | {judged.confident:.3f} | | | |")
    return "\n".join(lines) + "\n"


def _cell(values: list[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    spread = statistics.stdev(known) if len(known) > 1 else 0.0
    return f"{statistics.mean(known):.{digits}f} ± {spread:.{digits}f}"
