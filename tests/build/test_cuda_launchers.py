"""The CUDA library's launchers as calls past the dispatcher use them, without CUDA: device, stream, capture, errors."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import ctypes, os, subprocess, sys
from pathlib import Path
import torch
from benchmarks.fake_gpu import FakeGpus

def built(name, *source):
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O1", *source, f"-Wl,-soname,{name}", "-o", name]
    subprocess.run(command, check=True)
    return ctypes.CDLL(os.path.abspath(name), mode=ctypes.RTLD_GLOBAL)

# The loader finds a loaded library by its soname.
cuda = built("libtorch_cuda.so", SOURCE)
built(RUNTIME, "-x", "c", os.devnull)
cuda.stream_of_launch.restype = ctypes.c_size_t
gpus = FakeGpus(Path.cwd())
import bicm_kernels as bk
from bicm_kernels import backend
from bicm_kernels.ops.noise import NORMAL

def move(device):
    cuda.set_current(device)
    gpus.current = device

assert backend.running("cuda") == "native"
assert backend.cuda_is_direct, backend._describe("cuda")
x = torch.ones(2, 3)
bk.scale_input(x, 0.5)  # looks for implementations

STEPS = {
    "multistep": lambda x: bk.ddim_step(x, x, a=0.5, b=0.5),
    "noisy_pair": lambda x: bk.noisy_pair(x, 0.5, 1.0, seed=1, step=0),
    "reversible": lambda x: bk.fixed_point_encode(x),
    "gaussian": lambda x: bk.gaussian_step([x], [0.5], std=0.3, seed=1),
    "noise": lambda x: NORMAL.call(x, 1, 0, 0),
}
for name, step in STEPS.items():
    for device in (0, 1):
        move(device)
        gpus.used = [0, 0]
        before = cuda.launches()
        step(gpus.put(x, device))
        assert cuda.launches() == before + 1, name
        assert (cuda.device_of_launch(), cuda.stream_of_launch()) == (device, 1000 * (device + 1)), name
        assert (cuda.current(), cuda.guards()) == (device, 0)

# In place on another device than the current one: on that one's stream.
move(0)
STEPS["noise"](gpus.put(x, 1))
assert (cuda.device_of_launch(), cuda.stream_of_launch(), cuda.current(), cuda.guards()) == (1, 2000, 0, 0)

# A step that has a result is not launched there.
before = cuda.launches()
STEPS["multistep"](gpus.put(x, 1))
assert cuda.launches() == before

# What cannot be launched is left to the dispatcher, which runs on the CPU here.
y = gpus.put(x)
cuda.set_fails(1)
assert torch.equal(STEPS["multistep"](y), x)
assert (cuda.launches(), cuda.current(), cuda.guards()) == (before, 0, 0)
cuda.set_fails(0)
STEPS["multistep"](y)
assert cuda.launches() == before + 1

# A counter is kept for a stream, and cleared by the first launch that needs it; a captured launch clears its own.
wide = gpus.put(torch.ones(2, 40_003))
counted = []
for capturing in (0, 0, 1, 1, 0):
    cuda.set_capturing(capturing)
    before = cuda.memsets()
    bk.pseudo_huber(wide, wide)
    counted.append(cuda.memsets() - before)
assert counted == [1, 0, 1, 1, 0], counted
"""


def runtime_of(library: Path) -> str | None:
    """The soname of CUDA's runtime that the library needs."""
    found = [part for part in library.read_bytes().split(b"\0") if part.startswith(b"libcudart.so")]
    return found[0].decode() if found else None


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler")
def test_devices_streams_captures_and_errors(python: Callable[..., Any]) -> None:
    library = ROOT / "bicm_kernels" / "_C_cuda.so"
    if not library.exists():
        pytest.skip("the CUDA library was not built")
    source = ROOT / "tests" / "support" / "fake_cuda.c"
    program = f"SOURCE, RUNTIME = {str(source)!r}, {runtime_of(library)!r}\n{PROGRAM}"
    python(program, BICM_KERNELS_BACKEND="native", BICM_KERNELS_DIRECT="cuda")
