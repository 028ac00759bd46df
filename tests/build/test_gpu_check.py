"""`make gpu-check` where there is no GPU: what its steps say, find and start."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check

NO_TESTS_COLLECTED = 5


def test_gpu_check_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every step says in a sentence why it is not run, and the others run all the same."""
    monkeypatch.setattr(gpu_check, "question", lambda *_: "torch 2.11.0 sees none")
    assert gpu_check.main(["figures", "--out", str(tmp_path)]) == 1
    steps = {"steps": lambda _: {"tests": 3}, "tests": gpu_check.triton_tests}
    steps["tool"] = lambda machine: gpu_check.tool(machine, "no-such")
    steps["fault"] = lambda machine: machine.run("fault", [sys.executable, "-c", "raise SystemExit('a reason')"], 20)
    monkeypatch.setitem(gpu_check.PARTS, "triton", steps)
    assert gpu_check.main(["triton", "--out", str(tmp_path)]) == 1
    parts = json.loads((tmp_path / "results.json").read_text())["parts"]
    found = {step["name"]: (step["status"], step["why"]) for steps in parts.values() for step in steps}
    needs_card = ("not run", "needs a GPU: torch 2.11.0 sees none")
    assert found["figures"] == found["hardware counters"] == found["tests"] == needs_card
    assert found["tool"] == ("not run", "needs no-such, which is not on the PATH")
    assert found["steps"] == ("passed", "")
    assert found["fault"][0] == "failed"
    assert "its status was 1" in found["fault"][1]
    assert "a reason" in found["fault"][1]
    table = (tmp_path / "results.md").read_text().splitlines()
    order = ["fault", "figures", "hardware counters", "steps", "tests", "tool"]
    assert [line.split(" | ")[1] for line in table[2:]] == order


def test_gpu_check_stops_what_takes_too_long(tmp_path: Path) -> None:
    machine = gpu_check.Machine(tmp_path, time.time() + 60, "", dict(os.environ))
    with pytest.raises(RuntimeError, match="it was stopped after 1 s"):
        machine.run("slow", [sys.executable, "-c", "import time; time.sleep(60)"], 1)


def test_gpu_check_counts_by_reports(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text('<testsuites><testsuite tests="9" failures="1" errors="2" skipped="3"/></testsuites>')
    assert gpu_check.counted([report, tmp_path / "none.xml"]) == {"passed": 3, "failed": 3, "skipped": 3}


@pytest.mark.slow
def test_gpu_check_collects_its_tests_in_a_fresh_clone() -> None:
    """Without the emulator's module, which `make gpu-check` does not build, and without any plug-in."""
    command = gpu_check.pytest_command("0/1", "not triton", os.devnull)
    command += ["--collect-only", "-o", "pythonpath=. python"]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=gpu_check.ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == (0 if torch.cuda.is_available() else NO_TESTS_COLLECTED), done.stdout
    files = (gpu_check.ROOT / "tests").rglob("*.py")
    marked = [path for path in files if re.search(r"pytest\.mark\.gpu\b", path.read_text())]
    assert marked
    assert all(path.parent == gpu_check.ROOT / gpu_check.TESTS for path in marked)


def sources() -> list[str]:
    """The CUDA kernels' sources."""
    return [path.read_text() for path in (gpu_check.ROOT / "csrc" / "cuda").iterdir()]


def profiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, printed: str) -> tuple[re.Pattern[str], dict[str, str]]:
    """The kernels' names that the profiler is asked for, and what is found where it prints a text."""
    commands: list[list[str]] = []

    class Machine(gpu_check.Machine):
        def run(self, log: str, command: Iterable[str], most: float, **variables: str) -> None:
            commands.append([*command])
            (self.out / f"{log}.log").write_text(printed)

    monkeypatch.setattr(gpu_check, "tool", lambda machine, name: name)
    found = gpu_check.counters(Machine(tmp_path, time.time() + 60, "", {}))
    (command,) = commands
    kind, _, pattern = command[command.index("--kernel-name") + 1].partition(":")
    assert kind == "regex"
    return re.compile(pattern), found


def test_gpu_check_counts_every_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kernels = [name for text in sources() for name in re.findall(r"(\w+)\(const __grid_constant__", text)]
    assert len(kernels) == len(set(kernels)) == sum(text.count("__global__") for text in sources())
    printed = "\n".join(f'"0","{name}","(148, 1, 1)"' for name in kernels if name != "scale_kernel")
    pattern, found = profiled(monkeypatch, tmp_path, printed)
    assert [name for name in kernels if not pattern.search(name)] == []
    assert not pattern.search("vectorized_elementwise_kernel")
    assert found["not counted"] == "scale_kernel"


def test_gpu_check_keeps_the_tables_of_figures_that_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And not those of an earlier run."""
    path = tmp_path / "figures.json"
    path.write_text('{"loops": [{"loop": "of yesterday"}]}')

    def run(machine: gpu_check.Machine, log: str, command: Iterable[str], most: float, **variables: str) -> None:
        assert not path.exists()
        path.write_text('{"bounds": [{"MB": 4.0}]}')
        raise RuntimeError("its status was 1")

    monkeypatch.setattr(gpu_check.Machine, "run", run)
    machine = gpu_check.Machine(tmp_path, time.time() + 60, "", {})
    (step,) = gpu_check.run_steps({"figures": gpu_check.figures}, machine)
    assert (step.status, step.why) == ("failed", "its status was 1")
    assert step.found == {"bounds": [{"MB": 4.0}]}


def test_gpu_check_has_a_step_on_one_line() -> None:
    step = {"name": "figures", "status": "passed", "seconds": 1.0, "why": "", "found": {"backend": "cpu\ncuda"}}
    assert gpu_check.table({"figures": [step]}).splitlines()[2:] == [
        "| figures | figures | passed | 1.0 | backend: cpu; cuda |"
    ]
