"""Idempotent networks on the digits: what is trained, that runs go on to the bit, what is measured, and the weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

for package in ("sklearn", "safetensors", "matplotlib"):
    pytest.importorskip(package, reason="an extra of this package")

from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file

from bicm_diffusion import ddim_sample, vp_schedule
from bicm_diffusion.distributed import PairDataset
from bicm_kernels import normal
from examples.digits.__main__ import main
from examples.digits.data import SIDE, load_split
from examples.digits.denoising import load_denoiser
from examples.digits.idempotent import (
    CORRUPTIONS,
    checkerboard,
    edited,
    fill,
    latents,
    measure,
    networks_in,
    occluded,
    others,
    project,
    relative,
    sample_figures,
    table,
)
from examples.digits.idempotent_network import IdempotentNetwork
from examples.digits.idempotent_objective import (
    METHODS,
    PAIR_SEED,
    WEIGHTS,
    Teacher,
    Training,
    load_network,
    make_pairs,
    shortened,
    start,
    trained,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small layers gain nothing from a second thread; on a busy machine the two wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    make_pairs(folder, count=24, steps=3, sampler="ddim", progress=False)
    return folder


def test_the_network_is_that_of_the_prototype() -> None:
    assert 640_000 < sum(p.numel() for p in IdempotentNetwork().parameters()) < 646_000


def test_pairs_are_what_the_noise_predictor_makes_of_keyed_noise(pairs: Path) -> None:
    noise, images = PairDataset(pairs).tensors()
    assert torch.equal(noise, normal((24, 1, SIDE, SIDE), seed=PAIR_SEED))
    again = ddim_sample(Teacher(load_denoiser()), noise, vp_schedule(3)).clamp(-1, 1)
    torch.testing.assert_close(images, again, rtol=1e-4, atol=1e-4)


def test_pairs_of_either_sampler_begin_with_one_noise(pairs: Path, tmp_path: Path) -> None:
    make_pairs(tmp_path, count=24, steps=8, sampler="heun", progress=False)
    noise, images = PairDataset(tmp_path).tensors()
    first = PairDataset(pairs).tensors()
    assert torch.equal(noise, first[0])
    # Three steps of DDIM are crude, yet they lead to the same digits: nearer than to another one's.
    apart = (images[:, None] - first[1]).flatten(2).square().sum(2)
    assert (apart.argmin(dim=1) == torch.arange(24)).double().mean() > 0.8


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_and_goes_on_to_the_bit(name: str, pairs: Path, tmp_path: Path) -> None:
    method = shortened(METHODS[name], 4)
    options: dict[str, Any] = {"pairs": pairs, "initial": IdempotentNetwork() if method.start else None}
    small = Training(batch_size=16, warmup=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole = start(method, 0, small, **options)
        losses = [whole.advance() for _ in range(4)]
    wanted = {term for term, weight in method.weights.items() if weight} | ({"recon"} if name != "ign" else set())
    assert set(losses[0].terms) >= wanted and all(loss.total.isfinite() for loss in losses)
    first = start(method, 0, small, **options)
    first.advance()
    first.advance()
    first.save(tmp_path / "run.safetensors")
    second = start(method, 0, small, **options)
    second.load(tmp_path / "run.safetensors")
    second.advance()
    second.advance()
    for kind in ("network", "average"):
        states = [getattr(run, kind).state_dict() for run in (whole, second)]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(
        trained(whole).last.weight, start(method, 1, small, **options).network.state_dict()[last(whole)]
    )


def last(run: Any) -> str:
    return next(key for key in run.network.state_dict() if key.endswith("last.weight"))


@pytest.mark.slow
def test_a_killed_command_ends_with_the_same_bits(tmp_path: Path) -> None:
    """SIGKILL between checkpoints of a run that asks the noise predictor."""

    def begun(folder: Path) -> subprocess.Popen[bytes]:
        words = ["--method", "flow", "--steps", "40", "--checkpoint-every", "3", "--output", str(folder)]
        path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
        command = [sys.executable, "-m", "examples.digits", "train-idempotent", *words]
        return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.DEVNULL)

    assert begun(tmp_path / "whole").wait(timeout=300) == 0
    victim, checkpoint = begun(tmp_path / "killed"), tmp_path / "killed" / "checkpoints" / "flow-seed-0.safetensors"
    deadline = time.monotonic() + 300
    while not checkpoint.exists():
        assert victim.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL and not (tmp_path / "killed" / "flow-seed-0.safetensors").exists()
    assert begun(tmp_path / "killed").wait(timeout=300) == 0
    states = [load_file(tmp_path / name / "flow-seed-0.safetensors") for name in ("whole", "killed")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.slow
def test_commands_train_tell_and_draw_and_repeat_nothing(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = {"real digits": sample_figures(load_split().held_out.images)}
    monkeypatch.setattr("examples.digits.idempotent.others", lambda seed: real)
    monkeypatch.setattr("examples.digits.idempotent.SETS", 1)
    words = ["--output", str(tmp_path), "--pairs", str(pairs), "--steps", "2"]
    runner = CliRunner()
    made = runner.invoke(main, ["train-idempotent", "--method", "dmd", *words], catch_exceptions=False)
    assert made.exit_code == 0 and "dmd-seed-0.safetensors" in made.stdout
    assert (tmp_path / "flow-seed-0.safetensors").exists()  # which it goes on from
    with safe_open(tmp_path / "dmd-seed-0.safetensors", framework="pt") as file:
        command = file.metadata()["command"]
    assert command == "python -m examples.digits train-idempotent --method dmd --seed 0 --steps 2"
    words += ["--methods", "flow,reg", "--seeds", "2", "--weights", str(tmp_path / "flow-seed-0.safetensors")]
    first = runner.invoke(main, ["idempotent", *words], catch_exceptions=False)
    assert first.exit_code == 0 and "| SIGN: reg | 2 |" in first.stdout and "real digits" in first.stdout
    assert (tmp_path / "table.md").read_text() == first.stdout.rstrip("\n") + "\n"
    assert (tmp_path / "idempotent.png").read_bytes().startswith(b"\x89PNG")
    runs = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert len(runs) == 5
    again = runner.invoke(main, ["idempotent", *words], catch_exceptions=False)
    assert again.stdout == first.stdout and {path: path.stat().st_mtime_ns for path in runs} == runs
    for wrong, message in (
        (["idempotent", "--methods", "ot"], "--methods: expected some of ign"),
        (["train-idempotent", "--output", str(tmp_path / "none"), "--pairs", str(tmp_path)], "holds no pairs"),
    ):
        refused = runner.invoke(main, wrong)
        assert refused.exit_code == 1 and message in refused.output


class Constant(torch.nn.Module):
    """One digit for everything: as idempotent as can be."""

    def forward(self, x: Tensor) -> Tensor:
        return load_split().train.images[:1].expand_as(x)


def test_figures_tell_a_collapse_and_an_identity() -> None:
    constant = measure(Constant(), 0)
    assert constant.idempotence == {1: 0.0, 2: 0.0, 4: 0.0, 8: 0.0} and constant.recognised > 0.9
    assert constant.variance < 1e-8 and constant.least == 0.0 and constant.frechet > 10
    real = sample_figures(load_split().held_out.images)
    assert real.frechet < 0.6 and real.least > 0.05 and real.recognised > 0.9
    assert measure(torch.nn.Identity(), 0).reconstruction == 0.0
    x = latents(0, count=4)
    assert relative(x, x) == 0.0 and relative(3 * x, x) == pytest.approx(2.0)


def test_projections_measure_what_the_network_repairs() -> None:
    identity = torch.nn.Identity()
    for name in CORRUPTIONS:
        found = project(identity, name, 0)
        assert found.error_before == found.error_after > 0.01 and found.right_before == found.right_after < 0.99
    digits = load_split().held_out
    real = digits.images
    perfect = fill(Exactly(real), checkerboard(), 0)
    assert perfect.error_after == 0.0 < perfect.error_before and perfect.right_after > 0.98 > perfect.right_before


class Exactly(torch.nn.Module):
    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.images = images

    def forward(self, x: Tensor) -> Tensor:
        return self.images


def test_edits_keep_what_is_not_masked() -> None:
    real = load_split().held_out.images[:5]
    for mask in (checkerboard(), occluded()):
        assert mask.sum() == 32
        filled = edited(Constant(), real, mask, seed=0)
        assert torch.equal(filled.masked_select(~mask.expand_as(real)), real.masked_select(~mask.expand_as(real)))
        assert torch.equal(filled.masked_select(mask), Constant()(real).masked_select(mask))


@pytest.mark.skipif(not WEIGHTS.exists(), reason="no weights beside the code")
def test_the_weights_beside_the_code_are_what_the_documentation_says() -> None:
    """Of the run's seed: samples, all classes, idempotence and reconstruction together."""
    assert WEIGHTS.stat().st_size < 3e6
    with safe_open(WEIGHTS, framework="pt") as file:
        notes = file.metadata()
    assert notes["command"].startswith("python -m examples.digits train-idempotent --method reg")
    assert json.loads(notes["network"]) == {"width": 384, "blocks": 2}
    found = measure(load_network(), 0)
    assert found.recognised >= 0.78 and found.frechet <= 0.75 and found.least >= 0.05
    assert found.idempotence is not None and found.idempotence[1] <= 0.06
    assert found.reconstruction is not None and found.reconstruction <= 0.0005


@pytest.mark.slow
def test_what_stands_beside_is_measured_alike() -> None:
    found = others(0)
    assert (
        found["DDIM, 20 evaluations"].frechet
        < found["DDIM, 5 evaluations"].frechet
        < found["DDIM, 1 evaluation"].frechet
    )
    assert found["real digits, held out"].recognised > 0.9


def test_a_table_of_nothing_still_tells_what_stands_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("examples.digits.idempotent.others", lambda seed: {})
    assert table(networks_in(tmp_path)).count("\n| model |") == 2
