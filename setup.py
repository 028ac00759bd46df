"""Builds the native library with CMake and Ninja; everything else is in pyproject.toml."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = "bicm_kernels"
LIBRARIES = ("_C.abi3.so", "_C_cuda.so")
BUILD_DIRECTORY = ROOT / "build" / "native"


def find_compiler() -> str | None:
    """The C++ compiler's command line: what CXX names and nothing else, or the first usual name found."""
    requested = os.environ.get("CXX")
    candidates = [requested] if requested else ["c++", "g++", "clang++"]
    return next((line for line in candidates if shutil.which(shlex.split(line)[0])), None)


def reason_to_skip() -> str | None:
    """Why no native library is built, or None if one is."""
    if os.environ.get("BICM_KERNELS_NO_NATIVE", "0") not in ("", "0"):
        return "BICM_KERNELS_NO_NATIVE is set"
    if find_compiler() is None:
        return "no C++ compiler was found (CXX, c++, g++, clang++)"
    return None


def find_tool(name: str) -> str:
    """The executable of the PyPI package of this interpreter, which is recent, else the system's."""
    path = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if path is None:
        raise SystemExit(f"{name} is needed to build the native library: python -m pip install {name}")
    return path


def torch_directory() -> str:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "torch is needed to build the native library: install torch first, or build without "
            "--no-build-isolation, or set BICM_KERNELS_NO_NATIVE=1 for a pure Python installation"
        )
    return str(Path(spec.origin).parent)


def architectures_here() -> str:
    """The GPUs of this machine, for which an editable installation is built; one that has clusters where there is none.

    A wheel is built for every architecture, which takes four times as long.
    """
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return "90"
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    wanted = {capability.replace(".", "") for capability in found if capability[0].isdigit()}
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc is not None:  # an older one does not know the newest GPUs, whose drivers compile its PTX
        listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False).stdout
        wanted = {name for name in wanted if f"sm_{name}" in listed.split()}
    return ",".join(sorted(wanted)) or "90"


def remove_libraries(directory: Path) -> None:
    """Unlinks earlier builds: a process that has one mapped keeps it, and none outlives what built it."""
    for name in LIBRARIES:
        (directory / name).unlink(missing_ok=True)


class PythonBuild(build_py):
    """Copies the modules into a clean directory: a module that was deleted must not live on in a wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        if SKIPPED:
            if self.editable_mode:
                remove_libraries(ROOT / PACKAGE)
            print(f"{PACKAGE}: installing without the native library: {SKIPPED}", file=sys.stderr, flush=True)
        super().run()


class NativeBuild(build_ext):
    """Builds with CMake in build/native; installs into the wheel, or into the source tree if editable."""

    def run(self) -> None:
        environment = {**os.environ, "CXX": find_compiler() or ""}
        if self.inplace:
            environment.setdefault("BICM_CUDA_ARCH_LIST", architectures_here())
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(len(os.sched_getaffinity(0))))
        cmake = find_tool("cmake")
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(BUILD_DIRECTORY), "-G", "Ninja"),
            # An isolated build's tools are gone at the next build: never take them from the cache.
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DBICM_TORCH_DIR={torch_directory()}",
            f"-DBICM_CUDA={os.environ.get('BICM_CUDA', 'AUTO')}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        for step, command in (
            ("configuring", configure),
            ("building", [cmake, "--build", str(BUILD_DIRECTORY), "--parallel", jobs]),
        ):
            if subprocess.run(command, env=environment).returncode:
                raise SystemExit(
                    f"{PACKAGE}: {step} the native library failed, the reason is printed above; "
                    "BICM_KERNELS_NO_NATIVE=1 installs without it"
                )
        remove_libraries(self.destination())
        install = [cmake, "--install", str(BUILD_DIRECTORY), "--prefix", str(self.destination())]
        subprocess.run(install, check=True)

    def destination(self) -> Path:
        return ROOT / PACKAGE if self.inplace else Path(self.build_lib).resolve() / PACKAGE

    def get_outputs(self) -> list[str]:
        return [str(path) for name in LIBRARIES if (path := self.destination() / name).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


SKIPPED = reason_to_skip()

setup(
    ext_modules=[] if SKIPPED else [Extension(f"{PACKAGE}._C", sources=[], py_limited_api=True)],
    cmdclass={"build_py": PythonBuild, "build_ext": NativeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
