"""What is installed: the wheel, its symbols, an installation without a compiler."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from tests.support import instruction_sets

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
NO_COMPILER = "installing without the native library"

Changes = Mapping[str, str | None]
About = dict[str, str | list[str]]

# Run in an installed copy, far from the source tree: prints what it is and the bits that it computes.
PROGRAM = """
import hashlib, json, warnings

import torch

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import bicm_diffusion
    import bicm_kernels as bk
    from bicm_kernels import backend

    def results(dtype):
        x = torch.linspace(-3, 3, 2 * 37).reshape(2, 37).to(dtype)
        y, eps = x.flip(1), x.sin()
        coefficients = dict(a=0.98, b=0.03, a_last=0.97, b_last=0.04, gamma=0.96)
        yield bk.normal((2, 37), seed=1, dtype=dtype)
        yield bk.uniform((2, 37), seed=1, dtype=dtype)
        yield bk.add_noise(x, 0.7, seed=2)
        yield bk.ddim_step(x, eps, a=0.98, b=0.03)
        yield bk.bdia_step(x, y, eps, **coefficients)
        yield bk.bdia_inverse_step(x, y, eps, **coefficients)
        yield bk.affine_step([x, y, eps], [0.3, -0.2, 1.7], noise_weight=0.1, seed=3)
        yield bk.denoised_step([x, y], [0.9, -0.1], [0.3, 0.4], x0_weight=0.5, clip=1.0)[0]

    bits = hashlib.sha256()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for result in results(dtype):
            bits.update(result.contiguous().view(torch.uint8).numpy().tobytes())
    about = {"describe": str(backend.describe())}

about |= {"versions": [bk.__version__, bicm_diffusion.__version__], "all": [str(w.message) for w in caught]}
about |= {"bits": bits.hexdigest(), "kernels": bk.__file__, "diffusion": bicm_diffusion.__file__}
about["warnings"] = [str(w.message) for w in caught if "reference" in str(w.message)]
print(json.dumps(about))
"""


def run(command: list[str], cwd: Path = ROOT, changes: Changes | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command without the project's environment variables, and with some changed; None removes one."""
    changes = changes or {}
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("BICM_", "PYTHONPATH")) and name not in changes
    }
    changed = {name: value for name, value in changes.items() if value is not None}
    return subprocess.run(
        command, cwd=cwd, env=kept | changed, capture_output=True, text=True, check=False, timeout=600
    )


@dataclass(frozen=True)
class Wheel:
    path: Path
    log: str

    @property
    def names(self) -> list[str]:
        return zipfile.ZipFile(self.path).namelist()


def build_wheel(directory: Path, changes: Changes | None = None) -> Wheel:
    pip = [sys.executable, "-m", "pip", "wheel", str(ROOT), "-v", "--no-deps", "--no-build-isolation"]
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build" / ".wheel").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)  # tests in several processes would build in one place at a time
        # As the checkout's own library is built: every architecture of a wheel would take minutes more.
        built = run([*pip, "-w", str(directory)], changes={"BICM_CUDA_ARCH_LIST": "90", **(changes or {})})
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = directory.glob("*.whl")
    return Wheel(path, built.stdout + built.stderr)


def install(wheel: Wheel, directory: Path) -> Path:
    """Install a wheel into a fresh environment that shares this one's dependencies; returns its interpreter."""
    venv.create(directory / "venv", with_pip=False)
    python = directory / "venv" / "bin" / "python"
    (site,) = (directory / "venv" / "lib").glob("python*/site-packages")
    # A directory that a .pth file names is searched for modules, but its own .pth files (an editable
    # installation of this very package) are not read.
    (site / "dependencies.pth").write_text(str(Path(torch.__file__).parents[1]))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--ignore-installed"]
    installed = run([*pip, str(wheel.path)])
    assert installed.returncode == 0, installed.stdout + installed.stderr
    return python


def tell(python: Path, directory: Path, changes: Changes | None = None) -> About:
    """Run PROGRAM in a directory."""
    ran = run([str(python), "-c", PROGRAM], directory, changes)
    assert ran.returncode == 0, ran.stderr
    about: About = json.loads(ran.stdout)
    return about


def run_installed(wheel: Wheel, directory: Path, changes: Changes | None = None) -> About:
    """Install a wheel into a fresh environment and run PROGRAM there."""
    python = install(wheel, directory)
    about = tell(python, directory, changes)
    (site,) = (directory / "venv" / "lib").glob("python*/site-packages")
    assert about["kernels"] == str(site / "bicm_kernels" / "__init__.py")
    assert about["diffusion"] == str(site / "bicm_diffusion" / "__init__.py")
    return about


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    """Built in build/native, so that only what changed is compiled."""
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def native(wheel: Wheel, tmp_path_factory: pytest.TempPathFactory) -> About:
    return run_installed(wheel, tmp_path_factory.mktemp("native"), {"BICM_KERNELS_BACKEND": "native"})


def test_one_wheel_for_every_python(wheel: Wheel) -> None:
    assert re.fullmatch(rf"bicm_kernels-[\d.]+-cp310-abi3-linux_{platform.machine()}\.whl", wheel.path.name)
    with zipfile.ZipFile(wheel.path) as archive:
        (info,) = (name for name in archive.namelist() if name.endswith("dist-info/WHEEL"))
        assert "Root-Is-Purelib: false" in archive.read(info).decode()


def test_the_wheel_holds_both_packages_and_nothing_else(wheel: Wheel) -> None:
    top = {name.split("/")[0] for name in wheel.names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"bicm_kernels", "bicm_diffusion"}
    for name in ("bicm_kernels/_C.abi3.so", "bicm_kernels/py.typed", "bicm_diffusion/py.typed"):
        assert name in wheel.names
    assert ("bicm_kernels/_C_cuda.so" in wheel.names) or not shutil.which("nvcc")
    assert not [name for name in wheel.names if name.endswith((".cpp", ".cu", ".h"))]
    sources = {
        path.relative_to(root).as_posix()
        for root, package in ((ROOT, "bicm_kernels"), (ROOT / "python", "bicm_diffusion"))
        for path in (root / package).rglob("*.py")
    }
    assert {name for name in wheel.names if name.endswith(".py")} == sources


def test_the_wheel_holds_no_example(wheel: Wheel) -> None:
    assert [name for name in wheel.names if "digits" in name or "example" in name] == []
    assert [name for name in wheel.names if name.endswith((".safetensors", ".pt", ".png"))] == []


def test_the_installed_wheel_runs_native(native: About) -> None:
    assert str(native["describe"]).startswith("cpu: native")
    assert native["all"] == []


def test_both_packages_have_the_project_s_version(native: About, wheel: Wheel) -> None:
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert wheel.path.name.startswith(f"bicm_kernels-{version}-")
    assert native["versions"] == [version, version]
    code = "import bicm_kernels, bicm_diffusion; print(bicm_kernels.__version__, bicm_diffusion.__version__)"
    shown = run([sys.executable, "-c", code], changes={"PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"})
    assert shown.stdout.split() == [version, version], shown.stderr


def test_a_source_tree_s_version_is_its_own(tmp_path: Path) -> None:
    """Whatever is installed beside it."""
    shutil.copytree(ROOT / "bicm_kernels", tmp_path / "bicm_kernels")
    project = (ROOT / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(re.sub(r'(?m)^version = ".+"$', 'version = "7.8.9"', project))
    code = "import bicm_kernels; print(bicm_kernels.__version__)"
    shown = run([sys.executable, "-c", code], tmp_path, {"PYTHONPATH": str(tmp_path)})
    assert shown.stdout.split() == ["7.8.9"], shown.stderr


def test_a_clone_in_front_of_the_installed_package_is_told(wheel: Wheel, tmp_path: Path) -> None:
    """In a clone's root, bicm_kernels would come from the clone and bicm_diffusion from the installation."""
    python, clone = install(wheel, tmp_path), tmp_path / "clone"
    shutil.copytree(ROOT / "bicm_kernels", clone / "bicm_kernels", ignore=shutil.ignore_patterns("*.so"))
    shutil.copytree(ROOT / "python", clone / "python")
    about = tell(python, clone)
    assert about["kernels"] == str(clone / "bicm_kernels" / "__init__.py")
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    assert about["diffusion"] == str(site / "bicm_diffusion" / "__init__.py")
    reference, mixed = sorted(about["all"], key=lambda message: "mixed" in message)
    assert f"bicm_diffusion is {site / 'bicm_diffusion'}, but bicm_kernels is {clone / 'bicm_kernels'}" in mixed
    assert "leave that directory" in mixed and "pip install -e ." in mixed
    assert f"found before the installed {site / 'bicm_kernels'}" in reference and "compiler" not in reference
    whole = tell(python, tmp_path, {"PYTHONPATH": f"{clone}:{clone / 'python'}"})
    assert not [message for message in whole["all"] if "mixed" in message]
    other = tell(python, tmp_path, {"PYTHONPATH": str(clone / "python")})
    assert "mixed" in other["all"][0] and len(other["all"]) == 1


@pytest.mark.parametrize(
    "changes",
    [{"CXX": "/nonexistent"}, {"CXX": None, "PATH": "/nonexistent"}, {"BICM_KERNELS_NO_NATIVE": "1"}],
    ids=["CXX names none", "none on the PATH", "on purpose"],
)
def test_a_pure_wheel_where_nothing_is_compiled(tmp_path: Path, changes: Changes) -> None:
    pure = build_wheel(tmp_path, changes)
    assert pure.path.name.endswith("-py3-none-any.whl")
    assert not [name for name in pure.names if name.endswith(".so")]
    assert pure.log.count(NO_COMPILER) == 1


def test_without_a_compiler_the_same_bits_and_one_warning(native: About, tmp_path: Path) -> None:
    pure = run_installed(build_wheel(tmp_path, {"CXX": "/nonexistent"}), tmp_path)
    assert str(pure["describe"]).startswith("cpu: reference")
    assert len(pure["warnings"]) == 1
    assert pure["bits"] == native["bits"]


def test_a_failing_build_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "bicm_kernels").mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "bicm_kernels" / "__init__.py").touch()
    (source / "python").mkdir()
    built = run([sys.executable, "setup.py", "bdist_wheel"], source, {"CXX": shutil.which("false")})
    assert built.returncode != 0
    assert "configuring the native library failed" in built.stderr
    assert not (source / "dist").exists()


def defined_symbols(path: Path, *options: str) -> Iterator[tuple[str, str]]:
    """(type letter, demangled name) of every symbol with linkage that a file defines."""
    listed = run(["nm", "-C", "--defined-only", "--extern-only", *options, str(path)])
    assert listed.returncode == 0, listed.stderr
    for line in listed.stdout.splitlines():
        if match := re.fullmatch(r"[0-9a-f]+ (\w) (.+)", line):
            yield match[1], match[2]


@pytest.mark.parametrize("isa", instruction_sets.EVERY)
def test_no_symbol_leaves_its_instruction_set(wheel: Wheel, isa: str) -> None:
    if isa not in instruction_sets.of_machine():
        pytest.skip("of another architecture")
    # The linker keeps one of several weak definitions of a name: were a name shared between instruction sets,
    # the baseline could be left with the AVX-512 copy. A name in its own set's namespace is not shared.
    objects = list((ROOT / "build/native/CMakeFiles" / f"bicm_cpu_{isa}.dir").rglob("*.o"))
    assert len(objects) == len(list((ROOT / "csrc/cpu").glob("*.cpp"))) - 1  # dispatch.cpp is compiled once
    for path in objects:
        symbols = list(defined_symbols(path))
        assert symbols
        assert [name for _, name in symbols if f"bicm::{isa}::" not in name] == []


def test_the_library_exports_only_the_module(wheel: Wheel, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel.path) as archive:
        library = Path(archive.extract("bicm_kernels/_C.abi3.so", tmp_path))
    exported = [name for _, name in defined_symbols(library, "--dynamic")]
    assert [name for name in exported if "bicm" in name] == []
    assert "PyInit__C" in exported


def test_every_torch_from_the_first_on_is_accepted() -> None:
    found = re.findall(r'"(torch\b[^"]*)"', (ROOT / "pyproject.toml").read_text())
    assert len(found) == 2  # to build with, and to run with
    for requirement in found:
        accepted = Requirement(requirement).specifier
        assert not accepted.contains("2.9.1")
        assert all(accepted.contains(version) for version in ("2.10.0", "2.13.0+cpu", "2.15.0", "3.0.0"))
