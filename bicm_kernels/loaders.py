"""How each implementation is loaded: C++, CUDA, Triton's kernels, plain PyTorch."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bicm_kernels import architectures, torch_internals

#: How much memory the native library keeps for results.
kept_bytes = 256 << 20
#: Triton's kernels by the device they are registered for.
registrations: dict[str, torch.library.Library] = {}

_HERE = Path(__file__).parent.resolve()
_OLDEST_TRITON, _OLDEST_TRITON_ELSEWHERE = (3, 5), (3, 6)


def native_cpu() -> str:
    """Load the C++ library; returns what runs. Like all loaders it raises ImportError with the reason if it cannot."""
    spec = importlib.util.find_spec("bicm_kernels._C")
    # An editable installation of another source tree offers that one's library.
    found = None if spec is None else Path(spec.origin or "").parent.resolve()
    if found != _HERE:
        raise ImportError(_why_there_is_no_library(found))
    library = importlib.import_module("bicm_kernels._C")
    library.keep_memory(kept_bytes)
    return f"C++, {library.instruction_set()}"


def _why_there_is_no_library(found: Path | None) -> str:
    others = [*(Path(entry, "bicm_kernels").resolve() for entry in sys.path), *([] if found is None else [found])]
    other = next((path for path in others if path != _HERE and (path / "_C.abi3.so").is_file()), None)
    if other is None:
        return "the native library was not built: install with a C++ compiler"
    return (
        f"the native library was not built in {_HERE}, which Python found before the installed {other}: leave the "
        "working directory or change PYTHONPATH to use that one, or build this one with `pip install -e .`"
    )


_CUDA_LIBRARY = Path(__file__).with_name("_C_cuda.so")


def native_cuda() -> str:
    """Load the CUDA library."""
    path = _CUDA_LIBRARY
    if torch.version.hip is not None or not path.exists():
        raise ImportError("the CUDA library was not built: install where nvcc is found")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(f"the CUDA library does not load: {error}") from error
    built_for = ctypes.CDLL(str(path)).bicm_kernels_architectures
    built_for.restype = ctypes.c_char_p
    devices = range(torch.cuda.device_count())
    reason = architectures.refused(built_for().decode(), [torch.cuda.get_device_capability(k) for k in devices])
    if reason:
        raise ImportError(reason)
    return "CUDA C++"


def launchers() -> object:
    """The CUDA library's launchers, in a capsule."""
    table = ctypes.CDLL(str(_CUDA_LIBRARY)).bicm_kernels_launchers
    table.restype = ctypes.c_void_p
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return capsule(table(), _CAPSULE, None)


#: A capsule keeps the address of its name.
_CAPSULE = b"bicm_kernels.Launchers"


def interpreted() -> bool:
    """Whether Triton's interpreter runs its kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")  # as Triton reads it


def triton(device_type: str) -> str:
    """Register Triton's kernels for a device type."""
    if device_type == "cpu" and not interpreted():
        raise ImportError("Triton has no CPU backend (TRITON_INTERPRET=1 interprets its kernels)")
    if importlib.util.find_spec("triton") is None:
        raise ImportError("Triton is not installed")
    found = importlib.import_module("triton").__version__
    nvidia = device_type != "xpu" and torch.version.hip is None
    oldest = _OLDEST_TRITON if nvidia else _OLDEST_TRITON_ELSEWHERE  # 3.5 flushes subnormal numbers, but for our PTX
    if tuple(map(int, found.split(".")[:2])) < oldest:
        raise ImportError(
            f"Triton {found} is too old for {device_type}: expected {'.'.join(map(str, oldest))} or later"
        )
    kernels = importlib.import_module("bicm_kernels.triton_kernels")
    key = {"cpu": "CPU", "cuda": "CUDA", "xpu": "XPU"}.get(device_type)
    if key is None:
        raise ImportError(f"Triton kernels are not registered for {device_type}")
    if device_type not in registrations:
        library = torch.library.Library("bicm_kernels", "IMPL")
        for name, function in kernels.OPS.items():
            library.impl(name, function, key)
        registrations[device_type] = library
    return "Triton, interpreted" if interpreted() else "Triton"


def candidates(device_type: str) -> dict[str, Callable[[], str]]:
    """The loaders for a device type, best first."""
    native = {"cpu": native_cpu, "cuda": native_cuda}
    found: dict[str, Callable[[], str]] = {}
    if device_type in native:
        found["native"] = native[device_type]
    found["triton"] = lambda: triton(device_type)
    found["reference"] = lambda: "plain PyTorch, slow"
    return found


def unregister(devices: set[str]) -> None:
    """Remove Triton's kernels from devices."""
    for device_type in devices:
        torch_internals.unregister(registrations.pop(device_type))
