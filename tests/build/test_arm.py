"""The CPU kernels for 64-bit Arm, cross-compiled and run under qemu: the bits of this processor's kernels, in vectors.

``csrc/bits`` makes the problems, for every kernel. Under qemu speed means nothing, and none is measured.
"""

from __future__ import annotations

import fcntl
import json
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.instruction_sets import available

ROOT = Path(__file__).resolve().parents[2]
COMPILER, OBJDUMP, QEMU = "aarch64-linux-gnu-g++", "aarch64-linux-gnu-objdump", "qemu-aarch64"
MISSING = [name for name in (COMPILER, OBJDUMP, QEMU) if shutil.which(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed (g++-aarch64-linux-gnu, qemu-user): {', '.join(MISSING)}"),
]
NATIVE, ARM = ROOT / "build" / "native", ROOT / "build" / "arm"
CROSS = (
    *("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}"),
    *("-DCMAKE_EXE_LINKER_FLAGS=-static", "-DCMAKE_CXX_FLAGS=-Werror", "-DBICM_TORCH=OFF"),
)


def output(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{(done.stdout + done.stderr)[-4000:]}"
    return done.stdout


def tool(name: str) -> str:
    """CMake or Ninja of this interpreter, else the system's."""
    path = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    return path or pytest.skip(f"{name} is not installed")


@contextmanager
def alone() -> Iterator[None]:
    """Tests in several processes build in one place at a time."""
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build" / ".wheel").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class Program:
    """The program ``bicm_bits`` of a processor."""

    command: tuple[str | Path, ...]

    def digests(self, instructions: str) -> dict[str, str]:
        """By the case's name: how many elements it wrote, their digest, and what it is."""
        lines = output(*self.command, instructions).splitlines()
        return {name: rest for name, _, rest in (line.partition(" ") for line in lines)}

    def bits(self, instructions: str, case: str) -> list[str]:
        return output(*self.command, instructions, case).split()


@pytest.fixture(scope="module")
def here() -> Program:
    if sys.platform != "linux" or not (NATIVE / "build.ninja").exists():
        pytest.skip("the native library was not built here")
    with alone():
        output(tool("cmake"), "--build", NATIVE, "--target", "bicm_bits")
    return Program((NATIVE / "bicm_bits",))


@pytest.fixture(scope="module")
def arm() -> Program:
    with alone():
        output(tool("cmake"), "-S", ROOT, "-B", ARM, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", *CROSS)
        output(tool("cmake"), "--build", ARM, "--target", "bicm_bits")
    return Program((QEMU, ARM / "bicm_bits"))


@pytest.fixture(scope="module")
def expected(here: Program) -> dict[str, str]:
    return here.digests("scalar")


def differing(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name in expected if found[name] != expected[name]]


def where(case: str, one: list[str], other: list[str]) -> str:
    """The first element of a case that differs, for the failure's message."""
    first = next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
    return f"{case}: " + ("nothing" if first is None else f"element {first} is {one[first]}, not {other[first]}")


# --- bits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("instructions", ["scalar", "neon"])
def test_arm_gives_the_bits_of_this_processor(
    here: Program, arm: Program, expected: dict[str, str], instructions: str
) -> None:
    found = arm.digests(instructions)
    wrong = differing(found, expected)
    if wrong:
        first = wrong[0]
        place = where(first, arm.bits(instructions, first), here.bits("scalar", first))
        pytest.fail(f"{len(wrong)} of {len(expected)} cases differ; the first: {place}: {expected[first]}")


@pytest.mark.parametrize("instructions", available()[1:])
def test_the_sets_of_this_processor_agree(here: Program, expected: dict[str, str], instructions: str) -> None:
    assert differing(here.digests(instructions), expected) == []


def test_there_are_cases_of_every_kernel(expected: dict[str, str]) -> None:
    table = (ROOT / "csrc" / "cpu" / "kernels.h").read_text()
    kernels = set(re.findall(r"KERNEL\(\w+, (\w+),", table))
    called = set(re.findall(r"kernels\.(\w+)", (ROOT / "csrc" / "bits" / "families.cpp").read_text()))
    assert kernels - called == {"generator_normals"}, "torch's own numbers, which differ between processors"
    cases = Counter(name.partition("/")[0] for name in expected)
    assert min(cases.values()) >= 8
    assert sum(int(rest.split()[0]) for rest in expected.values()) > 10_000_000
    assert sum(int(rest.split()[0]) for name, rest in expected.items() if name.startswith("many")) > 2_000_000


@dataclass(frozen=True)
class Fault:
    """A change of the NEON kernels of one file that has to be noticed, in cases of these families."""

    source: str
    families: set[str]
    header: str = ""
    old: str = ""
    new: str = ""
    flag: str = ""


FAULTS = {
    "contracted": Fault("multistep", {"multistep"}, flag="-ffp-contract=fast"),
    "lanes in the wrong place": Fault(
        "noise", {"noise", "many_numbers", "far_numbers", "noisy_pair"}, "noise_block.h", "vzip1q_f64", "vzip2q_f64"
    ),
    "a product's low words for the high ones": Fault(
        "noise", {"noise", "many_numbers", "far_numbers", "noisy_pair"}, "lanes.h", "vuzp2q_u32", "vuzp1q_u32"
    ),
    "truncated": Fault("multistep", {"multistep"}, "halves.h", "up = bits + 0x7FFFu", "up = bits"),
    "NaNs overlooked": Fault("multistep", {"multistep"}, "halves.h", "vminvq_u32", "vmaxvq_u32"),
    "summed in another order": Fault(
        "gaussian", {"gaussian"}, "sums.h", "total[1] += Term::of((Doubles)vcvt", "total[0] += Term::of((Doubles)vcvt"
    ),
}


def object_of(source: str) -> Path:
    return ARM / "CMakeFiles" / "bicm_cpu_neon.dir" / "csrc" / "cpu" / f"{source}.cpp.o"


def faulty(fault: Fault, folder: Path) -> Program:
    """The program with one object compiled from a changed copy of the sources."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    if fault.header:
        header = folder / "csrc" / "cpu" / fault.header
        assert header.read_text().count(fault.old) == 1
        header.write_text(header.read_text().replace(fault.old, fault.new))
    good = object_of(fault.source)
    entries = json.loads((ARM / "compile_commands.json").read_text())
    (command,) = (entry["command"] for entry in entries if good == Path(entry["directory"]) / entry["output"])
    words = shlex.split(command.replace(str(ROOT / "csrc"), str(folder / "csrc")))
    bad = folder / good.name
    words[words.index("-o") + 1] = str(bad)
    output(*words, *filter(None, [fault.flag]))
    objects = [path for part in ("bits", "cpu", "cpu_scalar", "cpu_neon") for path in parts(part) if path != good]
    # The first definition of a template's function is the one that is linked.
    output(COMPILER, "-static", bad, *objects, "-o", folder / "bicm_bits")
    return Program((QEMU, folder / "bicm_bits"))


def parts(name: str) -> list[Path]:
    return sorted((ARM / "CMakeFiles" / f"bicm_{name}.dir").rglob("*.o"))


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_would_be_seen(arm: Program, expected: dict[str, str], fault: Fault, tmp_path: Path) -> None:
    wrong = differing(faulty(fault, tmp_path).digests("neon"), expected)
    assert {name.partition("/")[0] for name in wrong} == fault.families
    if fault.flag:
        assert fused(listing(tmp_path / f"{fault.source}.cpp.o")) - FUSED_ON_PURPOSE


# --- machine code ----------------------------------------------------------------------------------------

Instructions = list[tuple[str, str]]
#: LaneOps::fused, where the product is exact: for noise.
FUSED_ON_PURPOSE = {("fmla", "4s")}
#: Functions that work on whole blocks of float32 or halves: beside a few numbers per call, only in vectors.
IN_VECTORS = re.compile(
    r"draw<(float|double|\(bicm::Distribution\)0)>|::Update<.*::elements|residual_of_blocks<|scale_elements<|scale_slopes\(|(?<!sum_and_)differentiate_unit<float>"
)


def listing(path: Path) -> dict[str, Instructions]:
    """(operation, operands) of every function's instructions."""
    functions: dict[str, Instructions] = {}
    for line in output(OBJDUMP, "-d", "-C", "--no-show-raw-insn", path).splitlines():
        if start := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            body = functions.setdefault(start[1], [])
        elif found := re.match(r"\s*[0-9a-f]+:\t(\S+)\s*(.*)", line):
            body.append((found[1], found[2]))
    return functions


def shape(operands: str) -> str:
    """Of the first register: 4s, 2d, ..., or s and d of a single number."""
    found = re.match(r"v\d+\.(\w+)|([shd])\d+", operands)
    return (found[1] or found[2]) if found else ""


def fused(functions: dict[str, Instructions]) -> set[tuple[str, str]]:
    pattern = re.compile(r"fn?m(add|sub)|fml[as]l?2?|fcmla")
    return {(op, shape(rest)) for body in functions.values() for op, rest in body if pattern.fullmatch(op)}


@pytest.mark.parametrize("source", ["noise", "multistep", "gaussian", "pseudo_huber", "reversible"])
def test_nothing_is_contracted(arm: Program, source: str) -> None:
    draws = source in ("noise", "multistep", "gaussian")
    assert fused(listing(object_of(source))) == (FUSED_ON_PURPOSE if draws else set())


def test_hot_loops_work_on_vectors(arm: Program) -> None:
    checked: Counter[str] = Counter()
    for source in ("noise", "multistep", "gaussian", "pseudo_huber"):
        for name, body in listing(object_of(source)).items():
            if not IN_VECTORS.search(name):
                continue
            arithmetic = Counter(shape(rest) for op, rest in body if op in ("fmul", "fadd", "fsub", "fdiv", "fsqrt"))
            assert arithmetic["4s"] >= 4, name
            assert arithmetic["s"] <= arithmetic["4s"] / 4, name
            checked[source] += 1
    assert checked["noise"] == 1
    assert checked["multistep"] >= 60  # terms, dtypes and shapes
    assert checked["gaussian"] >= 20
    assert checked["pseudo_huber"] >= 5


def test_noise_multiplies_four_counters_at_a_time(arm: Program) -> None:
    (draw,) = (body for name, body in listing(object_of("noise")).items() if "draw<(bicm::Distribution)0>" in name)
    operations = Counter(op for op, _ in draw)
    assert operations["umull2"] == operations["umull"] >= 2 * 9 * 2
    assert {shape(rest) for op, rest in draw if op == "fsqrt"} == {"4s"}


# --- the rest of the library -----------------------------------------------------------------------------


def test_the_library_compiles_for_arm() -> None:
    """Everything that includes torch, against the installed headers, which serve every processor: not linked."""
    commands = NATIVE / "compile_commands.json"
    if not commands.exists():
        pytest.skip("the native library was not built here")
    entries = [entry for entry in json.loads(commands.read_text()) if "/csrc/torch/" in entry["file"]]
    sources = [entry for entry in entries if "/csrc/torch/cuda/" not in entry["file"] and "_C.dir" in entry["output"]]
    assert len(sources) == len(list((ROOT / "csrc" / "torch").glob("*.cpp")))

    def check(entry: dict[str, str]) -> None:
        words = [word for word in shlex.split(entry["command"]) if not word.startswith("-m")]
        output(COMPILER, *words[1 : words.index("-o")], "-Werror", "-fsyntax-only", entry["file"])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(check, sources))
