"""Which family's tests climb which rung, and whether they passed when `make test` and `make gpu-check` last ran."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bicm_kernels.families import FAMILIES

from .document import table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "build" / "results"
#: Files that many families share.
SHARED = tuple(f"tests/kernels/test_{name}.py" for name in ("tracing", "derivatives", "errors", "schemas"))
COMPILED = ("tests/build/test_triton_compile.py", "tests/build/test_cuda_code.py")


@dataclass(frozen=True)
class Rung:
    """A step of the ladder; files by family, `NAME` being the family's."""

    title: str
    files: dict[str, tuple[str, ...]]


def of_each(*files: str) -> dict[str, tuple[str, ...]]:
    return {family: tuple(file.replace("NAME", family) for file in files) for family in FAMILIES}


EMULATED = {
    "noise": ("test_keyed_noise.py", "test_random_bits.py", "test_polynomials.py"),
    "multistep": ("test_sampler_updates.py", "test_sampler_memory.py", "test_sampler_properties.py"),
    "preconditioning": ("test_preconditioning.py",),
    "pseudo_huber": ("test_losses.py", "test_kept_gradients.py"),
    "gaussian": ("test_gaussian.py",),
    "reversible": ("test_reversible.py",),
}
IN_FLOAT64 = of_each("tests/kernels/test_NAME.py") | {"multistep": ("tests/kernels/test_multistep_accuracy.py",)}
RUNGS = (
    Rung("1 the formula in float64, closed forms", IN_FLOAT64),
    Rung("2 CPU kernels (scalar, AVX2, AVX-512, AVX-512 BF16)", of_each("tests/kernels/test_NAME.py", *SHARED)),
    Rung("3 Triton in the interpreter", of_each("tests/interpreter/test_NAME.py")),
    Rung(
        "4 CUDA on the host emulator, sanitizers",
        {family: tuple(f"tests/emulator/{file}" for file in files) for family, files in EMULATED.items()},
    ),
    Rung("5 compiled without a GPU", of_each(*COMPILED)),
    Rung("6 run on a GPU", of_each("tests/gpu/test_on_the_gpu.py")),
)


@dataclass
class Outcome:
    passed: int = 0
    failed: int = 0


def outcomes(reports: Iterable[Path]) -> dict[str, Outcome]:
    """What became of every test file, from pytest's reports; tests that were skipped count for nothing."""
    found: dict[str, Outcome] = {}
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            file = re.sub(r"(tests[./].*?test_\w+).*", r"\1", case.get("classname", "")).replace(".", "/") + ".py"
            outcome = found.setdefault(file, Outcome())
            kinds = {child.tag for child in case}
            outcome.failed += bool(kinds & {"failure", "error"})
            outcome.passed += not kinds & {"failure", "error", "skipped"}
    return found


def all_passed(files: tuple[str, ...], found: dict[str, Outcome]) -> bool:
    """Whether every file has tests that passed, and none that failed."""
    return all(file in found and found[file].passed and not found[file].failed for file in files)


def ladder(found: dict[str, Outcome]) -> str:
    header = ["rung", *(f"`{family}`" for family in FAMILIES)]
    rows = [
        [rung.title, *("✓" if all_passed(rung.files[family], found) else "not run" for family in FAMILIES)]
        for rung in RUNGS
    ]
    return table(header, rows)


def expected() -> str:
    """The ladder where every test passes that needs no GPU."""
    files = {file for rung in RUNGS[:-1] for names in rung.files.values() for file in names}
    return ladder({file: Outcome(passed=(ROOT / file).exists()) for file in files})
