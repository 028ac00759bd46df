"""GPUs that are not there, for calls that bypass the dispatcher: memory of the CPU, which an exporter says lies on one.

To be installed before ``bicm_kernels`` is imported, in a process of its own. The native library is handed the CPU's
kernels as launchers. Tensors stay what they are for torch, so that a call that is not taken gets its result from the
dispatcher all the same.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GPUS = 2
#: Bytes of a GPU, each of whose tensors begins at a multiple of the other.
MEMORY, ALIGNED = 32 << 20, 512
EXCHANGE, LAUNCHERS = b"dlpack_exchange_api", b"bicm_kernels.Launchers"
#: Words of DLPack's table and the place of `look_into` in it, as csrc/torch/torch_abi.h has them.
WORDS, LOOK_INTO = 7, 5

_INDEX, _WORD = ctypes.c_int32, ctypes.c_void_p
#: The fields of csrc/cuda/launchers.h after the first two, and how many pointers each takes before the device's index.
FIELDS = {
    "noise": 1,
    "noisy_pair": 1,
    "multistep": 1,
    "reversible": 1,
    "fixed_point_decode": 1,
    "gaussian_scratch": -1,
    "gaussian": 2,
    "pseudo_huber_scratch": -1,
    "pseudo_huber": 3,
    "pseudo_huber_with_gradient": 3,
    "pseudo_huber_gradient": 1,
    "scale_gradient": 1,
}


def type_of(pointers: int) -> Any:
    """The type of a launcher; of a function that says how much scratch memory one needs for -1."""
    if pointers < 0:
        return ctypes.CFUNCTYPE(ctypes.c_int64, _WORD)
    return ctypes.CFUNCTYPE(_INDEX, *[_WORD] * pointers, _INDEX)


class Table(ctypes.Structure):
    """Launchers, as the native library is handed them."""

    _fields_ = (
        ("version", ctypes.c_uint64),
        ("current_device", ctypes.CFUNCTYPE(_INDEX)),
        *((name, type_of(pointers)) for name, pointers in FIELDS.items()),
    )


def capsule_of(address: int, name: bytes) -> object:
    """A capsule of an address, whose name is kept by the caller."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (_WORD, ctypes.c_char_p, _WORD)
    return new(address, name, None)


def address_in(capsule: object, name: bytes) -> int:
    """The address in a capsule."""
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = _WORD, (ctypes.py_object, ctypes.c_char_p)
    return int(get(capsule, name))


class FakeGpus:
    """The installed GPUs: their memory, what was asked of them, and what fails."""

    def __init__(self, directory: Path) -> None:
        self.current = 0
        self.fails: set[str] = set()
        self.launched: list[tuple[str, int]] = []
        self.memory = [torch.zeros(MEMORY + ALIGNED, dtype=torch.uint8) for _ in range(GPUS)]
        self.used = [-x.data_ptr() % ALIGNED for x in self.memory]
        source = Path(__file__).with_suffix(".c")
        path = directory / "fake_gpu.so"
        command = [os.environ.get("CC", "cc"), "-O2", "-shared", "-fPIC", str(source), "-o", str(path)]
        subprocess.run(command, check=True)
        self.library = ctypes.CDLL(str(path))
        self.library.set_memory.argtypes = (ctypes.c_int, ctypes.c_size_t, ctypes.c_size_t)
        for gpu, x in enumerate(self.memory):
            self.library.set_memory(gpu, x.data_ptr(), x.numel())
        self.wrap_exporter()
        torch._C._dynamo.guards._empty_strided_cuda = self.empty  # type: ignore[attr-defined]
        self.theirs, torch.empty_like = torch.empty_like, self.empty_like  # type: ignore[assignment]

    def wrap_exporter(self) -> None:
        """Put the exporter in the place of torch's."""
        theirs = address_in(torch.Tensor.__dlpack_c_exchange_api__, EXCHANGE)
        self.table = (ctypes.c_size_t * WORDS).from_buffer_copy(ctypes.string_at(theirs, 8 * WORDS))
        self.library.wrap(_WORD(self.table[LOOK_INTO]))
        self.table[LOOK_INTO] = ctypes.cast(self.library.look_into, _WORD).value or 0
        capsule = capsule_of(ctypes.addressof(self.table), EXCHANGE)
        torch.Tensor.__dlpack_c_exchange_api__ = capsule

    def room(self, elements: int, dtype: torch.dtype, gpu: int) -> Tensor:
        """Unused memory of a GPU."""
        begin, count = self.used[gpu], elements * dtype.itemsize
        if begin + count > MEMORY:
            raise torch.OutOfMemoryError(f"GPU {gpu} has no {count} bytes left")
        self.used[gpu] += -(-count // ALIGNED) * ALIGNED
        return self.memory[gpu][begin : begin + count].view(dtype)

    def empty(self, sizes: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
        """What torch's own function does: a tensor on the current GPU."""
        if "allocation" in self.fails:
            raise torch.OutOfMemoryError("no memory is left")
        span = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        return self.room(span, dtype, self.current).as_strided(sizes, strides)

    def empty_like(self, x: Tensor, **options: Any) -> Tensor:
        """Where the other tensor lies."""
        made: Tensor = self.theirs(x, **options)
        return made if self.lies_on(x) < 0 else self.put(made, self.lies_on(x))

    def put(self, x: Tensor, gpu: int = 0) -> Tensor:
        """A tensor with its strides on a GPU."""
        if not x.numel():
            return x
        span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        base = self.room(span, x.dtype, gpu)
        base.copy_(x.detach().as_strided((span,), (1,)))
        return base.as_strided(x.shape, x.stride())

    def lies_on(self, x: Tensor) -> int:
        """The GPU on which a tensor lies, -1 for the CPU."""
        inside = [0 <= x.data_ptr() - y.data_ptr() < y.numel() for y in self.memory]
        return inside.index(True) if True in inside else -1

    def clear(self) -> None:
        """Forget all tensors and launches."""
        self.launched.clear()
        self.fails.clear()
        self.used, self.current = [-x.data_ptr() % ALIGNED for x in self.memory], 0

    def nothing(self) -> object:
        """Launchers that do nothing, for counts of what calls cost: from now on all memory is GPU 0's."""
        from bicm_kernels import backend

        torch.empty_like = self.theirs
        self.library.set_all(1)
        own = Table.from_buffer_copy(Table.from_address(address_in(backend.library.host_launchers(), LAUNCHERS)))
        fields: Any = Table._fields_[1:]
        for name, kind in fields:
            does = "launch_nothing" if FIELDS.get(name, -1) > 0 else name if name == "current_device" else "scratch"
            setattr(own, name, ctypes.cast(getattr(self.library, does), kind))
        self.own = own
        return capsule_of(ctypes.addressof(own), LAUNCHERS)

    def launchers(self, version: int = 0) -> object:
        """The CPU's kernels as launchers of the GPUs, which note the launches."""
        from bicm_kernels import backend

        torch.empty_like = self.theirs  # the library has found the other one
        host = Table.from_address(address_in(backend.library.host_launchers(), LAUNCHERS))

        def noted(name: str, pointers: int) -> Callable[..., int]:
            run = getattr(host, name)

            def launch(*given: int) -> int:
                if pointers >= 0:
                    self.launched.append((name, given[-1]))
                    times = sum(launched == name for launched, _ in self.launched)
                    if name in self.fails or (times == 2 and f"{name}, second" in self.fails):
                        return 1
                return int(run(*given))

            return launch

        own = Table(host.version + version, Table._fields_[1][1](lambda: self.current))
        for name, pointers in FIELDS.items():
            setattr(own, name, type_of(pointers)(noted(name, pointers)))
        self.own = own
        return capsule_of(ctypes.addressof(own), LAUNCHERS)
