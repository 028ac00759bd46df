"""Sharded sampling: the same bits for any world size, after a kill as well, and no mixing of runs."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from bicm_diffusion.distributed import Manifest, Shard, read_samples, sample_shards
from bicm_diffusion.distributed.formats import to_pixels
from bicm_diffusion.distributed.shards import shards_of
from tests.support.sharded_run import COUNT, run

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "support" / "sharded_run.py"


LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    # Its launcher of several processes is called after GPUs, and needs none.
    "accelerate": [
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
    ],
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    directory = tmp_path_factory.mktemp("alone")
    run(str(directory), 3)
    return read_samples(directory)


def launch(launcher: str, directory: Path, *arguments: str, group: str = "gloo") -> subprocess.CompletedProcess[str]:
    """The run with two processes."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python"), *sys.path])
    return subprocess.run(
        [sys.executable, *LAUNCHERS[launcher], str(SCRIPT), str(directory), "3", *arguments],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "SHARDED_BY": group},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def written_at(directory: Path) -> dict[str, int]:
    """When each shard was written; what a killed process had begun is none."""
    shards = (path for path in directory.glob("samples-*") if path.suffix != ".partial")
    return {path.name: path.stat().st_mtime_ns for path in shards}


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "save_as"), [("torchrun", "safetensors"), ("accelerate", "png")])
def test_two_processes_make_what_one_makes_and_a_killed_run_goes_on(
    alone: torch.Tensor, launcher: str, save_as: str, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate" if launcher == "accelerate" else "torch")
    killed = launch(launcher, tmp_path, save_as, "2")
    assert killed.returncode != 0
    before = written_at(tmp_path)
    assert 0 < len(before) < len(shards_of(COUNT, 4))
    with pytest.raises(ValueError, match=f"of {COUNT} has not been written"):
        read_samples(tmp_path)
    finished = launch(launcher, tmp_path, save_as)
    assert finished.returncode == 0, finished.stderr
    expected = alone if save_as == "safetensors" else to_pixels(alone.reshape(COUNT, 3, 2, 2))
    assert torch.equal(read_samples(tmp_path), expected)
    after = written_at(tmp_path)
    assert {name: after[name] for name in before} == before


@pytest.mark.slow
def test_what_is_said_does_not_need_the_group_s_own_backend(alone: torch.Tensor, tmp_path: Path) -> None:
    """One like nccl, which carries nothing between hosts; this one carries nothing at all."""
    finished = launch("torchrun", tmp_path, "safetensors", group="fake")
    assert finished.returncode == 0, finished.stderr
    assert torch.equal(read_samples(tmp_path), alone)


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
    with pytest.raises(ValueError, match="save_as='png' where the run began with 'safetensors'"):
        sample_shards(lambda shard: torch.ones(1), 22, tmp_path, batch=4, settings={"steps": 3}, save_as="png")
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
    with pytest.raises(ValueError, match="save_as: expected one of 'safetensors', 'png', got 'jpeg'"):
        sample_shards(lambda shard: torch.ones(1), 1, tmp_path, batch=1, settings={}, save_as="jpeg")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sample: expected 2 samples, got 3"):
        sample_shards(lambda shard: torch.ones(3), 2, tmp_path, batch=2, settings={}, progress=False)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_are_one_file_a_sample(tmp_path: Path, channels: int) -> None:
    pixels = torch.randint(0, 256, (5, channels, 6, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    padded = torch.cat([pixels, pixels])
    signed = {torch.uint8: padded, torch.float32: padded.float() / 127.5 - 1.0, torch.float64: padded / 127.5 - 1.0}
    for dtype, samples in signed.items():
        directory = tmp_path / str(dtype)

        def sample(shard: Shard, samples: torch.Tensor = samples) -> torch.Tensor:
            return samples[shard.first : shard.first + shard.batch]

        sample_shards(sample, 5, directory, batch=2, settings={}, save_as="png", progress=False)
        assert torch.equal(read_samples(directory), pixels)
        files = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*.png"))
        folders = ["00000000-00000002", "00000000-00000002", "00000002-00000004", "00000002-00000004"]
        folders.append("00000004-00000005")
        assert files == [f"samples-{folder}/{k:08d}.png" for k, folder in enumerate(folders)]
        with Image.open(directory / files[4]) as image:
            assert image.size == (7, 6) and image.mode == {1: "L", 3: "RGB", 4: "RGBA"}[channels]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_levels_are_those_of_the_same_numbers_in_float64(dtype: torch.dtype) -> None:
    samples = torch.linspace(-1.1, 1.1, 30_000).to(dtype).reshape(1, 3, 100, 100)
    levels = (samples.double().clamp(-1, 1) + 1) * 127.5
    assert torch.equal(to_pixels(samples), levels.round().to(torch.uint8))


def test_half_a_folder_is_no_shard(tmp_path: Path) -> None:
    """What a process that was killed had begun is not read, and is gone after the next run."""
    images = torch.zeros(2, 3, 4, 4)
    sample_shards(lambda shard: images, 2, tmp_path, batch=2, settings={}, save_as="png", progress=False)
    whole = tmp_path / "samples-00000000-00000002"
    whole.rename(tmp_path / "samples-00000000-00000002.7.partial")
    (tmp_path / "samples-00000000-00000002.8.partial").write_text("half a file")
    with pytest.raises(ValueError, match="sample 0 of 2 has not been written"):
        read_samples(tmp_path)
    sample_shards(lambda shard: images, 2, tmp_path, batch=2, settings={}, save_as="png", progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.json", whole.name}


@pytest.mark.parametrize(
    ("samples", "told"),
    [
        (torch.zeros(2, 2, 4, 4), r"images are \(batch, 1, 3 or 4, height, width\), got \(2, 2, 4, 4\)"),
        (torch.zeros(2, 12), r"got \(2, 12\)"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.int32), "uint8 or floats"),
        (torch.full((2, 3, 4, 4), math.nan), "must be finite"),
    ],
)
def test_what_is_no_image_is_named(tmp_path: Path, samples: torch.Tensor, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        sample_shards(lambda shard: samples, 2, tmp_path, batch=2, settings={}, save_as="png", progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.json"}


def test_progress_counts_every_process_s_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample_shards(lambda shard: torch.ones(shard.batch), 6, tmp_path, batch=2, settings={})
    assert "6/6" in capsys.readouterr().err
