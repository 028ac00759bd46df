"""Commands of the idempotent networks: the teacher's pairs, one run, and all of them with a table and a picture."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import Any

import click
import torch

from bicm_diffusion.distributed.manifest import MANIFEST
from examples.digits.idempotent_objective import (
    METHODS,
    PAIR_STEPS,
    PAIRS,
    WEIGHTS,
    Training,
    load_network,
    make_pairs,
    save_network,
    shortened,
    start,
    trained,
)

BUILD = Path("build/digits/idempotent")
FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command("pairs")
@click.option("--output", default=BUILD / "pairs", type=FOLDER, help="Folder for the shards; a killed run resumes.")
@click.option("--count", default=PAIRS, type=click.IntRange(1), help="How many pairs.")
@click.option("--steps", default=PAIR_STEPS, type=click.IntRange(1), help="Steps of the sampler.")
@click.option("--sampler", default="heun", type=click.Choice(["ddim", "heun"]), help="Heun's evaluates twice per step.")
@click.option("--threads", default=1, type=click.IntRange(1), help="CPU threads.")
def pairs(output: Path, count: int, steps: int, sampler: str, threads: int) -> None:
    """Sample digits with the noise predictor, and store each with its noise."""
    torch.set_num_threads(threads)
    make_pairs(output, count=count, steps=steps, sampler=sampler)


@click.command("train-idempotent")
@click.option("--method", default="reg", type=click.Choice(list(METHODS)), help="What is minimised.")
@click.option("--seed", default=0, help="Seed of everything random in the run.")
@click.option("--steps", default=None, type=click.IntRange(1), help="Optimizer steps; default: the method's own.")
@click.option("--output", default=BUILD, type=FOLDER, help="Folder for METHOD-seed-SEED.safetensors and checkpoints.")
@click.option("--pairs", "pairs_folder", default=BUILD / "pairs", type=FOLDER, help="What `pairs` has written.")
@click.option("--checkpoint-every", default=500, type=click.IntRange(1), help="Steps between checkpoints.")
@click.option("--threads", default=1, type=click.IntRange(1), help="CPU threads.")
def train_idempotent(method: str, seed: int, output: Path, pairs_folder: Path, threads: int, **numbers: Any) -> None:
    """Train an idempotent network and write its averaged weights.

    Killed at any moment and started again with the same options, it ends with the same bits.
    """
    torch.set_num_threads(threads)
    path = run_method(method, seed, output, pairs_folder, progress=True, **numbers)
    click.echo(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


def run_method(
    name: str,
    seed: int,
    folder: Path,
    pairs_folder: Path,
    *,
    steps: int | None = None,
    checkpoint_every: int = 500,
    progress: bool = False,
) -> Path:
    """Train a method from a seed, after the method that it starts from; existing weights are not trained again."""
    method = shortened(METHODS[name], steps)
    path = folder / f"{name}-seed-{seed}.safetensors"
    if path.exists():
        return path
    initial = None
    if method.start:
        made = run_method(
            method.start, seed, folder, pairs_folder, steps=steps, checkpoint_every=checkpoint_every, progress=progress
        )
        initial = load_network(made)
    if method.pairs and not (pairs_folder / MANIFEST).exists():
        raise click.ClickException(f"{pairs_folder} holds no pairs: python -m examples.digits pairs makes them")
    begun = time.process_time()
    run = start(method, seed, Training(), pairs=pairs_folder, initial=initial)
    checkpoint = folder / "checkpoints" / path.name
    if checkpoint.exists():
        run.load(checkpoint)
    run.run(checkpoint=checkpoint, checkpoint_every=checkpoint_every, progress=progress)
    notes = {
        "command": f"python -m examples.digits train-idempotent --method {name} --seed {seed}"
        + ("" if steps is None else f" --steps {steps}")
        + (f" --pairs {pairs_folder}" if method.pairs and pairs_folder != BUILD / "pairs" else ""),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "seconds": f"{time.process_time() - begun:.0f} of processor time",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
    }
    save_network(path, trained(run), notes)
    return path


@click.command("idempotent")
@click.option("--output", default=BUILD, type=FOLDER, help="Folder for the table, the picture and all runs' weights.")
@click.option("--pairs", "pairs_folder", default=BUILD / "pairs", type=FOLDER, help="What `pairs` has written.")
@click.option("--methods", default=",".join(METHODS), help="Methods to train, except those with existing weights.")
@click.option("--seeds", default=3, type=click.IntRange(0), help="Runs of every method; 0: existing weights only.")
@click.option("--steps", default=None, type=click.IntRange(1), help="Optimizer steps; default: the method's own.")
@click.option("--weights", default=None, type=FILE, help="Weights to draw; default: reg's of seed 0.")
@click.option("--threads", default=1, type=click.IntRange(1), help="CPU threads.")
def idempotent(
    output: Path,
    pairs_folder: Path,
    methods: str,
    seeds: int,
    steps: int | None,
    weights: Path | None,
    threads: int,
) -> None:
    """Train IGN and SIGN with several seeds, and show the results in a table and a picture.

    Existing runs are not repeated, and a killed one resumes.
    """
    # Plotting is slow to import, and training does not need it.
    from examples.digits.idempotent import networks_in, table
    from examples.digits.idempotent_picture import save_picture

    torch.set_num_threads(threads)
    chosen = methods.split(",")
    if unknown := [name for name in chosen if name not in METHODS]:
        raise click.ClickException(f"--methods: expected some of {', '.join(METHODS)}, got {', '.join(unknown)}")
    for seed in range(seeds):
        for name in chosen:
            run_method(name, seed, output, pairs_folder, steps=steps, progress=True)
    output.mkdir(parents=True, exist_ok=True)
    text = table(networks_in(output))
    (output / "table.md").write_text(text, encoding="utf-8")
    made = output / "reg-seed-0.safetensors"
    save_picture(load_network(weights or (made if made.exists() else WEIGHTS)), output / "idempotent.png", seed=0)
    click.echo(text)


COMMANDS = (pairs, train_idempotent, idempotent)
