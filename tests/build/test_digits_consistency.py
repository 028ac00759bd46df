"""The digits' consistency model: network, training, the weights in the package, what is measured, the eager check."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from types import ModuleType

import click
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from torch import Tensor

pytest.importorskip("sklearn", reason="the digits come with scikit-learn, an extra of this package")
pytest.importorskip("safetensors", reason="the weights are read with safetensors, an extra of this package")

from bicm_diffusion import ConsistencySchedule
from examples.digits.__main__ import main
from examples.digits.checkpoints import load_weights
from examples.digits.consistency_measurements import (
    INVERSION,
    ONE_LEAP,
    SAMPLING,
    TWO_LEAPS,
    draw,
    frechet_distance,
    judge,
    reconstruct,
    sample_labels,
    squared_error,
    time_sampling,
    without_labels,
)
from examples.digits.consistency_network import ConsistencyConfig, ConsistencyNetwork
from examples.digits.consistency_objective import CONSISTENCY, WEIGHTS, BctConfig, level_table, load_network
from examples.digits.data import SIDE, load_split
from examples.digits.denoising import WEIGHTS as DENOISER_WEIGHTS
from examples.digits.network import NO_LABEL
from examples.digits.recognition import features, probabilities
from examples.digits.training import Run, resume, start

TINY = ConsistencyConfig(fine_channels=8, coarse_channels=8, embedding=16, coarse_blocks=1, groups=4)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small layers gain nothing from a second thread; on a busy machine the two wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def levels(*values: float) -> Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_network_shape_dtype_and_size(dtype: torch.dtype) -> None:
    network = ConsistencyNetwork().to(dtype)
    scaled, t = torch.randn(3, 1, SIDE, SIDE), levels(0.002, 1.0, 80.0)
    out = network(scaled.bfloat16(), t, t.flip(0), labels=torch.tensor([0, 9, NO_LABEL]))
    assert out.shape == scaled.shape and out.dtype == dtype
    assert sum(p.numel() for p in network.parameters()) <= 600_000


def test_the_answer_depends_on_both_levels_and_on_the_label() -> None:
    network, scaled = load_network(), torch.randn(1, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    plain, *others = (
        network(scaled, levels(t), levels(u), labels=torch.tensor([label]))
        for t, u, label in ((1.0, 0.1, 3), (2.0, 0.1, 3), (1.0, 3.0, 3), (1.0, 0.1, 4), (1.0, 0.1, NO_LABEL))
    )
    assert all((plain - other).abs().max() > 1e-3 for other in others)


def test_training_is_a_function_of_seed_and_step() -> None:
    run = Run(CONSISTENCY, BctConfig(steps=5, batch_size=10), TINY)
    runs = []
    for seed_elsewhere in (1, 2):
        torch.manual_seed(seed_elsewhere)
        state = start(run)
        losses = [state.advance().total.item() for _ in range(3)]
        runs.append((losses, state.average.state_dict()))
    assert runs[0][0] == runs[1][0] and len(set(runs[0][0])) == 3
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1].values(), runs[1][1].values(), strict=True))


def test_a_checkpoint_continues_to_the_same_bits(tmp_path: Path) -> None:
    run = Run(CONSISTENCY, BctConfig(steps=6, batch_size=10), TINY)
    whole, first = start(run), start(run)
    for _ in range(6):
        whole.advance()
    for _ in range(2):
        first.advance()
    first.save(tmp_path / "run.pt")
    resumed = resume(tmp_path / "run.pt", run)
    assert resumed.step == 2
    for _ in range(4):
        resumed.advance()
    for name in ("network", "average"):
        ours, theirs = (getattr(state, name).state_dict() for state in (resumed, whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    with pytest.raises(ValueError, match=r"checkpoint: .* was made with config .* expected"):
        resume(tmp_path / "run.pt", Run(CONSISTENCY, BctConfig(steps=7, batch_size=10), TINY))


def test_the_grid_grows_finer_during_a_run() -> None:
    config = BctConfig(steps=600)
    tables = [level_table(step, config) for step in (0, 150, 599)]
    assert [len(table.levels) for table in tables] == [11, 21, 321]
    assert all(table.levels[-1] == config.t_max for table in tables)


def test_weights_are_small_and_say_how_they_were_made() -> None:
    assert WEIGHTS.stat().st_size <= 3_000_000
    _, notes = load_weights(WEIGHTS, "train")
    assert notes["command"].endswith("digits train")
    assert int(notes["steps"]) == json.loads(notes["training"])["steps"]
    assert json.loads(notes["training"]) == vars(BctConfig())
    assert json.loads(notes["network"]) == vars(ConsistencyConfig())
    assert "date" in notes and "torch" in notes


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors does not exist; train makes it"):
        load_network(tmp_path / "none.safetensors")


@pytest.mark.slow
def test_samples_without_labels_are_digits_of_every_class() -> None:
    network, labels = load_network(), sample_labels(labelled=False)
    held_out = load_split().held_out
    real = judge(held_out.images, without_labels(held_out).labels)
    found = {name: judge(draw(network, labels, SAMPLING[name], seed=0), labels) for name in SAMPLING}
    one, *others = found.values()
    assert one.confident >= 0.75 * real.confident
    assert max(other.confident for other in others) >= 0.9 * real.confident
    assert min(other.pixels for other in others) <= 1.5 * real.pixels
    assert all(figures.classes == 10 for figures in found.values())


def test_labelled_samples_show_their_class() -> None:
    network, labels = load_network(), sample_labels(labelled=True)
    held_out = load_split().held_out
    real = judge(held_out.images, held_out.labels)
    found = judge(draw(network, labels, SAMPLING["3 evaluations, zigzag"], seed=0), labels)
    assert found.confident >= 0.9 * real.confident
    assert found.pixels <= 1.5 * real.pixels


def test_real_digits_return_better_from_two_evaluations_than_from_one() -> None:
    network, held_out = load_network(), without_labels(load_split().held_out)
    one, two, four = (
        squared_error(reconstruct(network, held_out, INVERSION[name], seed=0, back=back), held_out.images)
        for name, back in (("1 evaluation", ONE_LEAP), ("2 evaluations", TWO_LEAPS), ("4 evaluations", TWO_LEAPS))
    )
    assert two <= 0.003 and two < 0.8 * one and four < two


def test_another_seed_draws_other_digits() -> None:
    network, labels = load_network(), sample_labels(labelled=True)[:10]
    first, second = (draw(network, labels, SAMPLING["1 evaluation"], seed=seed) for seed in (0, 1))
    assert (first - second).flatten(1).norm(dim=1).min() > 0.5


def test_frechet_distance_of_gaussians() -> None:
    x = torch.randn(400, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shift = torch.arange(5.0, dtype=torch.float64)
    assert frechet_distance(x, x + shift) == pytest.approx(shift.square().sum().item(), rel=1e-9)
    variance = x.flatten(1).var(dim=0).sum().item()
    assert frechet_distance(x, 3 * (x - x.mean(0)) + x.mean(0)) == pytest.approx(4 * variance, rel=1e-9)


def test_judges_tell_real_digits_from_noise() -> None:
    held_out = load_split().held_out
    noise = torch.randn(held_out.images.shape, generator=torch.Generator().manual_seed(0))
    real, bad = judge(held_out.images, held_out.labels), judge(noise, held_out.labels)
    assert real.confident > 0.85 and real.classes == 10 and bad.confident < 0.3
    assert bad.pixels > 10 * real.pixels and bad.features > 10 * real.features
    assert features(held_out.images).shape == (297, 64)
    assert (probabilities(held_out.images).argmax(1) == held_out.labels.numpy()).mean() > 0.97


def test_wanted_classes_count_and_any_class_does_without() -> None:
    held_out = load_split().held_out
    wrong = (held_out.labels + 1) % 10
    assert judge(held_out.images, wrong).confident < 0.02
    assert judge(held_out.images, without_labels(held_out).labels).confident > 0.85


def test_timings_are_positive() -> None:
    assert min(time_sampling(load_network(), ConsistencySchedule((20.0,)), 2, repeats=2)) > 0


@pytest.mark.slow
def test_eager_code_draws_the_same_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="the picture is drawn with matplotlib, an extra of this package")
    from examples.digits import consistency_demo

    result = CliRunner().invoke(main, ["check"])
    assert result.exit_code == 0, result.output
    assert "of 255 grey levels" in result.output
    for apart in (consistency_demo.Agreement(2e-3, 0), consistency_demo.Agreement(0.0, 2)):
        monkeypatch.setattr(consistency_demo, "compare", lambda *_, apart=apart, **__: apart)
        refused = CliRunner().invoke(main, ["check"])
        assert refused.exit_code == 1 and "expected at most 0.001" in refused.output


@pytest.mark.slow
def test_the_demo_draws_and_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="the picture is drawn with matplotlib, an extra of this package")
    from examples.digits import consistency_demo, consistency_measurements

    monkeypatch.setattr(consistency_measurements, "SETS", 1)
    monkeypatch.setattr(consistency_demo, "TIMED", {1: 1})
    console = Console(record=True, width=120, file=StringIO())
    picture = tmp_path / "new" / "picture.png"
    consistency_demo.run_consistency_demo(picture, weights=WEIGHTS, seed=1, console=console)
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = console.export_text()
    for words in (
        "297 new digits",
        "297 real digits to noise and back",
        "milliseconds per image",
        "real digits",
        "zigzag",
    ):
        assert words in printed


@pytest.mark.parametrize(("command", "name"), [("train-denoiser", "denoiser"), ("train", "consistency")])
def test_training_leaves_the_weights_of_the_package_alone(
    command: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = WEIGHTS.parent
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    result = CliRunner().invoke(main, [command, "--steps", "1", "--batch-size", "4", "--channels", "8", "8"])
    assert result.exit_code == 0, result.output
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()} == before
    assert (tmp_path / "build" / "digits" / f"{name}.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["build"]


@pytest.mark.parametrize("command", main.commands)
def test_commands_write_under_build_unless_told_otherwise(command: str) -> None:
    paths = {o.name: o.default for o in main.commands[command].params if isinstance(o.type, click.Path)}
    written = {name: path for name, path in paths.items() if "weights" not in name}
    for name, path in written.items():
        assert path is None or path.parts[0] == "build", name
    assert {path for name, path in paths.items() if name not in written} <= {WEIGHTS, DENOISER_WEIGHTS, None}


def short_run(tmp_path: Path) -> list[str]:
    options = {"--steps": 3, "--batch-size": 4, "--output": tmp_path / "w.safetensors"}
    options |= {"--checkpoint": tmp_path / "c.pt"}
    return ["train", "--channels", "8", "8", *(str(word) for pair in options.items() for word in pair)]


def test_without_tensorboard_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    result = CliRunner().invoke(main, [*short_run(tmp_path), "--tensorboard", str(tmp_path / "log")])
    assert result.exit_code == 1 and 'pip install "bicm-kernels[tensorboard]"' in result.output
    assert not (tmp_path / "w.safetensors").exists()


def test_tensorboard_gets_both_terms_of_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, int]] = []

    class Writer:
        def __init__(self, directory: str) -> None:
            assert directory == str(tmp_path / "log")

        def __enter__(self) -> Writer:
            return self

        def __exit__(self, *_: object) -> None:
            written.append(("closed", 0))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            assert value > 0
            written.append((name, step))

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    result = CliRunner().invoke(main, [*short_run(tmp_path), "--tensorboard", str(tmp_path / "log")])
    assert result.exit_code == 0, result.output
    assert written == [(name, k) for k in (1, 2, 3) for name in ("consistency", "trajectory")] + [("closed", 0)]
