"""The programs in examples/ run, and show what they say; every code block of the guides runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
GUIDES = ["training.md", "reproducibility.md", "inverse.md", "guides.md"]


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


def test_huber_lora_trains_the_adapter() -> None:
    for package in ("diffusers", "peft"):
        pytest.importorskip(package, reason="needs the extra [dev]")
    found = losses(program("huber_lora.py", "--steps", "6"))
    assert len(found) == 6 and found[4] < found[0]  # the same four images


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


@pytest.mark.parametrize("name", GUIDES)
def test_code_blocks_run(name: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / name).read_text(), re.DOTALL)
    assert blocks
    torch.manual_seed(0)
    exec(compile("\n".join(blocks), name, "exec"), {})
