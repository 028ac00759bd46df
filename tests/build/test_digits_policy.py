"""The digits tuned for rewards: the first ratio is 1, and the command writes what it says and goes on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

for package in ("sklearn", "safetensors", "matplotlib"):
    pytest.importorskip(package, reason="an extra of this package")

from click.testing import CliRunner

from examples.digits.__main__ import main
from examples.digits.data import load_split
from examples.digits.policy import SEVEN, Setting, sevens, thickness, tune

SMALL = Setting(updates=3, batch=6, steps=3, flow_steps=4)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small layers gain nothing from a second thread; on a busy machine the two wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_rewards_say_what_they_are_named_for() -> None:
    images, labels = load_split().held_out
    found = sevens(images)
    assert found[labels == SEVEN].mean() > 0.8 and found[labels != SEVEN].mean() < 0.05
    assert thickness(torch.ones(1, 1, 8, 8)) == 1 and thickness(-torch.ones(1, 1, 8, 8)) == 0


@pytest.mark.parametrize("method", ["DDPO", "Flow-GRPO"])
def test_the_first_ratio_is_exactly_one_and_runs_repeat(method: str) -> None:
    first, again = (tune(method, "thickness", 1, SMALL) for _ in range(2))
    assert first.ratio_is_one and first.rewards == again.rewards and first.after == again.after
    assert len(first.rewards) == 3 and first.before != first.after


def test_the_command_writes_a_table_and_a_picture_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Every run takes 0.52 s: 1 s in the table unless rounded to 0.5 first, as the files are.
    clock = itertools.count()
    monkeypatch.setattr("examples.digits.policy.time", SimpleNamespace(perf_counter=lambda: 0.52 * next(clock)))
    words = ["policy", "--output", str(tmp_path), "--seeds", "1", "--updates", "2", "--batch", "4", "--steps", "2"]
    words += ["--flow-steps", "4"]
    first = CliRunner().invoke(main, words, catch_exceptions=False)
    assert first.exit_code == 0 and first.stdout.count("exactly 1") == 4
    assert (tmp_path / "policy.png").read_bytes().startswith(b"\x89PNG")
    runs = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*.json")}
    assert len(runs) == 4
    again = CliRunner().invoke(main, words, catch_exceptions=False)
    assert again.stdout == first.stdout and {path: path.stat().st_mtime_ns for path in runs} == runs
