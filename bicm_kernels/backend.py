"""Which implementation runs, and why.

Three implementations give the same bits: ``native`` (C++ on the CPU, CUDA on NVIDIA GPUs), ``triton`` (any GPU that
Triton supports) and ``reference`` (plain PyTorch, slow). The environment variable ``BICM_KERNELS_BACKEND`` chooses:
``auto`` (the default) takes the first one available; any other name forces that one, and raises if it is missing.
``BICM_KERNELS_ISA`` (scalar, avx2, avx512, avx512bf16; on Arm scalar, neon) forces the CPU kernels' instruction set,
``BICM_KERNELS_KEPT_MEMORY`` bounds the memory that it keeps for results, in MiB (256; 0 keeps none), and
``BICM_KERNELS_GENERATOR`` selects what draws ``torch_randn``: ``native`` (the default: the native library where its
bits match torch's) or ``torch``. ``BICM_KERNELS_DIRECT=0`` sends every call through torch's dispatcher, ``cuda`` lets
plain calls on NVIDIA GPUs bypass it too; ``1``, the default, those on the CPU alone. They are read once, when the
package is imported.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bicm_kernels import generator_check, loaders

CHOICES = ("auto", "native", "triton", "reference")
DRAWERS = ("native", "torch")
#: Which plain calls bypass the dispatcher: none, those on the CPU, those on the CPU and on NVIDIA GPUs.
SWITCHES = ("0", "1", "cuda")

_choice = "auto"
#: Where the choice came from, for messages.
_chosen_by = "the backend auto"
_running: dict[str, tuple[str, str]] = {}
_starts = threading.RLock()
_drawer = "native"

#: Whether kernels run on CPU tensors, native or interpreted. Every call reads it first.
cpu_is_compiled = False

#: The native library's functions that bypass the dispatcher. They return None for every call that they do not support.
#: None where another implementation runs.
library: Any = None
#: The same for the ops, which try them first; None under ``BICM_KERNELS_DIRECT=0``.
direct: Any = None

#: The devices on which kernels run, as bits of DLPack's codes; a bit is set at the first call on that device.
kernel_devices = 0
_DLPACK = {"cpu": 1, "cuda": 2 if torch.version.hip is None else 10, "xpu": 14}

#: One of SWITCHES.
_switch = "1"
#: Whether the native library has the CUDA library's launchers: its functions take calls on GPUs too.
cuda_is_direct = False
#: How often that may have changed.
hand_overs = 0

_draws_like_torch: bool | None = None


def _functions() -> Any:
    library = importlib.import_module("bicm_kernels._C")
    return library if hasattr(library, "ddim_step") else None


def draws_like_torch() -> bool:
    """Whether the native library draws the numbers of torch's CPU generator; compared with torch once."""
    global _draws_like_torch
    if library is None or _drawer == "torch":
        return False
    if _draws_like_torch is None:
        _draws_like_torch = library.instruction_set() != "scalar" and generator_check.agree(library.generator_normal)
    return bool(_draws_like_torch)


def _hand_over_launchers() -> None:
    """Let calls on GPUs bypass the dispatcher where that is asked for and the native library runs; else not."""
    global cuda_is_direct, hand_overs
    functions: Any = sys.modules.get("bicm_kernels._C")
    if not hasattr(functions, "use_launchers"):
        return
    wanted = _switch == "cuda" and _running.get("cuda", ("",))[0] == "native" and library is not None
    if wanted or cuda_is_direct:
        # Implementations from Python on GPUs count from now on, or no longer.
        functions.know_implementations(-1)
        hand_overs += 1
        cuda_is_direct = bool(functions.use_launchers(loaders.launchers() if wanted else None))


def _start(device_type: str) -> tuple[str, str]:
    """Choose and load the implementation for a device."""
    if device_type == "meta":  # tensors without memory: what an op returns there is the same for every implementation
        return "native", "shapes and dtypes alone"
    failures: list[str] = []
    for name, prepare in loaders.candidates(device_type).items():
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
                stacklevel=7,
            )
        return name, "; ".join([what, *failures])
    raise ImportError(f"{_chosen_by} cannot run on {device_type}: {'; '.join(failures)}")


def _devices() -> list[str]:
    """The kinds of devices that torch has here and kernels run on, the CPU first."""
    modules = {name: getattr(torch, name, None) for name in ("cuda", "xpu")}
    return ["cpu", *(name for name, module in modules.items() if module is not None and module.is_available())]


def running(device_type: str) -> str:
    """The implementation that runs on a device type: ``native``, ``triton`` or ``reference``.

    >>> import bicm_kernels
    >>> bicm_kernels.backend.running("cpu") in ("native", "triton", "reference")
    True
    """
    if torch.compiler.is_dynamo_compiling():
        _begin(device_type)  # before the table is read, by which a graph is guarded
    found = _running.get(device_type)
    return (_begin(device_type) if found is None else found)[0]


def _begin(device_type: str) -> tuple[str, str]:
    """Start what runs on a device type, once, whichever thread asks first."""
    global kernel_devices
    with _starts:
        if device_type not in _running:
            _running[device_type] = _start(device_type)
            if _running[device_type][0] != "reference" and device_type in _DLPACK:
                kernel_devices |= 1 << _DLPACK[device_type]
            if device_type == "cuda":
                _hand_over_launchers()
        return _running[device_type]


# As by torch.compiler.assume_constant_result: a graph may be traced before the first call on its device.
_begin._dynamo_marked_constant = True  # type: ignore[attr-defined]


def describe() -> str:
    """Return which implementation runs on each device that torch has, and why, as text.

    >>> import bicm_kernels
    >>> bicm_kernels.backend.describe().startswith("cpu: ")
    True
    """
    return "\n".join(f"{device_type}: {_describe(device_type)}" for device_type in _devices())


def _describe(device_type: str) -> str:
    try:
        name = running(device_type)
    except ImportError as error:
        return f"nothing ({error})"
    what = _running[device_type][1]
    if device_type == "cuda" and name == "native" and _switch == "cuda":
        what += "; plain calls bypass the dispatcher" if cuda_is_direct else "; no call can bypass the dispatcher"
    if device_type == "cpu" and name == "native" and not draws_like_torch():
        what += "; torch_randn is torch.randn"
        what += " (BICM_KERNELS_GENERATOR=torch)" if _drawer == "torch" else ""
    return f"{name} ({what})"


def choose(name: str) -> None:
    """Set the implementation for all later calls: ``auto``, ``native``, ``triton`` or ``reference``.

    Raises ValueError for another name, ImportError where that implementation cannot run on the CPU. On a machine with a
    GPU ``triton`` has to run there alone, and ops on CPU tensors raise ImportError, unless ``TRITON_INTERPRET=1``.
    A choice that raises leaves the previous one in place.

    >>> import bicm_kernels
    >>> with bicm_kernels.backend.use("auto"):  # which is restored afterwards
    ...     bicm_kernels.backend.choose("reference")
    ...     bicm_kernels.backend.running("cpu")
    'reference'
    """
    _choose(name, f"the backend {name}")


def _choose(name: str, chosen_by: str) -> None:
    global _choice, _chosen_by, _running, cpu_is_compiled, library, direct, kernel_devices
    if name not in CHOICES:
        raise ValueError(f"the backend must be one of {', '.join(CHOICES)}, got {name!r}")
    before, registered = (_choice, _chosen_by, _running, kernel_devices), set(loaders.registrations)
    _choice, _chosen_by, _running, kernel_devices = name, chosen_by, {}, 0
    try:
        cpu_is_compiled, library = _make_ready()
        direct = library if _switch != "0" else None
        _hand_over_launchers()
    except BaseException:
        _choice, _chosen_by, _running, kernel_devices = before
        _hand_over_launchers()
        loaders.unregister(loaders.registrations.keys() - registered)
        raise
    stays = {device for device, (runs, _) in _running.items() if runs == "triton"}
    loaders.unregister(loaders.registrations.keys() - stays)


def _make_ready() -> tuple[bool, Any]:
    """Load what the choice needs; returns the values of `cpu_is_compiled` and `library`."""
    gpus = _devices()[1:] if _choice == "triton" and not loaders.interpreted() else []
    for device_type in gpus:
        running(device_type)
    if gpus:
        return False, None
    name = running("cpu")
    return name in ("native", "triton"), _functions() if name == "native" else None


def release_memory() -> int:
    """Return the memory kept for large CPU results to the system; returns the number of bytes.

    CPU results of 64 KiB and more come from a free list, which avoids page faults: the C library would map and
    fault such blocks in every step. It holds at most 256 MiB, or ``BICM_KERNELS_KEPT_MEMORY`` MiB: with 0 nothing is
    kept, and torch allocates every result, as it does those larger than the limit; so does a library built for the
    address sanitizer. Results in use are not affected.

    >>> import bicm_kernels
    >>> bicm_kernels.backend.release_memory() >= 0
    True
    """
    library = sys.modules.get("bicm_kernels._C")
    return 0 if library is None else int(library.release_memory())


@contextmanager
def use(name: str) -> Iterator[None]:
    """Choose an implementation for the length of a ``with`` block.

    >>> import bicm_kernels, torch
    >>> with bicm_kernels.backend.use("reference"):
    ...     noise = bicm_kernels.normal((1, 2), seed=0)
    """
    before = _choice, _chosen_by
    choose(name)
    try:
        yield
    finally:
        _choose(*before)


def _mebibytes(name: str, default: int) -> int:
    """The value of an environment variable in MiB, as bytes."""
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(f"{name}: expected a whole number of MiB, got {text!r}")
    return min(int(text), 2**40) << 20


def start() -> None:
    """Read the environment at import, after the schemas are defined, and apply its choice."""
    global _drawer, _switch
    loaders.kept_bytes = _mebibytes("BICM_KERNELS_KEPT_MEMORY", 256)
    _drawer = os.environ.get("BICM_KERNELS_GENERATOR", "native")
    if _drawer not in DRAWERS:
        raise ValueError(f"BICM_KERNELS_GENERATOR: expected {' or '.join(DRAWERS)}, got {_drawer!r}")
    _switch = os.environ.get("BICM_KERNELS_DIRECT", "1")
    if _switch not in SWITCHES:
        raise ValueError(f"BICM_KERNELS_DIRECT: expected 0, 1 or cuda, got {_switch!r}")
    name = os.environ.get("BICM_KERNELS_BACKEND", "auto")
    if name not in CHOICES:
        raise ValueError(f"BICM_KERNELS_BACKEND: the backend must be one of {', '.join(CHOICES)}, got {name!r}")
    _choose(name, f"BICM_KERNELS_BACKEND={name}")
