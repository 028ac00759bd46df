"""Checks of when the native library gets the CUDA library's launchers, on GPUs that are not there; see `gpu_checks`."""

from __future__ import annotations

import warnings

import pytest
import torch

import bicm_kernels as bk
from benchmarks.fake_gpu import FakeGpus
from bicm_kernels import backend, loaders
from tests.support.gpu_checks import OTHER, check


@check
def implementations_from_python(gpus: FakeGpus) -> None:
    """One on GPUs replaces ours from the hand-over on, not before: until then it is Triton's."""
    x = torch.ones(2, 3)
    with torch.library._scoped_library("bicm_kernels", "IMPL") as library, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.impl("ddim_step", lambda tensors, *rest: torch.full_like(tensors[0], 7.0), "CUDA")
        bk.ddim_step(x, x, a=0.9, b=0.1)
        assert backend.library.ddim_step((x, x), (0.9, 0.1), None) is not None
        handed_over(gpus)
        bk.ddim_step(gpus.put(x), gpus.put(x), a=0.9, b=0.1)
        assert gpus.launched == []
    bk.ddim_step(gpus.put(x), gpus.put(x), a=0.9, b=0.1)
    assert gpus.launched == [("multistep", 0)]


def handed_over(gpus: FakeGpus) -> None:
    """As at the first call on a GPU."""
    backend._switch = "cuda"
    loaders.launchers = gpus.launchers  # type: ignore[assignment]
    loaders.native_cuda = lambda: "CUDA C++"
    assert backend.running("cuda") == "native"


@check
def the_backend_hands_over(gpus: FakeGpus) -> None:
    """Where the switch says so, as long as the native library runs on GPUs."""
    x = torch.ones(2, 3)

    def is_taken() -> bool:
        gpus.clear()
        on_gpu = gpus.put(x)
        bk.ddim_step(on_gpu, on_gpu, a=0.9, b=0.1)
        return bool(gpus.launched)

    assert not is_taken()
    assert backend.running("cpu") == "native"
    for switch in ("0", "1"):
        backend._switch = switch
        loaders.launchers = gpus.launchers  # type: ignore[assignment]
        loaders.native_cuda = lambda: "CUDA C++"
        backend._running.pop("cuda", None)
        backend.running("cuda")
        assert not (is_taken() or backend.cuda_is_direct)
    backend._running.pop("cuda")
    handed_over(gpus)
    assert backend.cuda_is_direct
    assert is_taken()
    assert "bypass the dispatcher" in backend._describe("cuda")
    with backend.use("reference"):
        assert not (is_taken() or backend.cuda_is_direct)
    assert not is_taken()  # until the first call that finds out what runs there
    backend.running("cuda")
    assert is_taken()
    with pytest.raises(ValueError, match="no backend"):
        backend.choose("no backend")
    assert is_taken()


@check
def launchers_of_another_version(gpus: FakeGpus) -> None:
    assert not backend.library.use_launchers(gpus.launchers(version=1))
    loaders.launchers = lambda: gpus.launchers(version=1)
    backend._switch = "cuda"
    loaders.native_cuda = lambda: "CUDA C++"
    backend.running("cuda")
    x = gpus.put(torch.ones(2, 3))
    assert torch.equal(bk.ddim_step(x, x, a=0.5, b=1.0), 1.5 * x)
    assert gpus.launched == []
    assert "no call can bypass" in backend._describe("cuda")
    for wrong in (3, "no capsule"):
        with pytest.raises(ValueError, match="Capsule"):
            backend.library.use_launchers(wrong)


@check
def torch_makes_nothing_on_gpus(gpus: FakeGpus) -> None:
    """As a torch without CUDA, whose function raises."""
    gpus.fails = {"allocation"}
    assert not backend.library.use_launchers(gpus.launchers())
    gpus.clear()
    gpus.current = OTHER
    x = gpus.put(torch.ones(2, 3))
    bk.ddim_step(x, x, a=0.9, b=0.1)
    assert gpus.launched == []
