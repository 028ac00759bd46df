"""Commands of the digits example: `python -m examples.digits train-denoiser`, `train`, `demo`, `edit`, `inverse` …"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from rich.console import Console

from bicm_diffusion.train import scalar_log
from examples.digits.consistency_network import ConsistencyConfig
from examples.digits.consistency_objective import CONSISTENCY, BctConfig
from examples.digits.consistency_objective import WEIGHTS as BCM_WEIGHTS
from examples.digits.denoising import DENOISING, WEIGHTS
from examples.digits.idempotent_commands import COMMANDS
from examples.digits.network import NetworkConfig
from examples.digits.objectives import Setting
from examples.digits.policy import Setting as PolicySetting
from examples.digits.training import Run, TrainingConfig, save_weights, train

#: The default output folder of commands, which differs from that of the committed weights.
BUILD = Path("build/digits")
FILE = click.Path(dir_okay=False, path_type=Path)
SHARE = click.FloatRange(0, 1, max_open=True)

Command = TypeVar("Command", bound=Callable[..., None])


@click.group(context_settings={"show_default": True, "max_content_width": 110})
def main() -> None:
    """Handwritten digits: train a small noise predictor, sample from it, and invert real images with it."""


def training_options(
    run: TrainingConfig, network: NetworkConfig | ConsistencyConfig, *, output: str, checkpoint: str
) -> Callable[[Command], Command]:
    """Add the options of every run to a command, with the defaults of its configurations."""
    widths = (network.fine_channels, network.coarse_channels)
    options = (
        click.option("--steps", default=run.steps, type=click.IntRange(1), help="Optimizer steps."),
        click.option("--batch-size", default=run.batch_size, type=click.IntRange(1, 1500), help="Images per step."),
        click.option("--learning-rate", default=run.learning_rate, help="Peak learning rate of AdamW (cosine decay)."),
        click.option("--ema", default=run.ema, type=SHARE, help="Decay of the averaged weights."),
        click.option("--dropout", default=network.dropout, type=SHARE, help="Dropout in the network."),
        click.option(
            "--label-drop",
            default=run.label_drop,
            type=click.FloatRange(0, 1),
            help="Fraction of images without a label.",
        ),
        click.option("--channels", default=widths, type=(int, int), help="Widths at 8×8 and 4×4."),
        click.option("--seed", default=run.seed, help="Seed of everything random in the run."),
        click.option(
            "--threads", default=1, type=click.IntRange(1), help="CPU threads; another number may round differently."
        ),
        click.option("--output", default=BUILD / output, type=FILE, help="Weights to write."),
        click.option(
            "--checkpoint",
            default=BUILD / checkpoint,
            type=FILE,
            help="State of the run; if it exists, the run resumes from it.",
        ),
        click.option("--checkpoint-every", default=200, type=click.IntRange(1), help="Steps between checkpoints."),
        click.option("--restart", is_flag=True, help="Ignore an existing checkpoint."),
        click.option(
            "--tensorboard",
            default=None,
            type=click.Path(file_okay=False, path_type=Path),
            help="Directory for TensorBoard; needs the extra of that name.",
        ),
    )

    def give(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return give


@main.command("train-denoiser")
@training_options(TrainingConfig(), NetworkConfig(), output="denoiser.safetensors", checkpoint="checkpoint.safetensors")
def train_denoiser(channels: tuple[int, int], dropout: float, **options: Any) -> None:
    """Train the noise predictor by denoising score matching and write its averaged weights.

    The run is a function of its options: killed at any moment and started again with the same options, it
    ends with the same bits.
    """
    files, config = _parted(options)
    network = NetworkConfig(fine_channels=channels[0], coarse_channels=channels[1], dropout=dropout)
    _train(Run(DENOISING, TrainingConfig(**config), network), **files)


@main.command("train")
@training_options(
    BctConfig(), ConsistencyConfig(), output="consistency.safetensors", checkpoint="consistency-checkpoint.safetensors"
)
@click.option("--t-max", default=BctConfig.t_max, type=click.FloatRange(1.0), help="Highest noise level.")
def train_consistency(channels: tuple[int, int], dropout: float, **options: Any) -> None:
    """Train the bidirectional consistency model and write its averaged weights.

    The run is a function of its options: killed at any moment and started again with the same options, it
    ends with the same bits.
    """
    files, config = _parted(options)
    network = ConsistencyConfig(fine_channels=channels[0], coarse_channels=channels[1], dropout=dropout)
    _train(Run(CONSISTENCY, BctConfig(**config), network), **files)


def _parted(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separate the paths and execution options of a run from the options that determine its bits."""
    files = ("threads", "output", "checkpoint", "checkpoint_every", "restart", "tensorboard")
    return {name: options.pop(name) for name in files}, options


def _train(
    run: Run[Any, Any],
    *,
    threads: int,
    output: Path,
    checkpoint: Path,
    checkpoint_every: int,
    restart: bool,
    tensorboard: Path | None,
) -> None:
    """Run to the end and write the weights, with their configuration and figures."""
    torch.set_num_threads(threads)
    try:
        with scalar_log(tensorboard) as log:
            if restart:
                checkpoint.unlink(missing_ok=True)
            state = train(run, checkpoint=checkpoint, checkpoint_every=checkpoint_every, log=log)
    except ValueError as error:
        other = "; use --restart or another --checkpoint" if str(error).startswith("checkpoint:") else ""
        raise click.ClickException(f"{error}{other}") from error
    except ImportError as error:
        raise click.ClickException(str(error)) from error
    figures = {name: f"{value:.5f}" for name, value in run.objective.figures(state.average).items()}
    notes = {
        "command": command_line(sys.argv[1:]),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "threads": str(threads),
        "torch": torch.__version__,
        **figures,
    }
    save_weights(output, state, run, notes)
    told = ", ".join(f"{name} {value}" for name, value in figures.items())
    Console(highlight=False, soft_wrap=True).print(
        f"{output}: {output.stat().st_size / 1e6:.2f} MB, {state.step} steps, {told}"
    )


@main.command()
@click.option(
    "--output",
    default=BUILD / "demo.png",
    type=FILE,
    help="Picture to write.",
)
@click.option(
    "--consistency-output",
    default=BUILD / "demo-consistency.png",
    type=FILE,
    help="Picture of the consistency model to write.",
)
@click.option("--weights", default=WEIGHTS, type=FILE, help="Weights to load.")
@click.option(
    "--consistency-weights",
    default=BCM_WEIGHTS,
    type=FILE,
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
    """Sample digits, invert real ones to noise and back, draw two pictures and print the measurements."""
    # Plotting is slow to import, and training does not need it.
    from examples.digits.consistency_demo import run_consistency_demo
    from examples.digits.demo import run_demo

    # Layers this small do not profit from a second thread, and on a busy machine the two wait for each other.
    torch.set_num_threads(threads)
    console = Console(highlight=False)
    run_demo(output, weights=weights, steps=steps, seed=seed, console=console)
    run_consistency_demo(consistency_output, weights=consistency_weights, seed=seed, console=console)


@main.command()
@click.option("--weights", default=BCM_WEIGHTS, type=FILE, help="Weights to load.")
@click.option("--seed", default=0, help="Seed of the noise.")
@click.option("--tolerance", default=1e-3, help="Maximum difference between images, where paper is -1 and ink 1.")
def check(weights: Path, seed: int, tolerance: float) -> None:
    """Draw the consistency model's picture from eager code too and compare both."""
    from examples.digits.consistency_demo import compare
    from examples.digits.consistency_objective import load_network

    torch.set_num_threads(1)
    found = compare(load_network(weights), seed=seed)
    click.echo(f"fused and eager: images at most {found.images:.1e} apart, pictures {found.picture} of 255 grey levels")
    if found.images > tolerance or found.picture > 1:
        raise click.ClickException(f"expected at most {tolerance} and 1")


@main.command("edit")
@click.option(
    "--output",
    default=BUILD / "edit.png",
    type=FILE,
    help="Picture to write.",
)
@click.option("--weights", default=WEIGHTS, type=FILE, help="Weights to load.")
@click.option("--steps", default=50, type=click.IntRange(2), help="Steps between data and noise.")
@click.option("--threads", default=1, type=click.IntRange(1), help="CPU threads.")
def edit_digits(output: Path, weights: Path, steps: int, threads: int) -> None:
    """Edit real digits to another class by every method, draw the results and print the errors of round trips."""
    from examples.digits.demo import real_digits, run_edits

    torch.set_num_threads(threads)
    run_edits(real_digits(), output, weights=weights, steps=steps, console=Console(highlight=False))


@main.command("objectives")
@click.option(
    "--output",
    default=BUILD / "objectives",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the table, the plots and every run's figures; existing runs are not repeated.",
)
@click.option("--seeds", default=3, type=click.IntRange(1), help="Runs of every method.")
@click.option("--steps", default=Setting.steps, type=click.IntRange(1), help="Steps of a run.")
@click.option("--tuning-steps", default=Setting.tuning_steps, type=click.IntRange(1), help="Steps of a run of ECT.")
@click.option("--coupling-steps", default=Setting.coupling_steps, type=click.IntRange(1), help="Of a denoiser for R̃.")
@click.option("--width", default=Setting.width, type=click.IntRange(8), help="Width of the network's hidden layers.")
@click.option("--threads", default=1, type=click.IntRange(1), help="CPU threads.")
def compare_objectives(output: Path, seeds: int, threads: int, **numbers: int) -> None:
    """Compare iCT, BCT, batch-OT, GC and ECT by samples of one evaluation, and draw two Diracs' couplings."""
    from examples.digits.objectives import run_all, table
    from examples.digits.objectives_picture import save_plot, save_two_diracs

    torch.set_num_threads(threads)
    setting = Setting(**numbers)
    results = run_all(seeds, setting, output / "runs")
    text = table(results, setting)
    (output / "table.md").write_text(text, encoding="utf-8")
    save_plot(results, output / "objectives.png")
    save_two_diracs(output / "two-diracs.png")
    click.echo(text)


@main.command("policy")
@click.option(
    "--output",
    default=BUILD / "policy",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the table, the picture and every run's figures; existing runs are not repeated.",
)
@click.option("--seeds", default=3, type=click.IntRange(1), help="Runs of every method and reward.")
@click.option("--updates", default=PolicySetting.updates, type=click.IntRange(2), help="Updates of a run.")
@click.option("--batch", default=PolicySetting.batch, type=click.IntRange(2), help="Rollouts of an update.")
@click.option("--steps", default=PolicySetting.steps, type=click.IntRange(2), help="Steps of a rollout.")
@click.option("--flow-steps", default=PolicySetting.flow_steps, type=click.IntRange(1), help="Of the flow's training.")
@click.option("--threads", default=1, type=click.IntRange(1), help="CPU threads.")
def tune_for_rewards(output: Path, seeds: int, threads: int, **numbers: int) -> None:
    """Tune the denoiser by DDPO and a flow model by Flow-GRPO: for sevens, and for thick strokes of any class."""
    from examples.digits.policy import run_all as run_policies
    from examples.digits.policy import table_of
    from examples.digits.policy_picture import save_picture

    torch.set_num_threads(threads)
    results = run_policies(seeds, PolicySetting(**numbers), output / "runs")
    text = table_of(results)
    (output / "table.md").write_text(text, encoding="utf-8")
    save_picture(results, output / "policy.png")
    click.echo(text)


@main.command("inverse")
@click.option("--output", default=BUILD / "inverse.png", type=FILE, help="Picture to write.")
@click.option("--weights", default=WEIGHTS, type=FILE, help="Weights of the noise predictor.")
@click.option("--consistency-weights", default=BCM_WEIGHTS, type=FILE, help="Weights of the consistency model.")
@click.option("--images", default=297, type=click.IntRange(10, 297), help="Held-out digits that are measured.")
@click.option("--steps", default=50, type=click.IntRange(2), help="Steps between data and noise.")
@click.option("--iterations", default=10, type=click.IntRange(1), help="Gradient steps of CM inversion per level.")
@click.option("--seeds", default=3, type=click.IntRange(1), help="Number of starts of every solver.")
@click.option("--quick", is_flag=True, help="Ten images, five steps and one seed: a smoke test.")
@click.option("--threads", default=1, type=click.IntRange(1), help="CPU threads.")
def inverse(
    output: Path,
    weights: Path,
    consistency_weights: Path,
    images: int,
    steps: int,
    iterations: int,
    seeds: int,
    quick: bool,
    threads: int,
) -> None:
    """Down-sampling, inpainting and a classifier's target by every inverse solver: a picture and measurements."""
    from examples.digits.inverse import QUICK, Size
    from examples.digits.inverse_report import run_inverse

    torch.set_num_threads(threads)
    size = QUICK if quick else Size(images, steps, iterations)
    networks = {"weights": weights, "consistency_weights": consistency_weights}
    run_inverse(output, **networks, size=size, seeds=1 if quick else seeds, console=Console(highlight=False))


for command in COMMANDS:
    main.add_command(command)


def command_line(arguments: list[str]) -> str:
    """Return the command line, in a form that can be run again."""
    return " ".join(["python -m examples.digits", *arguments])


if __name__ == "__main__":
    main(prog_name="python -m examples.digits")
