"""Sharded sampling: the same bits for any world size, after a kill as well, and no mixing of runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bicm_diffusion.distributed import Manifest, Shard, read_samples, sample_shards
from bicm_diffusion.distributed.sampling import shards_of
from tests.sharded_run import COUNT, run

SCRIPT = Path(__file__).with_name("sharded_run.py")
ROOT = SCRIPT.parents[1]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    directory = tmp_path_factory.mktemp("alone")
    run(str(directory), 3)
    return read_samples(directory)


def launch(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The run under torchrun, with two processes that talk by gloo."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python"), *sys.path])
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT), str(directory), "3"]
    return subprocess.run(
        [sys.executable, *command, *arguments],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_two_processes_make_what_one_makes_and_a_killed_run_goes_on(alone: torch.Tensor, tmp_path: Path) -> None:
    killed = launch(tmp_path, "2")
    assert killed.returncode != 0
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert 0 < len(before) < len(shards_of(COUNT, 4))
    with pytest.raises(ValueError, match=f"of {COUNT} has not been written"):
        read_samples(tmp_path)
    finished = launch(tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert torch.equal(read_samples(tmp_path), alone)
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert {name: after[name] for name in before} == before


def test_a_run_is_finished_by_another_world_size(alone: torch.Tensor, tmp_path: Path) -> None:
    made: list[int] = []

    class KilledError(Exception):
        pass

    def dying(shard: Shard) -> torch.Tensor:
        if len(made) == 3:
            raise KilledError
        made.append(shard.first)
        return alone_shard(shard)

    def alone_shard(shard: Shard) -> torch.Tensor:
        return torch.cat([alone, alone])[shard.first : shard.first + shard.batch]

    settings = {"seed": 7, "steps": 3}
    with pytest.raises(KilledError):
        sample_shards(dying, COUNT, tmp_path, batch=4, settings=settings, progress=False)
    run(str(tmp_path), 3)
    assert made == [0, 4, 8] and torch.equal(read_samples(tmp_path), alone)


@pytest.mark.parametrize(
    ("count", "batch", "steps", "told"),
    [(22, 4, 5, "settings="), (23, 4, 3, "count=23 where the run began with 22"), (22, 2, 3, "batch=2")],
)
def test_other_settings_are_refused(tmp_path: Path, count: int, batch: int, steps: int, told: str) -> None:
    Manifest(22, 4, {"steps": 3}).claim(tmp_path)
    with pytest.raises(ValueError, match=told):
        sample_shards(lambda shard: torch.ones(1), count, tmp_path, batch=batch, settings={"steps": steps})
    assert not list(tmp_path.glob("*.safetensors"))


def test_the_last_batch_is_padded_and_cut() -> None:
    shards = shards_of(10, 4)
    assert [(s.first, s.batch, s.kept) for s in shards] == [(0, 4, 4), (4, 4, 4), (8, 4, 2)]
    assert shards[2].sample_ids.tolist() == [8, 9, 10, 11]


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="count, batch: expected integers of at least 1"):
        sample_shards(lambda shard: torch.ones(1), 0, tmp_path, batch=1, settings={})
    with pytest.raises(ValueError, match="sample: expected 2 samples, got 3"):
        sample_shards(lambda shard: torch.ones(3), 2, tmp_path, batch=2, settings={}, progress=False)


def test_progress_counts_every_process_s_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample_shards(lambda shard: torch.ones(shard.batch), 6, tmp_path, batch=2, settings={})
    assert "6/6" in capsys.readouterr().err
