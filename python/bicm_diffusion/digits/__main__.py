"""Commands of the digits example: `python -m bicm_diffusion.digits train-denoiser`, `… demo` and `… edit`."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

import click
import torch
from rich.console import Console

from bicm_diffusion.digits import consistency_training
from bicm_diffusion.digits.consistency_measurements import evaluate as evaluate_consistency
from bicm_diffusion.digits.consistency_network import ConsistencyConfig
from bicm_diffusion.digits.consistency_training import WEIGHTS as BCM_WEIGHTS
from bicm_diffusion.digits.consistency_training import BctConfig
from bicm_diffusion.digits.data import load_split
from bicm_diffusion.digits.network import NetworkConfig
from bicm_diffusion.digits.tensorboard import scalar_log
from bicm_diffusion.digits.training import WEIGHTS, TrainingConfig, evaluate, save_weights, train

#: Where commands write unless they are told otherwise: never beside the code, which may be an installation.
BUILD = Path("build/digits")
RUN = TrainingConfig()
NET = NetworkConfig()
BCT = BctConfig()
BCM = ConsistencyConfig()


@click.group(context_settings={"show_default": True, "max_content_width": 110})
def main() -> None:
    """Handwritten digits: train a small noise predictor, sample from it, and invert real images with it."""


@main.command("train-denoiser")
@click.option("--steps", default=RUN.steps, type=click.IntRange(1), help="Optimizer steps.")
@click.option("--batch-size", default=RUN.batch_size, type=click.IntRange(1, 1500), help="Images per step.")
@click.option("--learning-rate", default=RUN.learning_rate, help="Peak learning rate of AdamW (cosine decay).")
@click.option(
    "--ema",
    default=RUN.ema,
    type=click.FloatRange(0, 1, max_open=True),
    help="Decay of the averaged weights.",
)
@click.option(
    "--dropout",
    default=NET.dropout,
    type=click.FloatRange(0, 1, max_open=True),
    help="Dropout in the network.",
)
@click.option(
    "--channels",
    default=(NET.fine_channels, NET.coarse_channels),
    type=(int, int),
    help="Widths at 8×8 and 4×4.",
)
@click.option("--seed", default=RUN.seed, help="Seed of everything random in the run.")
@click.option("--threads", default=1, type=click.IntRange(1), help="CPU threads; another number may round differently.")
@click.option(
    "--output",
    default=BUILD / "denoiser.safetensors",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Weights to write.",
)
@click.option(
    "--checkpoint",
    default=BUILD / "checkpoint.pt",
    type=click.Path(dir_okay=False, path_type=Path),
    help="State of the run; where it exists, the run goes on from it.",
)
@click.option("--checkpoint-every", default=200, type=click.IntRange(1), help="Steps between checkpoints.")
@click.option("--restart", is_flag=True, help="Ignore an existing checkpoint.")
def train_denoiser(
    steps: int,
    batch_size: int,
    learning_rate: float,
    ema: float,
    dropout: float,
    channels: tuple[int, int],
    seed: int,
    threads: int,
    output: Path,
    checkpoint: Path,
    checkpoint_every: int,
    restart: bool,
) -> None:
    """Train the noise predictor by denoising score matching and write its averaged weights.

    The run is a function of its options: killed at any moment and started again with the same options, it
    ends with the same bits.
    """
    torch.set_num_threads(threads)
    config = TrainingConfig(seed=seed, steps=steps, batch_size=batch_size, learning_rate=learning_rate, ema=ema)
    network = NetworkConfig(fine_channels=channels[0], coarse_channels=channels[1], dropout=dropout)
    if restart:
        checkpoint.unlink(missing_ok=True)
    try:
        state = train(config, network, checkpoint=checkpoint, checkpoint_every=checkpoint_every)
    except ValueError as error:
        raise click.ClickException(f"{error}; use --restart or another --checkpoint") from error
    split = load_split()
    losses = {
        name: evaluate(state.average, part) for name, part in (("train", split.train), ("held_out", split.held_out))
    }
    notes = {
        "command": command_line(sys.argv[1:]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "threads": str(threads),
        "torch": torch.__version__,
        **{f"loss_{name}": f"{loss:.5f}" for name, loss in losses.items()},
    }
    save_weights(output, state, config, notes)
    Console(highlight=False, soft_wrap=True).print(
        f"{output}: {output.stat().st_size / 1e6:.2f} MB, {state.step} steps, loss "
        f"{losses['train']:.4f} on the training images, {losses['held_out']:.4f} on held-out ones"
    )


@main.command("train")
@click.option("--steps", default=BCT.steps, type=click.IntRange(1), help="Optimizer steps.")
@click.option("--batch-size", default=BCT.batch_size, type=click.IntRange(1, 1500), help="Images per step.")
@click.option("--learning-rate", default=BCT.learning_rate, help="Peak learning rate of AdamW (cosine decay).")
@click.option(
    "--ema",
    default=BCT.ema,
    type=click.FloatRange(0, 1, max_open=True),
    help="Decay of the averaged weights.",
)
@click.option(
    "--dropout",
    default=BCM.dropout,
    type=click.FloatRange(0, 1, max_open=True),
    help="Dropout of channels in the network.",
)
@click.option(
    "--label-drop", default=BCT.label_drop, type=click.FloatRange(0, 1), help="Share of images shown without a label."
)
@click.option("--t-max", default=BCT.t_max, type=click.FloatRange(1.0), help="Highest noise level.")
@click.option(
    "--channels",
    default=(BCM.fine_channels, BCM.coarse_channels),
    type=(int, int),
    help="Widths at 8×8 and 4×4.",
)
@click.option("--seed", default=BCT.seed, help="Seed of everything random in the run.")
@click.option("--threads", default=1, type=click.IntRange(1), help="CPU threads; another number may round differently.")
@click.option(
    "--output",
    default=BUILD / "consistency.safetensors",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Weights to write.",
)
@click.option(
    "--checkpoint",
    default=BUILD / "consistency.pt",
    type=click.Path(dir_okay=False, path_type=Path),
    help="State of the run; where it exists, the run goes on from it.",
)
@click.option("--checkpoint-every", default=200, type=click.IntRange(1), help="Steps between checkpoints.")
@click.option("--restart", is_flag=True, help="Ignore an existing checkpoint.")
@click.option(
    "--tensorboard",
    default=None,
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory for TensorBoard; needs the extra of that name.",
)
def train_consistency(
    steps: int,
    batch_size: int,
    learning_rate: float,
    ema: float,
    dropout: float,
    label_drop: float,
    t_max: float,
    channels: tuple[int, int],
    seed: int,
    threads: int,
    output: Path,
    checkpoint: Path,
    checkpoint_every: int,
    restart: bool,
    tensorboard: Path | None,
) -> None:
    """Train the bidirectional consistency model and write its averaged weights.

    The run is a function of its options: killed at any moment and started again with the same options, it
    ends with the same bits.
    """
    torch.set_num_threads(threads)
    config = BctConfig(
        seed=seed,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        label_drop=label_drop,
        ema=ema,
        t_max=t_max,
    )
    network = ConsistencyConfig(fine_channels=channels[0], coarse_channels=channels[1], dropout=dropout)
    if restart:
        checkpoint.unlink(missing_ok=True)
    try:
        with scalar_log(tensorboard) as log:
            state = consistency_training.train(
                config, network, checkpoint=checkpoint, checkpoint_every=checkpoint_every, log=log
            )
    except ValueError as error:
        raise click.ClickException(f"{error}; use --restart or another --checkpoint") from error
    except ImportError as error:
        raise click.ClickException(str(error)) from error
    notes = {
        "command": command_line(sys.argv[1:]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "threads": str(threads),
        "torch": torch.__version__,
        **{name: f"{value:.5f}" for name, value in evaluate_consistency(state.average).items()},
    }
    consistency_training.save_weights(output, state, config, notes)
    Console(highlight=False, soft_wrap=True).print(
        f"{output}: {output.stat().st_size / 1e6:.2f} MB, {state.step} steps"
    )


@main.command()
@click.option(
    "--output",
    default=BUILD / "demo.png",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Picture to write.",
)
@click.option(
    "--consistency-output",
    default=BUILD / "demo-consistency.png",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Picture of the consistency model to write.",
)
@click.option("--weights", default=WEIGHTS, type=click.Path(dir_okay=False, path_type=Path), help="Weights to load.")
@click.option(
    "--consistency-weights",
    default=BCM_WEIGHTS,
    type=click.Path(dir_okay=False, path_type=Path),
    help="Weights of the consistency model.",
)
@click.option("--steps", default=50, type=click.IntRange(2), help="Steps between data and noise.")
@click.option("--seed", default=0, help="Seed of the noise that samples start from.")
@click.option("--threads", default=1, type=click.IntRange(1), help="CPU threads.")
def demo(
    output: Path,
    consistency_output: Path,
    weights: Path,
    consistency_weights: Path,
    steps: int,
    seed: int,
    threads: int,
) -> None:
    """Sample digits, invert real ones to noise and back, draw two pictures and print what was measured."""
    # Plotting is slow to import, and training does without.
    from bicm_diffusion.digits.consistency_demo import run_consistency_demo
    from bicm_diffusion.digits.demo import run_demo

    # Layers this small gain nothing from a second thread, and on a busy machine the two wait for each other.
    torch.set_num_threads(threads)
    console = Console(highlight=False)
    run_demo(output, weights=weights, steps=steps, seed=seed, console=console)
    run_consistency_demo(consistency_output, weights=consistency_weights, seed=seed, console=console)


@main.command()
@click.option(
    "--weights", default=BCM_WEIGHTS, type=click.Path(dir_okay=False, path_type=Path), help="Weights to load."
)
@click.option("--seed", default=0, help="Seed of the noise.")
@click.option("--tolerance", default=1e-3, help="Difference allowed between images, where paper is -1 and ink 1.")
def check(weights: Path, seed: int, tolerance: float) -> None:
    """Draw the consistency model's picture from plain eager code too and compare both."""
    from bicm_diffusion.digits.consistency_demo import compare
    from bicm_diffusion.digits.consistency_training import load_network

    torch.set_num_threads(1)
    found = compare(load_network(weights), seed=seed)
    click.echo(f"fused and eager: images at most {found.images:.1e} apart, pictures {found.picture} of 255 grey levels")
    if found.images > tolerance or found.picture > 1:
        raise click.ClickException(f"expected at most {tolerance} and 1")


@main.command("edit")
@click.option(
    "--output",
    default=BUILD / "edit.png",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Picture to write.",
)
@click.option("--weights", default=WEIGHTS, type=click.Path(dir_okay=False, path_type=Path), help="Weights to load.")
@click.option("--steps", default=50, type=click.IntRange(2), help="Steps between data and noise.")
@click.option("--threads", default=1, type=click.IntRange(1), help="CPU threads.")
def edit_digits(output: Path, weights: Path, steps: int, threads: int) -> None:
    """Give real digits another class by every method, draw what became of them and print what round trips lose."""
    from bicm_diffusion.digits.demo import real_digits, run_edits

    torch.set_num_threads(threads)
    run_edits(real_digits(), output, weights=weights, steps=steps, console=Console(highlight=False))


def command_line(arguments: list[str]) -> str:
    """Return the command that was typed, as anyone can type it again."""
    return " ".join(["python -m bicm_diffusion.digits", *arguments])


if __name__ == "__main__":
    main(prog_name="python -m bicm_diffusion.digits")
