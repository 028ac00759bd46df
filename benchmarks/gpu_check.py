"""``python -m benchmarks.gpu_check``: what needs a GPU, in three parts of less than ten minutes that start one by one.

It takes the interpreter that runs it, with its own torch, and needs pytest beside it; no other package, no network.
Every part writes its steps to one JSON and one table in the output folder. The exit status is 0 only where every step
of the parts ran and passed: a step that needs a card, a compiler or a tool that is not there is not run, and says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
#: Where the tests that need a GPU are. Others may ask for what a GPU's machine does not have.
TESTS = "tests/gpu"
OUT = "build/gpu-check"
#: Seconds that a part may take, all its steps together.
LIMIT = 590.0
#: Processes that share the tests: each has a context on the GPU, of about half a gigabyte.
SHARES = min(12, len(os.sched_getaffinity(0)))
#: Modules whose versions a figure depends on.
MODULES = ("torch", "triton", "numpy", "pytest", "diffusers")
STATUSES = ("passed", "failed", "not run")


class NotRunError(Exception):
    """A step cannot run on this machine; why, in a sentence."""


class StoppedError(RuntimeError):
    """A step failed, but not before it found something."""

    def __init__(self, why: str, found: dict[str, Any]) -> None:
        super().__init__(why)
        self.found = found


@dataclass
class Step:
    """What became of a step: its status, why it is not passed, and what it found."""

    name: str
    status: str
    seconds: float = 0.0
    why: str = ""
    found: dict[str, Any] = field(default_factory=dict)


@dataclass
class Machine:
    """What the steps are run with: where logs go, when the part has to end, and what is not there."""

    out: Path
    until: float
    no_card: str
    environment: dict[str, str]

    def needs_card(self) -> None:
        """Raise where there is no GPU."""
        if self.no_card:
            raise NotRunError(f"needs a GPU: {self.no_card}")

    def run(self, log: str, command: Iterable[str], most: float, **variables: str) -> None:
        """Run a command, its output in a file; RuntimeError with the end of it where it fails."""
        path = self.out / f"{log}.log"
        with path.open("w") as file:
            done = Started(command, self.environment | variables, file).wait_until(min(most, self.until - time.time()))
        if done:
            raise RuntimeError(f"{done}; {path} ends with:\n{tail(path)}")


class Started:
    """A process in a group of its own, so that its end is the end of what it started."""

    def __init__(self, command: Iterable[str], environment: dict[str, str], log: Any) -> None:
        self.process = subprocess.Popen(
            [*command], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def wait_until(self, seconds: float) -> str:
        """What is wrong with how it ended; empty where nothing is."""
        try:
            status = self.process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, 9)
            self.process.wait()
            return f"it was stopped after {seconds:.0f} s"
        return f"its status was {status}" if status else ""


def tail(path: Path, lines: int = 15) -> str:
    """The end of a log."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def question(program: str, environment: dict[str, str] | None = None) -> str:
    """What a short program prints; why it fails, where it does."""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    return (done.stdout if done.returncode == 0 else done.stderr).strip().rpartition("\n")[2]


WHY_NO_CARD = """
try:
    import torch
    print("" if torch.cuda.is_available() else f"torch {torch.__version__} sees none")
except ImportError as error:
    print(f"{error} in {__import__('sys').executable}")
"""


def prepared(out: Path) -> dict[str, str]:
    """The environment of the steps: this checkout before all others, one thread a process, nvcc where it usually is."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
    cuda = "/usr/local/cuda/bin"
    if shutil.which("nvcc") is None and Path(cuda, "nvcc").exists():
        environment["PATH"] = os.pathsep.join([environment.get("PATH", ""), cuda])
    environment |= {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(out / "triton")}
    # Plug-ins of the machine's own pytest may want packages that the tests do not.
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "BICM_KERNELS_BACKEND": "native"}
    return environment


def tool(machine: Machine, name: str) -> str:
    """The path of a program of CUDA's."""
    found = shutil.which(name, path=machine.environment.get("PATH"))
    if found is None:
        raise NotRunError(f"needs {name}, which is not on the PATH")
    return found


# --- part 1: what is there, build, smoke test, tests of the CUDA library ----------------------------------------------


def versions(machine: Machine) -> dict[str, Any]:
    """What the machine has."""
    program = (
        "import importlib.metadata as m\n"
        f"for name in {MODULES}:\n"
        "    try: print(name, m.version(name), end=', ')\n"
        "    except m.PackageNotFoundError: print(name, 'none', end=', ')\n"
    )
    found = {"python": platform.python_version(), "modules": question(program, machine.environment).rstrip(", ")}
    for name, command in {
        "gpu": ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"],
        "nvcc": ["nvcc", "--version"],
        "compiler": [*os.environ.get("CXX", "c++").split(), "--version"],
    }.items():
        program_path = shutil.which(command[0], path=machine.environment.get("PATH"))
        if program_path is None:
            found[name] = "none"
            continue
        output = subprocess.run([program_path, *command[1:]], capture_output=True, text=True, check=False).stdout
        release = re.search(r"release .*", output)
        found[name] = release.group() if release else output.strip().partition("\n")[0]
    return found


def build(machine: Machine) -> dict[str, Any]:
    """Both libraries, for the card that is there."""
    cuda = shutil.which("nvcc", path=machine.environment.get("PATH")) is not None
    variables = {"BICM_CUDA": os.environ.get("BICM_CUDA", "ON" if cuda else "OFF")}
    machine.run("build", [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], 280, **variables)
    if variables["BICM_CUDA"] == "OFF":
        raise NotRunError("only the CPU's library was built: " + ("BICM_CUDA=OFF" if cuda else "there is no nvcc"))
    libraries = sorted((ROOT / "bicm_kernels").glob("*.so"))
    return {path.name: f"{path.stat().st_size / 1e6:.1f} MB" for path in libraries}


def smoke(machine: Machine) -> dict[str, Any]:
    """The bits of a few calls, on the GPU and on the CPU; without a GPU, on the CPU and of the reference."""
    device = "cpu" if machine.no_card else "cuda"
    machine.run("smoke", [sys.executable, f"{TESTS}/smoke.py", device], 120)
    machine.needs_card()
    return {"backend": tail(machine.out / "smoke.log", 1)}


def shared_tests(
    machine: Machine, name: str, selection: str, most: float, *paths: str, **variables: str
) -> dict[str, Any]:
    """Tests by several processes, each of which takes its share."""
    machine.needs_card()
    until = min(time.time() + most, machine.until)
    begun = []
    for k in range(SHARES):
        log = machine.out / f"{name}-{k}.log"
        command = pytest_command(f"{k}/{SHARES}", selection, str(log.with_suffix(".xml")), *paths)
        with log.open("w") as file:
            begun.append((log, Started(command, machine.environment | variables, file)))
    wrong = [(log, why) for log, process in begun if (why := process.wait_until(until - time.time()))]
    counts = counted([log.with_suffix(".xml") for log, _ in begun])
    failed = "\n".join(f"{log.name}: {why}\n{tail(log, 8)}" for log, why in wrong if not why.endswith("status was 5"))
    if failed:
        raise RuntimeError(f"{counts}\n{failed}")
    if not counts["passed"]:
        raise RuntimeError(f"no test was run: {counts}")
    return counts


def pytest_command(share: str, selection: str, junit: str, *paths: str) -> list[str]:
    """A share of the tests that are marked gpu, by pytest alone."""
    command = [sys.executable, "-m", "pytest", *(paths or (TESTS,)), "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    return [*command, "-k", selection, "--share", share, f"--junitxml={junit}"]


def counted(reports: Iterable[Path]) -> dict[str, int]:
    """How many tests passed, failed and were skipped, by pytest's own reports."""
    total = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for path in reports:
        suites = ElementTree.parse(path).iter("testsuite") if path.exists() else ()
        for suite in suites:
            for name in total:
                total[name] += int(suite.get(name, "0"))
    failed = total["failures"] + total["errors"]
    return {"passed": total["tests"] - failed - total["skipped"], "failed": failed, "skipped": total["skipped"]}


SLOW = "test_compiled or twenty_steps or any_group or own_sanitizer"


def native_tests(machine: Machine) -> dict[str, Any]:
    return shared_tests(machine, "native", f"not triton and not ({SLOW})", 270)


def direct_tests(machine: Machine) -> dict[str, Any]:
    """The tests of plain calls once more, past the dispatcher; tests/gpu/test_direct_on_the_gpu.py compares the two."""
    again = "of_the_cpu or numbers_on_the_cpu or another_stream or another_device or captured or nothing_waits"
    path = f"{TESTS}/test_on_the_gpu.py"
    return shared_tests(machine, "direct", f"native and ({again})", 150, path, BICM_KERNELS_DIRECT="cuda")


# --- part 2: Triton, compiled loops, processes, sanitizers ------------------------------------------------------------


def triton_tests(machine: Machine) -> dict[str, Any]:
    return shared_tests(machine, "triton", f"triton and not ({SLOW})", 270)


def slow_tests(machine: Machine) -> dict[str, Any]:
    paths = [f"{TESTS}/{name}_on_the_gpu.py" for name in ("test_loops", "test_distributed")]
    return shared_tests(machine, "slow", "test_compiled or any_group", 130, *paths)


def sanitizer(machine: Machine, check: str) -> dict[str, Any]:
    """A few calls under one of the GPU's own sanitizers."""
    machine.run("calls", [sys.executable, f"{TESTS}/sanitized.py", "cpu" if machine.no_card else "cuda"], 60)
    machine.needs_card()
    command = [
        tool(machine, "compute-sanitizer"),
        "--tool",
        check,
        "--report-api-errors",
        "no",
        "--error-exitcode",
        "9",
    ]
    machine.run(check, [*command, sys.executable, f"{TESTS}/sanitized.py", "cuda"], 90)
    return {"report": tail(machine.out / f"{check}.log", 1)}


# --- part 3: figures --------------------------------------------------------------------------------------------------


def figures(machine: Machine) -> dict[str, Any]:
    """Times of kernels in graphs, of the host apart, of a sampler's loop."""
    machine.needs_card()
    path, most = machine.out / "figures.json", min(400.0, machine.until - time.time() - 20)
    path.unlink(missing_ok=True)  # of an earlier run
    command = [sys.executable, "-m", "benchmarks.gpu_figures", "--json", str(path), "--seconds", str(most - 30)]
    try:
        machine.run("figures", command, most)
    except RuntimeError as error:
        raise StoppedError(str(error), read(path)) from error
    return read(path)


def read(path: Path) -> dict[str, Any]:
    """The tables that were written; none where there is no file yet."""
    return dict(json.loads(path.read_text())) if path.exists() else {}


METRICS = (
    "gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum,smsp__issue_active.avg.pct,"
    "sm__warps_active.avg.pct_of_peak_sustained_active,launch__registers_per_thread,launch__waves_per_multiprocessor"
)


def kernel_names() -> list[str]:
    """The CUDA kernels' names, as they stand in the sources."""
    sources = sorted(path for path in (ROOT / "csrc" / "cuda").iterdir() if path.suffix in (".cu", ".h"))
    # Between the keyword and the name stand the type and the bounds of a launch, whose parentheses are nested.
    found = (re.findall(r"__global__[^{;]*?\b(\w+_kernel)\(", path.read_text()) for path in sources)
    return [name for names in found for name in names]


def counters(machine: Machine) -> dict[str, Any]:
    """The hardware's counters of every kernel, run once."""
    machine.needs_card()
    command = [tool(machine, "ncu"), "--clock-control", "none", "--metrics", METRICS, "--csv"]
    command += ["--kernel-name", f"regex:({'|'.join(kernel_names())})"]
    machine.run("counters", [*command, sys.executable, "-m", "benchmarks.gpu_figures", "--once"], 150)
    log = machine.out / "counters.log"
    uncounted = [name for name in kernel_names() if not re.search(rf"\b{name}\b", log.read_text(errors="replace"))]
    return {"figures": str(log), "not counted": ", ".join(uncounted) or "none"}


Run = Callable[[Machine], dict[str, Any]]
PARTS: dict[str, dict[str, Run]] = {
    "build": {
        "versions": versions,
        "build": build,
        "smoke test": smoke,
        "tests, CUDA": native_tests,
        "tests, CUDA, past the dispatcher": direct_tests,
    },
    "triton": {
        "tests, Triton": triton_tests,
        "tests, compiled loops and processes": slow_tests,
        "memcheck": lambda machine: sanitizer(machine, "memcheck"),
        "racecheck": lambda machine: sanitizer(machine, "racecheck"),
    },
    "figures": {"figures": figures, "hardware counters": counters},
}


def run_part(part: str, out: Path) -> list[Step]:
    """Run the steps of a part; one that fails does not keep the others from running."""
    environment = prepared(out)
    machine = Machine(out, time.time() + LIMIT, question(WHY_NO_CARD, environment), environment)
    return list(run_steps(PARTS[part], machine))


def run_steps(steps: dict[str, Run], machine: Machine) -> Iterator[Step]:
    for name, run in steps.items():
        begun, step = time.time(), Step(name, "passed")
        try:
            step.found = run(machine)
        except NotRunError as error:
            step.status, step.why = "not run", str(error)
        except (RuntimeError, OSError, ValueError) as error:
            step.status, step.why, step.found = "failed", str(error), getattr(error, "found", {})
        step.seconds = round(time.time() - begun, 1)
        print(f"{name}: {step.status}, {step.seconds} s{', ' + step.why if step.why else ''}", flush=True)
        yield step


def table(parts: dict[str, list[dict[str, Any]]]) -> str:
    """What became of every step, the failures first; then the figures."""
    lines = ["| part | step | status | s | |", "| --- | --- | --- | --- | --- |"]
    rows = [(part, step) for part, steps in parts.items() for step in steps]
    for part, step in sorted(rows, key=lambda row: STATUSES.index(row[1]["status"]) != 1):
        short = {name: value for name, value in step["found"].items() if not isinstance(value, list)}
        note = step["why"].partition("\n")[0] or ", ".join(f"{name}: {value}" for name, value in short.items())
        note = note.replace("\n", "; ")
        lines.append(f"| {part} | {step['name']} | {step['status']} | {step['seconds']} | {note} |")
    for _, step in rows:
        for name, found in step["found"].items():
            if isinstance(found, list) and found:
                lines += ["", f"{name}:", "", *markdown(found)]
    return "\n".join(lines) + "\n"


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    """Rows that need not have the same columns."""
    names = list(dict.fromkeys(name for row in rows for name in row))

    def cell(value: object) -> str:
        return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)

    head = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    return head + ["| " + " | ".join(cell(row.get(name)) for name in names) + " |" for row in rows]


def main(arguments: list[str] | None = None) -> int:
    """Run the parts that are named, or all of them one after another; 0 where nothing is left to be desired."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all, in this order)")
    parser.add_argument("--out", type=Path, default=ROOT / OUT, help=f"the folder of results (default: {OUT})")
    options = parser.parse_args(arguments)
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"no part {unknown[0]!r}: {', '.join(PARTS)}")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.json"
    document: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {"schema": 1, "parts": {}}
    found: list[Step] = []
    for part in options.parts or PARTS:
        steps = run_part(part, out)
        found += steps
        document["parts"][part] = [asdict(step) for step in steps]
        results.write_text(json.dumps(document, indent=1) + "\n")
        (out / "results.md").write_text(table(document["parts"]))
    print(table(document["parts"]))
    print(f"written to {results} and {out / 'results.md'}")
    return int(any(step.status != "passed" for step in found))


if __name__ == "__main__":
    sys.exit(main())
