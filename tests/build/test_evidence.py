"""docs/evidence.md says what the runs say: the tables that are quick to make again are compared."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.evidence import ladder, resources
from tests.evidence.document import written

ROOT = Path(__file__).parents[2]
STALE = "run `make evidence`"


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_the_command_says_which_tables_it_writes() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tests.evidence", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    helped = run("--help")
    assert helped.returncode == 0 and "pipelines" in helped.stdout
    assert "no tables of these names: another" in run("another").stderr


def test_the_readme_has_the_launches_of_the_table() -> None:
    """The ranges of its first sentence are those of diffusers' steps, and of those with a denoiser."""
    text = " ".join((ROOT / "README.md").read_text().split())

    def ranges(kind: str) -> list[tuple[int, int]]:
        rows = [row[1:] for row in cells(written("steps")) if kind in row[0]]
        return [(min(map(int, column)), max(map(int, column))) for column in zip(*rows, strict=True)]

    (least, most), ours = ranges("diffusers")
    assert ours == (1, 3)
    assert f"step of {least} to {most} tensor operations becomes one to three kernel launches" in text
    (few, many), (least, most) = ranges("with its denoiser")
    assert f"with its denoiser {least} to {most} instead of {few} to {many}" in text


def test_the_ladder_names_tests_that_exist() -> None:
    assert written("ladder") == ladder.expected(), STALE


REPORT = """<testsuites><testsuite>
<testcase classname="tests.kernels.test_noise" name="test_a"/>
<testcase classname="tests.kernels.test_noise.TestB" name="test_b"><skipped/></testcase>
<testcase classname="tests.emulator.test_losses" name="test_c"/>
<testcase classname="tests.emulator.test_losses" name="test_d"><failure/></testcase>
<testcase classname="tests.gpu.test_on_the_gpu" name="test_e"><skipped/></testcase>
</testsuite></testsuites>"""


def test_a_rung_has_passed_where_all_its_tests_passed(tmp_path: Path) -> None:
    report = tmp_path / "tests.xml"
    report.write_text(REPORT)
    found = ladder.outcomes([report])
    assert ladder.all_passed(("tests/kernels/test_noise.py",), found)
    for missing in ("tests/emulator/test_losses.py", "tests/gpu/test_on_the_gpu.py", "tests/kernels/test_multistep.py"):
        assert not ladder.all_passed(("tests/kernels/test_noise.py", missing), found)


def test_steps_in_public_code_and_ours() -> None:
    pytest.importorskip("diffusers")
    from tests.evidence import steps

    assert written("steps") == steps.steps(), STALE


@pytest.mark.slow
def test_pipelines_that_load_a_covered_scheduler() -> None:
    diffusers = pytest.importorskip("diffusers")
    if f"diffusers {diffusers.__version__} " not in written("pipelines"):
        pytest.skip("they were counted in another version")
    from tests.evidence import pipelines

    assert written("pipelines") == pipelines.pipelines(), STALE


@pytest.mark.skipif(
    not resources.LIBRARY.exists() or resources.tool("cuobjdump") is None,
    reason="no CUDA library was built, or there is no cuobjdump",
)
def test_registers_of_the_cuda_kernels() -> None:
    usage = resources.usage_of_library()
    built = {architecture for use in usage.values() for architecture in use.registers}
    header = written("cuda").partition("\n")[0]
    if any(architecture not in header for architecture in built) or resources.compiler() not in written("compilers"):
        pytest.skip("the library was built for other architectures, or by another compiler")
    architectures = [name.rpartition(" ")[2] for name in header.strip("| ").split(" | ") if "registers" in name]
    said = {row[0]: row[1:] for row in cells(written("cuda"))}
    assert set(said) == set(usage), STALE
    for kernel, use in usage.items():
        row = dict(zip(architectures, said[kernel][1:], strict=False))
        assert {a: row[a] for a in use.registers} == {a: resources.span(n) for a, n in use.registers.items()}, STALE
        assert said[kernel][len(architectures) + 1] == str(use.spilled) == "0"


@pytest.mark.parametrize("name", ["bdia float32", "consistency_loss vector float32", "other: two layouts"])
def test_registers_of_the_triton_kernels(name: str) -> None:
    pytest.importorskip("triton")
    from tests.evidence import triton_resources
    from tests.support.triton_cases import ON_THE_STACK

    if triton_resources.compiler() not in written("compilers"):
        pytest.skip("the table was made by another compiler")
    (row,) = (row for row in cells(written("triton")) if row[0] == triton_resources.title(name))
    low, _, high = row[3].partition(" to ")
    found = triton_resources.used(name, "sm_90")
    assert int(low) <= found.registers <= int(high or low), STALE
    assert found.spilled == 0
    on_the_stack = [size for (other, _), size in ON_THE_STACK.items() if triton_resources.title(other) == row[0]]
    assert int(row[-2]) == max(on_the_stack, default=0), STALE
    assert int(row[1]) == sum(triton_resources.title(other) == row[0] for other in triton_resources.CASES), STALE
