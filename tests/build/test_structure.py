"""How the tree is laid out: names of files, imports and includes that run one way, every family in every layer."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import bicm_kernels as bk
from bicm_kernels.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "bicm_kernels"
DIFFUSION = ROOT / "python" / "bicm_diffusion"


def matches(pattern: str, *roots: str) -> list[Path]:
    return [path for root in roots for path in (ROOT / root).rglob(pattern) if path.is_file()]


def test_no_file_is_named_after_nothing() -> None:
    files = matches("*", "csrc", "bicm_kernels", "python", "tests", "benchmarks", "examples")
    assert [path for path in files if re.fullmatch(r"_?(utils?|commons?|helpers?|misc)", path.stem)] == []


# Each layer imports from layers of a lower number, and from itself.
LAYERS = {
    "bicm_kernels._C": 0,
    "bicm_kernels.architectures": 0,
    "bicm_kernels.families": -1,
    "bicm_kernels.generator_check": 0,
    "bicm_kernels.reference": 0,
    "bicm_kernels.torch_internals": 0,
    "bicm_kernels.triton_kernels": 0,
    "bicm_kernels.loaders": 1,
    "bicm_kernels.backend": 2,
    "bicm_kernels.ops": 3,
    "bicm_kernels": 4,
    "bicm_diffusion": 5,
}


def layer_of(module: str) -> str | None:
    """The longest prefix of a dotted name that is a layer."""
    parts = module.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in LAYERS), None)


def imported_modules(path: Path, package: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: -node.level + 1 or None]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_no_package_imports_an_example() -> None:
    for folder in (ROOT / "bicm_kernels", ROOT / "python"):
        for path in folder.rglob("*.py"):
            imported = [name.split(".")[0] for name in imported_modules(path, "")]
            assert not {"examples", "benchmarks", "tests"} & set(imported), path


@pytest.mark.parametrize("root", [ROOT, ROOT / "python"], ids=["bicm_kernels", "bicm_diffusion"])
def test_imports_run_one_way(root: Path) -> None:
    package = "bicm_kernels" if root == ROOT else "bicm_diffusion"
    for path in (root / package).rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        own = layer_of(module)
        assert own is not None
        for name in imported_modules(path, ".".join(parts[:-1])):
            imported = layer_of(name)
            if imported is not None and imported != own:
                assert LAYERS[imported] < LAYERS[own], f"{module} imports {name}"


# The folders of csrc whose headers a folder may include; only csrc/torch may include torch's own.
INCLUDES: dict[str, set[str]] = {
    "core": {"core"},
    "cpu": {"core", "cpu"},
    "cuda": {"core", "cuda", "emulator"},  # without nvcc, the emulator's header stands in for CUDA's
    "emulator": {"core", "cpu", "cuda", "emulator"},
    "bits": {"core", "cpu", "bits"},
    "torch": {"core", "cpu", "cuda", "torch"},
}


@pytest.mark.parametrize("folder", INCLUDES)
def test_includes_run_one_way(folder: str) -> None:
    for path in matches("*", f"csrc/{folder}"):
        text = path.read_text()
        assert folder == "torch" or "#include <torch/" not in text
        for name in re.findall(r'#include "([^"]+)"', text):
            target = (path.parent / name).resolve()
            target = target if target.exists() else ROOT / "csrc" / name
            assert target.exists(), f"{path}: {name}"
            assert target.relative_to(ROOT / "csrc").parts[0] in INCLUDES[folder], f"{path} includes {name}"


def test_every_family_is_in_every_layer() -> None:
    kernels = ("csrc/cpu/{}.cpp", "csrc/cuda/{}.cu", "csrc/emulator/{}.cpp")
    rooms = (
        *("csrc/core/{}.h", "csrc/torch/{}.cpp", "csrc/torch/cuda/{}.cpp"),
        *(f"bicm_kernels/{layer}/{{}}.py" for layer in ("ops", "reference", "triton_kernels")),
        *("tests/kernels/test_{}.py", "benchmarks/bench_{}.py"),
    )
    of = {family: rooms if family == "preconditioning" else (*rooms, *kernels) for family in FAMILIES}
    wanted = [room.format(family) for family, rooms in of.items() for room in rooms]
    assert [name for name in wanted if not (ROOT / name).exists()] == []


# --- rooms of the packages -------------------------------------------------------------------------------
def imports(path: Path, package: str) -> Iterator[str]:
    """Every module that a file imports, in full; names imported from a package count as its modules."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: {package} imports itself by a relative name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        (
            "reference",
            (
                "bicm_kernels.ops",
                "bicm_kernels.backend",
                "bicm_kernels.triton_kernels",
                "bicm_kernels._C",
                "triton",
            ),
        ),
        ("ops", ("triton", "bicm_kernels.triton_kernels", "bicm_kernels._C", "bicm_diffusion")),
        ("triton_kernels", ("bicm_kernels.reference", "bicm_kernels.backend", "bicm_diffusion")),
        ("loaders.py", ("triton", "bicm_kernels.ops", "bicm_kernels.reference", "bicm_diffusion")),
        ("backend.py", ("triton", "bicm_kernels.ops", "bicm_kernels.reference", "bicm_diffusion")),
    ],
)
def test_rooms_of_the_kernels_import_one_way(room: str, forbidden: tuple[str, ...]) -> None:
    paths = [KERNELS / room] if room.endswith(".py") else files(KERNELS / room)
    assert paths
    for path in paths:
        for name in imports(path, room):
            wrong = [f for f in forbidden if name == f or name.startswith(f + ".")]
            assert not wrong, f"{path.relative_to(KERNELS)} imports {name}"


def test_diffusion_uses_public_names_only() -> None:
    public = {f"bicm_kernels.{name}" for name in (*bk.__all__, "__version__")} | {"bicm_kernels"}
    public -= {"bicm_kernels.reference"}
    # What accelerated schedulers ask the native library before a step; it runs no kernel.
    asked = "bicm_kernels.inputs."
    for path in files(DIFFUSION):
        for name in imports(path, "bicm_diffusion"):
            allowed = name in public or (name.startswith(asked) and path.parent.name == "diffusers")
            assert not name.startswith("bicm_kernels") or allowed, f"{path.name} imports {name}"
