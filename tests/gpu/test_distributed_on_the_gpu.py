"""Sharded sampling on GPUs: nccl where a process has a GPU of its own, gloo where two share one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from bicm_diffusion.distributed import read_samples
from tests.support.sharded_run import run

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("group", "processes"), [("nccl", torch.cuda.device_count()), ("gloo", 2)])
def test_any_group_makes_what_one_process_makes_and_goes_on_after_a_kill(
    group: str, processes: int, tmp_path: Path
) -> None:
    run(str(tmp_path / "alone"), 3, device="cuda")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(ROOT / "tests" / "support" / "sharded_run.py"), str(tmp_path / "shards"), "3", "safetensors"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python"), *sys.path]),
        "OMP_NUM_THREADS": "1",
        "SHARDED_BY": group,
        "SHARDED_ON": "cuda",
    }
    killed = subprocess.run([*command, "2"], env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert killed.returncode != 0
    assert 0 < len(list((tmp_path / "shards").glob("samples-*.safetensors"))) < 6
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert finished.returncode == 0, finished.stderr
    assert torch.equal(read_samples(tmp_path / "shards"), read_samples(tmp_path / "alone"))
