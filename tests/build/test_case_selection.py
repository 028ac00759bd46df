"""``pytest --cases``, by which `make test-fast` and `make test CASES=` choose, and ``--share`` of `make gpu-check`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CASES = """
import pytest

@pytest.mark.parametrize("i", range(9))
def test_many(i): ...

@pytest.mark.parametrize("i", range(2))
def test_two(i): ...

def test_one(): ...

@pytest.mark.slow
@pytest.mark.parametrize("i", range(4))
def test_slow(i): ...

"""


def collected(folder: Path, *options: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *options]
    listing = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    return [line.partition("::")[2] for line in listing.splitlines() if "::" in line]


@pytest.mark.slow
def test_so_many_cases_of_every_test(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text((Path(__file__).parents[1] / "conftest.py").read_text())
    (tmp_path / "test_cases.py").write_text(CASES)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    assert len(collected(tmp_path)) == len(collected(tmp_path, "--cases", "0")) == 9 + 2 + 1 + 4
    few = collected(tmp_path, "--cases", "3")
    often = ["test_many[0]", "test_many[4]", "test_many[8]", "test_two[0]", "test_two[1]", "test_one"]
    assert few == [*often, "test_slow[0]"]
    assert collected(tmp_path, "--cases", "6")[-2:] == ["test_slow[0]", "test_slow[3]"]
    shares = [collected(tmp_path, "--share", f"{k}/5") for k in range(5)]
    assert sorted(name for share in shares for name in share) == sorted(collected(tmp_path))
    assert {len(share) for share in shares} == {3, 4}
