"""The digits example: data, network, a training run that is killed, and the weights in the package."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="the digits come with scikit-learn, an extra of this package")
pytest.importorskip("safetensors", reason="the weights are read with safetensors, an extra of this package")

from safetensors.torch import load_file

from bicm_diffusion import bdia_sample, ddim_sample, vp_schedule
from bicm_diffusion.train import saved_step
from examples.digits.checkpoints import load_weights
from examples.digits.data import SIDE, load_split, one_per_class
from examples.digits.denoising import DENOISING, WEIGHTS, evaluate, load_denoiser, stratified_times
from examples.digits.measurements import INVERTERS, METHODS, reconstruct, time_steps
from examples.digits.network import NO_LABEL, Denoiser, GuidedModel, NetworkConfig
from examples.digits.recognition import recognised
from examples.digits.training import (
    Run,
    TrainingConfig,
    batch_indices,
    dropped_labels,
    resume,
    start,
)

TINY = NetworkConfig(fine_channels=8, coarse_channels=8, embedding=16, blocks=1, groups=4)
HELD_OUT_LOSS = 0.072


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small layers gain nothing from a second thread; on a busy machine the two wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_split_is_fixed_disjoint_and_in_range() -> None:
    train, held_out = load_split()
    assert train.images.shape == (1500, 1, SIDE, SIDE)
    assert held_out.images.shape == (297, 1, SIDE, SIDE)
    for part in (train, held_out):
        assert part.images.dtype == torch.float32
        assert part.images.min() == -1 and part.images.max() == 1
        assert (torch.bincount(part.labels, minlength=10) >= 28).all()
    assert torch.cdist(held_out.images.flatten(1), train.images.flatten(1)).min() > 0
    assert one_per_class(held_out, rank=2).labels.tolist() == list(range(10))


def test_asking_for_too_high_a_rank_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rank: expected a value in \[0, "):
        one_per_class(load_split().held_out, rank=1000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_network_shape_dtype_and_size(dtype: torch.dtype) -> None:
    network = Denoiser().to(dtype)
    z = torch.randn(5, 1, SIDE, SIDE)
    out = network(z.bfloat16(), torch.rand(5), torch.tensor([0, 3, 9, NO_LABEL, 1]))
    assert out.shape == z.shape and out.dtype == dtype
    assert sum(p.numel() for p in network.parameters()) <= 750_000


def test_guided_model_answers_without_and_with_labels() -> None:
    network, z, times = load_denoiser(), torch.randn(3, 1, SIDE, SIDE), torch.full((3,), 0.5)
    labels = torch.tensor([1, 2, 3])
    without, with_label = GuidedModel(network)(z, times, labels=labels)
    torch.testing.assert_close(without, network(z, times, torch.full((3,), NO_LABEL)), rtol=0, atol=1e-5)
    torch.testing.assert_close(with_label, network(z, times, labels), rtol=0, atol=1e-5)
    assert (without - with_label).abs().max() > 1e-3


def test_an_epoch_visits_every_image_once_and_the_next_in_another_order() -> None:
    config = TrainingConfig(batch_size=100)
    epochs = [torch.cat([batch_indices(e * 15 + k, 1500, config) for k in range(15)]) for e in range(2)]
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, torch.arange(1500))
    assert not torch.equal(*epochs)


def test_times_are_stratified_and_labels_drop_at_their_rate() -> None:
    config = TrainingConfig(batch_size=1000)
    times = stratified_times(7, config)
    assert times.dtype == torch.float64 and ((times * 1000).ceil() == torch.arange(1, 1001)).all()
    labels = torch.zeros(20_000, dtype=torch.int64)
    dropped = dropped_labels(labels, 7, config) == NO_LABEL
    assert dropped.double().mean().item() == pytest.approx(config.label_drop, abs=0.01)


def test_training_is_a_function_of_seed_and_step() -> None:
    run = Run(DENOISING, TrainingConfig(steps=5, batch_size=10), TINY)
    runs = []
    for seed_elsewhere in (1, 2):
        torch.manual_seed(seed_elsewhere)
        state = start(run)
        losses = [state.advance().total.item() for _ in range(3)]
        runs.append((losses, state.average.state_dict()))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1].values(), runs[1][1].values(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train-denoiser", "train"])
def test_a_killed_run_resumes_to_the_same_bits(command: str, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    checkpoint = killed.with_suffix(".pt")
    with training_process(command, whole) as uninterrupted, training_process(command, killed) as victim:
        wait_for(checkpoint, victim)
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
        assert victim.returncode == -signal.SIGKILL and not killed.exists()
        assert 1 <= saved_step(checkpoint) < 40
        with training_process(command, killed) as resumed:
            assert resumed.wait(timeout=100) == 0, resumed.communicate()
        assert uninterrupted.wait(timeout=100) == 0, uninterrupted.communicate()
    first, second = load_file(whole), load_file(killed)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    run, longer = (Run(DENOISING, TrainingConfig(steps=steps), TINY) for steps in (5, 6))
    start(run).save(tmp_path / "run.pt")
    with pytest.raises(ValueError, match=r"checkpoint: .* was made with config .* expected"):
        resume(tmp_path / "run.pt", longer)


def training_process(name: str, output: Path) -> subprocess.Popen[bytes]:
    options = {"--steps": 40, "--batch-size": 8, "--checkpoint-every": 1, "--output": output}
    options["--checkpoint"] = output.with_suffix(".pt")
    arguments = [str(word) for pair in options.items() for word in pair]
    command = [
        sys.executable,
        "-m",
        "examples.digits",
        name,
        "--channels",
        "8",
        "8",
        *arguments,
    ]
    paths = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 100
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_weights_are_small_and_say_how_they_were_made() -> None:
    assert WEIGHTS.stat().st_size <= 3_000_000
    _, notes = load_weights(WEIGHTS, "train-denoiser")
    assert notes["command"].endswith("digits train-denoiser")
    assert int(notes["steps"]) == json.loads(notes["training"])["steps"]
    assert {"date", "network", "loss_train", "loss_held_out"} <= notes.keys()


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors does not exist"):
        load_denoiser(tmp_path / "none.safetensors")


def test_denoiser_predicts_noise_in_images_it_has_not_seen() -> None:
    loss = evaluate(load_denoiser(), load_split().held_out, repeats=5)
    assert loss < HELD_OUT_LOSS


@pytest.mark.slow
def test_bdia_returns_real_digits_and_ddim_does_not() -> None:
    network, digits = load_denoiser(dtype=torch.float64), one_per_class(load_split().held_out)
    schedule = vp_schedule(50)
    ddim, *bdia = (reconstruct(method, network, digits, schedule, torch.float64) for method in METHODS)
    assert ddim.max_error > 1e-3
    for result in bdia:
        assert result.max_error <= 1e-9 < 1e-3 * ddim.max_error


@pytest.mark.slow
def test_bdia_in_float32_is_far_below_ddim() -> None:
    network, digits = load_denoiser(), one_per_class(load_split().held_out)
    schedule = vp_schedule(50)
    ddim, *bdia = (reconstruct(method, network, digits, schedule, torch.float32) for method in METHODS)
    assert all(result.max_error < 0.01 * ddim.max_error for result in bdia)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_exact_bdia_returns_every_bit_of_real_digits(dtype: torch.dtype) -> None:
    network = load_denoiser(dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    result = reconstruct(INVERTERS[-1], network, one_per_class(load_split().held_out), vp_schedule(20), dtype)
    assert result.method.exact and result.max_error == 0 and result.noise.std() > 0.5


@pytest.mark.slow
def test_samples_are_recognised_as_their_class() -> None:
    labels = torch.arange(10).repeat(4)
    noise = torch.randn(len(labels), 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    model, schedule = GuidedModel(load_denoiser()), vp_schedule(25)
    shared = {"guidance_scale": 1.5, "extra_args": {"labels": labels}}
    for images in (
        ddim_sample(model, noise, schedule, **shared),
        bdia_sample(model, noise, schedule, gamma=0.96, **shared).z,
    ):
        probability = recognised(images, labels)
        assert (probability >= 0.9).mean() > 0.75 and (probability > 0.5).mean() > 0.95


def test_step_timings_are_positive_and_name_their_ops() -> None:
    timings = time_steps((2, 1, SIDE, SIDE), vp_schedule(4), repeats=3)
    assert [t.name for t in timings] == ["DDIM step", "BDIA step", "BDIA inverse step"]
    assert all(t.fused > 0 and t.eager > 0 for t in timings)


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture is drawn with matplotlib, an extra of this package")
    from examples.digits.picture import Panels, save_picture

    digits = one_per_class(load_split().held_out)
    results = [reconstruct(method, load_denoiser(), digits, vp_schedule(3), torch.float32) for method in INVERTERS[::3]]
    samples = [(method.name, digits.images.repeat(3, 1, 1, 1)) for method in METHODS]
    save_picture(Panels(3, digits.images, results, samples), tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
