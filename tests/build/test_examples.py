"""The programs in examples/ run, and show what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def program(name: str, *arguments: str, processes: int = 1) -> str:
    """What a program of examples/ prints."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launcher, str(ROOT / "examples" / name), *arguments]
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def losses(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"loss (\S+)", text)]


@pytest.mark.slow
def test_consistency_training_resumes_with_the_same_losses_and_does_not_depend_on_processes(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="needs the extra [diffusion]")
    size = ("--images", "128", "--batch", "64")
    whole = program("consistency_training.py", "--epochs", "2", *size)
    checkpoint = ("--checkpoint", str(tmp_path / "state.pt"))
    first = program("consistency_training.py", "--epochs", "1", *checkpoint, *size)
    rest = program("consistency_training.py", "--epochs", "2", *checkpoint, *size)
    assert whole == first + rest
    together = program("consistency_training.py", "--epochs", "2", *size, processes=2)
    assert len(losses(whole)) == 2 and losses(together) == pytest.approx(losses(whole), rel=2e-2)


@pytest.mark.slow
def test_huber_lora_trains_the_adapter() -> None:
    for package in ("diffusers", "peft"):
        pytest.importorskip(package, reason="needs the extra [dev]")
    found = losses(program("huber_lora.py", "--steps", "6"))
    assert len(found) == 6 and found[4] < found[0]  # the same four images


SMALL = ("--steps", "2", "--batch-size", "4", "--width", "4", "--s1", "20")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six images, one of another size."""
    for package in ("diffusers", "safetensors", "PIL"):
        pytest.importorskip(package, reason="needs the extra [dev]")
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    (folder / "deeper").mkdir()
    for k in range(6):
        pixels = torch.randint(0, 256, (40 if k == 3 else 32, 32, 3), generator=torch.Generator().manual_seed(k))
        Image.fromarray(pixels.byte().numpy()).save(folder / ("deeper" if k % 2 else "") / f"{k}.png")
    return folder


def cifar10(objective: str, images: Path, output: Path, *words: str) -> None:
    """Run the program in this process: importing diffusers takes seconds."""
    from examples.cifar10 import main

    with torch.random.fork_rng(devices=[]):
        main(["--objective", objective, "--data", str(images), "--output", str(output), *SMALL, *words])
    assert (output / "samples.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def denoiser(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a denoiser that was trained for two steps."""
    output = tmp_path_factory.mktemp("denoiser")
    cifar10("denoising", images, output)
    return output / "checkpoint.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["ict", "cd", "bct", "gc", "batch-ot", "ect"])
def test_cifar10_trains_with_every_objective(
    objective: str, images: Path, denoiser: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ("--start", str(denoiser)) if objective in ("cd", "ect") else ()
    words = ("--generate", "--mu", "0.7", "--micro-batch", "2", "--bfloat16", *start)
    cifar10(objective, images, tmp_path, *words)
    first = capsys.readouterr().out
    assert re.search(r"samples.png: 2 steps, standard deviation \d", first)
    (tmp_path / "samples.png").unlink()
    cifar10(objective, images, tmp_path, *words)  # from the finished checkpoint
    assert capsys.readouterr().out == first


@pytest.mark.slow
def test_an_edit_with_the_same_prompt_returns_the_latents() -> None:
    for package in ("diffusers", "transformers"):
        pytest.importorskip(package, reason="needs the extra [dev]")
    text = program("edit_in_pipeline.py")
    found = re.search(r"by (\S+), another prompt by (\S+)", text)
    assert found is not None and float(found[1]) == 0.0 and float(found[2]) > 0.1


def test_own_samplers_converge_and_invert() -> None:
    text = program("own_sampler.py")
    assert "inverted to the bit: True" in text
    assert all(float(error) < 0.05 for error in re.findall(r"error (\S+)", text.replace(";", "")))
