"""What a directory of shards may hold: no shard without its manifest, none that is cut short, none of another run."""

from __future__ import annotations

import enum
import json
import os
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch

from bicm_diffusion.distributed import Manifest, Shard, read_samples, sample_shards

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "support" / "sharded_run.py"
COUNT, BATCH = 6, 2
EXPECTED = torch.arange(COUNT * 3 * 5 * 4).reshape(COUNT, 3, 5, 4).to(torch.uint8)
FORMATS = ("safetensors", "png")
either_format = pytest.mark.parametrize("save_as", FORMATS)


def sample(shard: Shard) -> torch.Tensor:
    return torch.cat([EXPECTED, EXPECTED])[shard.first : shard.first + shard.batch]


def make(directory: Path, save_as: str, source: Callable[[Shard], torch.Tensor] = sample, **changes: Any) -> None:
    asked: dict[str, Any] = {"count": COUNT, "batch": BATCH, "settings": {"seed": 0}, "save_as": save_as}
    sample_shards(source, directory=directory, progress=False, **(asked | changes))


def shard(directory: Path, first: int, save_as: str, stop: int | None = None) -> Path:
    stop = first + BATCH if stop is None else stop
    return directory / f"samples-{first:08d}-{stop:08d}{'.safetensors' if save_as == 'safetensors' else ''}"


def contents(directory: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@either_format
@pytest.mark.parametrize("settings", [{"seed": 1}, {"seed": 0}], ids=["other settings", "the same settings"])
def test_shards_without_a_manifest_are_refused(tmp_path: Path, save_as: str, settings: dict[str, int]) -> None:
    make(tmp_path, save_as)
    (tmp_path / "manifest.json").unlink()
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"3 shards \(samples-00000000-00000002.*move them away") as refused:
        make(tmp_path, save_as, settings=settings)
    assert str(tmp_path) in str(refused.value) and "manifest.json" in str(refused.value)
    assert contents(tmp_path) == before
    with pytest.raises(FileNotFoundError, match=r"manifest\.json does not exist"):
        read_samples(tmp_path)


@pytest.mark.parametrize("save_as", FORMATS[::-1])
def test_shards_of_the_other_format_need_their_manifest_too(tmp_path: Path, save_as: str) -> None:
    make(tmp_path, "safetensors")
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match="got none"):
        make(tmp_path, save_as)


def test_other_files_need_no_manifest(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("samples-00000000-00000002.safetensors")
    (tmp_path / "samples-00000000-00000002.7.partial").mkdir()
    (tmp_path / "manifest.7.partial").write_text("{")
    make(tmp_path, "safetensors")
    assert torch.equal(read_samples(tmp_path), EXPECTED)
    assert not list(tmp_path.glob("*.partial"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def remove(path: Path) -> None:
    path.unlink()


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = {
    "safetensors": {
        "cut": cut,
        "empty": empty,
        "zero": zero,
        "a folder": replace_by_folder,
        "longer": lambda path: path.write_bytes(path.read_bytes() + b"0"),
        "fewer samples": lambda path: _one_sample_less(path),
        "another tensor": lambda path: path.write_bytes(path.read_bytes().replace(b'"samples"', b'"simples"')),
    },
    "png": {
        "cut": lambda p: cut(p / "00000003.png"),
        "empty": lambda p: empty(p / "00000003.png"),
        "zero": lambda p: zero(p / "00000003.png"),
        "one file less": lambda p: remove(p / "00000002.png"),
        "no file left": lambda p: (shutil.rmtree(p), p.mkdir()),
        "a file": lambda p: (shutil.rmtree(p), p.write_bytes(b"")),
        "another name": lambda p: (p / "00000003.png").rename(p / "00000009.png"),
    },
}


def _one_sample_less(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file({"samples": load_file(path)["samples"][:1].clone()}, path)


@pytest.mark.parametrize(("save_as", "damage"), [(s, d) for s in FORMATS for d in DAMAGES[s]])
def test_what_is_cut_short_is_named_and_made_again(tmp_path: Path, save_as: str, damage: str) -> None:
    make(tmp_path, save_as)
    before = contents(tmp_path)
    broken = shard(tmp_path, 2, save_as)
    DAMAGES[save_as][damage](broken)
    with pytest.raises(ValueError, match=f"{broken.name}.* cannot be read"):
        read_samples(tmp_path)
    made: list[int] = []

    def noted(shard: Shard) -> torch.Tensor:
        made.append(shard.first)
        return sample(shard)

    with pytest.warns(UserWarning, match=f"{broken.name}.* is made again"):
        make(tmp_path, save_as, noted)
    assert made == [2]
    assert torch.equal(read_samples(tmp_path), EXPECTED)
    after = contents(tmp_path)
    assert after.keys() == before.keys()
    assert {name: after[name] for name in after if broken.name not in name} == {
        name: before[name] for name in before if broken.name not in name
    }


@either_format
def test_a_kill_after_a_broken_shard_was_found_leaves_it_missing(tmp_path: Path, save_as: str) -> None:
    make(tmp_path, save_as)
    broken = shard(tmp_path, 2, save_as)
    cut(broken if broken.is_file() else broken / "00000003.png")

    def killed(shard: Shard) -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="made again"), pytest.raises(KeyboardInterrupt):
        make(tmp_path, save_as, killed)
    with pytest.raises(ValueError, match="sample 2 of 6 has not been written"):
        read_samples(tmp_path)
    make(tmp_path, save_as)
    assert torch.equal(read_samples(tmp_path), EXPECTED)


def test_an_image_that_is_broken_inside_is_named(tmp_path: Path) -> None:
    make(tmp_path, "png")
    image = shard(tmp_path, 2, "png") / "00000003.png"
    content = image.read_bytes()
    start = content.index(b"IDAT") + 4
    image.write_bytes(content[:start] + bytes(8) + content[start + 8 :])
    with pytest.raises(
        ValueError, match=r"samples-00000002-00000004 cannot be read: 00000003\.png: .*remove it and run"
    ):
        read_samples(tmp_path)


@pytest.mark.parametrize(("save_as", "changed"), [("safetensors", EXPECTED[2:4].float()), ("png", EXPECTED[2:4, :1])])
def test_shards_of_other_samples_are_named(tmp_path: Path, save_as: str, changed: torch.Tensor) -> None:
    make(tmp_path, save_as, lambda shard: changed if shard.first == 2 else sample(shard))
    with pytest.raises(ValueError, match=r"samples-00000002-00000004.*: expected samples torch.uint8 \(3, 5, 4\)"):
        read_samples(tmp_path)


@either_format
@pytest.mark.parametrize("stray", [(0, 1), (1, 3), (2, 6), (0, 6), (4, 8), (6, 8)])
def test_a_stray_shard_hides_nothing(tmp_path: Path, save_as: str, stray: tuple[int, int]) -> None:
    """Of an overlapping range, and of one beyond the end."""
    make(tmp_path, save_as)
    foreign, first = shard(tmp_path, *stray[:1], save_as, stray[1]), shard(tmp_path, 0, save_as)
    shutil.copytree(first, foreign) if first.is_dir() else shutil.copy(first, foreign)
    assert torch.equal(read_samples(tmp_path), EXPECTED)
    last = shard(tmp_path, 4, save_as)
    shutil.rmtree(last) if last.is_dir() else last.unlink()
    with pytest.raises(ValueError, match="sample 4 of 6 has not been written"):
        read_samples(tmp_path)
    with pytest.warns(UserWarning, match=f"{foreign.name}.*they are not changed"):
        make(tmp_path, save_as)
    assert torch.equal(read_samples(tmp_path), EXPECTED) and foreign.exists()


@either_format
def test_a_shard_of_the_other_format_is_not_this_run_s(tmp_path: Path, save_as: str) -> None:
    other = FORMATS[1 - FORMATS.index(save_as)]
    make(tmp_path / "other", other)
    tmp_path.joinpath("run").mkdir()
    Manifest(COUNT, BATCH, {"seed": 0}, save_as).claim(tmp_path / "run")
    shutil.move(shard(tmp_path / "other", 2, other), tmp_path / "run")
    with pytest.warns(UserWarning, match="they are not changed"):
        make(tmp_path / "run", save_as)
    assert torch.equal(read_samples(tmp_path / "run"), EXPECTED)


@pytest.mark.parametrize("number", [np.int64, np.uint8, np.array, torch.tensor])
def test_counts_are_any_integers(tmp_path: Path, number: Callable[[int], Any]) -> None:
    make(tmp_path, "safetensors", count=number(COUNT), batch=number(BATCH))
    make(tmp_path, "safetensors")  # the same run
    assert torch.equal(read_samples(tmp_path), EXPECTED)


@pytest.mark.parametrize("value", [6.0, np.float64(6), "6", None, True, [6]])
def test_what_is_no_count_is_refused(tmp_path: Path, value: Any) -> None:
    for asked in ({"count": value}, {"batch": value}):
        with pytest.raises(TypeError, match="count, batch: expected integers of at least 1, got"):
            make(tmp_path, "safetensors", **asked)
    assert not list(tmp_path.iterdir())


class Kind(str, enum.Enum):
    HEUN = "heun"


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ((1, (2.5, None)), [1, [2.5, None]]),
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (torch.tensor([0.25, 4.0]), [0.25, 4.0]),
        (torch.tensor(7), 7),
        (PurePosixPath("/weights/a.pt"), "/weights/a.pt"),
        (torch.bfloat16, "torch.bfloat16"),
        (torch.device("cpu"), "cpu"),
        (Kind.HEUN, "heun"),
        ({"a": {np.int64(1): (np.float64(2.0),)}}, {"a": {"1": [2.0]}}),
        (float("inf"), float("inf")),
    ],
    ids=str,
)
def test_settings_are_stored_as_plain_values(tmp_path: Path, given: Any, plain: Any) -> None:
    make(tmp_path, "safetensors", settings={"x": given})
    assert json.loads((tmp_path / "manifest.json").read_text())["settings"] == {"x": plain}
    make(tmp_path, "safetensors", settings={"x": given})
    make(tmp_path, "safetensors", settings={"x": plain})


def test_a_run_with_nan_among_its_settings_goes_on(tmp_path: Path) -> None:
    for _ in range(2):
        make(tmp_path, "safetensors", settings={"x": float("nan"), "y": [float("nan")]})


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"x": [0, object()]}, r"settings\['x'\]\[1\]: expected .* got object"),
        ({"x": {"y": {1, 2}}}, r"settings\['x'\]\['y'\]: expected .* got set"),
        ({"x": 1j}, r"settings\['x'\]: .* got complex"),
        ({"x": b"a"}, r"settings\['x'\]: .* got bytes"),
        ({(1, 2): 0}, r"settings: expected names of type str, got \(1, 2\)"),
        ({"x": {None: 0}}, r"settings\['x'\]: expected names of type str, got None"),
        ({"x": {1: 0, "1": 1}}, r"settings\['x'\]: expected names that differ as text, got '1' twice"),
        (["seed"], "settings: expected a mapping, got list"),
        (None, "settings: expected a mapping, got NoneType"),
    ],
)
def test_settings_that_cannot_be_stored_are_named(tmp_path: Path, settings: Any, told: str) -> None:
    with pytest.raises((TypeError, ValueError), match=told):
        make(tmp_path, "safetensors", settings=settings)
    assert not list(tmp_path.iterdir())


def test_only_settings_that_differ_are_told(tmp_path: Path) -> None:
    make(tmp_path, "safetensors", settings={"seed": 0, "steps": 50, "old": 1})
    with pytest.raises(ValueError, match="belongs to another run") as refused:
        make(tmp_path, "safetensors", settings={"seed": 0, "steps": 25, "new": 2})
    told = "settings={'steps': 25, 'new': 2} where the run began with {'steps': 50, 'old': 1}"
    assert told in str(refused.value)


WHOLE: dict[str, Any] = {"count": COUNT, "batch": BATCH, "settings": {}, "save_as": "safetensors", "version": 1}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is no whole manifest"),
        (json.dumps(WHOLE)[:-10], "is no whole manifest"),
        ("\0" * 40, "is no whole manifest"),
        ("[1, 2]", "is no whole manifest"),
        ("null", "is no whole manifest"),
        (json.dumps({name: WHOLE[name] for name in WHOLE if name != "batch"}), "is no whole manifest .*batch"),
        (json.dumps({name: WHOLE[name] for name in WHOLE if name != "version"}), "is no whole manifest .*version"),
        (json.dumps(WHOLE | {"count": "six"}), "is no whole manifest .*count"),
        (json.dumps(WHOLE | {"batch": 0}), "is no whole manifest .*batch"),
        (json.dumps(WHOLE | {"save_as": "jpeg"}), "is no whole manifest .*save_as"),
        (json.dumps(WHOLE | {"version": 2}), "expected version 1, got 2"),
        (json.dumps(WHOLE | {"version": 2, "shards": []}), "expected version 1, got 2"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_named(tmp_path: Path, text: str, told: str) -> None:
    make(tmp_path, "safetensors")
    (tmp_path / "manifest.json").write_text(text)
    before = contents(tmp_path)
    for use in (lambda: make(tmp_path, "safetensors"), lambda: read_samples(tmp_path)):
        with pytest.raises(ValueError, match=rf"manifest\.json:? {told}.*: restore it, or remove it"):
            use()
    assert contents(tmp_path) == before


def test_a_manifest_of_binary_rubbish_is_named(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ValueError, match="is no whole manifest"):
        read_samples(tmp_path)


def two_ranks(directory: Path, rank_1: Mapping[str, Any] | None = None, save_as: str = "safetensors") -> list[str]:
    """Run two processes without a launcher, which would end the second when the first fails; return their errors."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python"), *sys.path])
    common = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(port), "SHARDED_RANK_1": json.dumps(rank_1 or {})}
    command = [sys.executable, str(SCRIPT), str(directory), "3", save_as]
    running = [
        subprocess.Popen(command, env={**os.environ, **common, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    return [process.communicate(timeout=100)[1] for process in running]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank_1", "told"),
    [
        ({"count": 23}, "rank 1: count=23 where rank 0 has 22"),
        ({"settings": {"seed": 8, "steps": 3}}, "rank 1: settings={'seed': 8} where rank 0 has {'seed': 7}"),
        ({"batch": 0}, "rank 1: count, batch: expected integers of at least 1, got 22 and 0"),
    ],
)
def test_ranks_that_differ_are_refused_on_every_rank(tmp_path: Path, rank_1: Mapping[str, Any], told: str) -> None:
    for error in two_ranks(tmp_path / "run", rank_1):
        assert f"ValueError: {told}" in error or f"samples; {told}" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_rank_0_cannot_write_is_told_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for error in two_ranks(tmp_path / "file"):
        assert "NotADirectoryError" in error


def test_no_warning_where_nothing_is_amiss(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            make(tmp_path, "png")
