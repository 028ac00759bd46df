"""Which implementation runs, and why.

Three implementations give the same bits: ``native`` (C++ on the CPU, CUDA on NVIDIA GPUs), ``triton`` (any GPU that
Triton supports) and ``reference`` (plain PyTorch, slow). The environment variable ``BICM_KERNELS_BACKEND`` chooses:
``auto`` (the default) takes the first that is there, any other name forces that one and makes its absence an error.
``BICM_KERNELS_ISA`` (scalar, avx2, avx512) forces an instruction set of the native CPU library.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bicm_kernels import generator_check

#: What has no kernel but the native CPU one yet; elsewhere its reference runs.
CPU_FAMILIES: tuple[str, ...] = ()

CHOICES = ("auto", "native", "triton", "reference")

_choice = "auto"
_running: dict[str, tuple[str, str]] = {}
_registrations: list[torch.library.Library] = []

#: Whether CPU tensors go to the native library: what calls ask first.
native_cpu = False

#: The native library's own functions for CPU tensors, which the step ops try first: beside the dispatcher, they return
#: None for every call that is not plain. None where another implementation runs.
lane: Any = None

_draws_like_torch: bool | None = None


def _native_cpu() -> str:
    if importlib.util.find_spec("bicm_kernels._C") is None:
        raise ImportError(_why_there_is_no_library())
    return f"C++, {importlib.import_module('bicm_kernels._C').instruction_set()}"


def _why_there_is_no_library() -> str:
    here = Path(__file__).resolve().parent
    others = (Path(entry, "bicm_kernels").resolve() for entry in sys.path)
    other = next((path for path in others if path != here and (path / "_C.abi3.so").is_file()), None)
    if other is None:
        return "the native library was not built: install with a C++ compiler"
    return (
        f"the native library was not built in {here}, which Python found before the installed {other}: leave the "
        "working directory or change PYTHONPATH to use that one, or build this one with `pip install -e .`"
    )


def _lane() -> Any:
    library = importlib.import_module("bicm_kernels._C")
    return library if hasattr(library, "ddim_step") else None


def draws_like_torch() -> bool:
    """Whether the native library draws the numbers of torch's CPU generator; compared with torch once."""
    global _draws_like_torch
    if lane is None:
        return False
    if _draws_like_torch is None:
        _draws_like_torch = lane.instruction_set() != "scalar" and generator_check.agree(lane.generator_normal)
    return bool(_draws_like_torch)


def _native_cuda() -> str:
    path = Path(__file__).with_name("_C_cuda.so")
    if torch.version.hip is not None or not path.exists():
        raise ImportError("the CUDA library was not built: install where nvcc is found")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(f"the CUDA library does not load: {error}") from error
    return "CUDA C++"


def _triton(device_type: str) -> str:
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if device_type == "cpu" and not interpreted:
        raise ImportError("Triton has no CPU backend (TRITON_INTERPRET=1 interprets its kernels)")
    if importlib.util.find_spec("triton") is None:
        raise ImportError("Triton is not installed")
    kernels = importlib.import_module("bicm_kernels.triton_kernels")
    key = {"cpu": "CPU", "cuda": "CUDA", "xpu": "XPU"}.get(device_type)
    if key is None:
        raise ImportError(f"Triton kernels are not registered for {device_type}")
    library = torch.library.Library("bicm_kernels", "IMPL")
    for name, function in kernels.OPS.items():
        library.impl(name, function, key)
    _registrations.append(library)
    return "Triton, interpreted" if interpreted else "Triton"


def _implementations(device_type: str) -> dict[str, Callable[[], str]]:
    """What can run on a device, best first; each call makes it ready and tells what it is, or raises ImportError."""
    native = {"cpu": _native_cpu, "cuda": _native_cuda}
    found: dict[str, Callable[[], str]] = {}
    if device_type in native:
        found["native"] = native[device_type]
    found["triton"] = lambda: _triton(device_type)
    found["reference"] = lambda: "plain PyTorch, slow"
    return found


def _start(device_type: str) -> tuple[str, str]:
    """Choose the implementation for a device and make it ready."""
    failures: list[str] = []
    for name, prepare in _implementations(device_type).items():
        if _choice not in ("auto", name):
            continue
        try:
            what = prepare()
        except ImportError as error:
            failures.append(f"{name}: {error}")
            continue
        if name == "reference" and failures:
            warnings.warn(
                f"bicm_kernels runs its slow PyTorch reference on {device_type} ({'; '.join(failures)})",
                stacklevel=4,
            )
        return name, "; ".join([what, *failures])
    raise ImportError(f"BICM_KERNELS_BACKEND={_choice} cannot run on {device_type}: {'; '.join(failures)}")


def running(device_type: str) -> str:
    """The implementation that runs on a device type: ``native``, ``triton`` or ``reference``."""
    if device_type not in _running:
        _running[device_type] = _start(device_type)
    return _running[device_type][0]


def describe() -> str:
    """Say which implementation runs on each device that torch has, and why.

    >>> import bicm_kernels
    >>> bicm_kernels.backend.describe().startswith("cpu: ")
    True
    """
    devices = ["cpu"]
    for name in ("cuda", "xpu"):
        module = getattr(torch, name, None)
        if module is not None and module.is_available():
            devices.append(name)
    lines = []
    for device_type in devices:
        name = running(device_type)
        what = _running[device_type][1]
        if device_type == "cpu" and name == "native" and not draws_like_torch():
            what += "; generator_normal is torch.randn"
        lines.append(f"{device_type}: {name} ({what})")
    return "\n".join(lines)


def choose(name: str) -> None:
    """Choose the implementation from here on: ``auto``, ``native``, ``triton`` or ``reference``.

    Raises ValueError for another name, ImportError where that implementation cannot run on the CPU.
    """
    global _choice, native_cpu, lane
    if name not in CHOICES:
        raise ValueError(f"the backend must be one of {', '.join(CHOICES)}, got {name!r}")
    _choice = name
    _running.clear()
    for library in _registrations:
        library._destroy()
    _registrations.clear()
    native_cpu, lane = False, None
    # Triton belongs to GPUs: forcing it says nothing of CPU tensors, unless its kernels are interpreted.
    if name != "triton" or os.environ.get("TRITON_INTERPRET", "0") == "1":
        native_cpu = running("cpu") in ("native", "triton")
        lane = _lane() if running("cpu") == "native" else None


def release_memory() -> int:
    """Give the memory that is kept for large results on the CPU back to the system; the number of bytes.

    The native library keeps blocks of 64 KiB and more that results lay in, at most 256 MiB that nobody uses, because
    the C library would page them anew in every step. Results in use are not touched.

    >>> import bicm_kernels
    >>> bicm_kernels.backend.release_memory() >= 0
    True
    """
    return int(importlib.import_module("bicm_kernels._C").release_memory()) if running("cpu") == "native" else 0


@contextmanager
def use(name: str) -> Iterator[None]:
    """Choose an implementation for the length of a ``with`` block.

    >>> import bicm_kernels, torch
    >>> with bicm_kernels.backend.use("reference"):
    ...     noise = bicm_kernels.normal((1, 2), seed=0)
    """
    before = _choice
    choose(name)
    try:
        yield
    finally:
        choose(before)


def start() -> None:
    """Make the choice of the environment at import, after the schemas are defined."""
    choose(os.environ.get("BICM_KERNELS_BACKEND", "auto"))
