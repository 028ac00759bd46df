"""Which GPUs the CUDA library may run on, by what it was built for."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch

from bicm_kernels import loaders
from bicm_kernels.architectures import Capability, refused, runs_on

WHEEL = "80-real 90-real 100-real 120"


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        (WHEEL, (7, 5), False),
        (WHEEL, (8, 0), True),
        (WHEEL, (8, 9), True),
        (WHEEL, (9, 0), True),
        (WHEEL, (10, 3), True),
        (WHEEL, (11, 0), False),  # later than 100-real's, and earlier than the only PTX
        (WHEEL, (12, 1), True),
        ("90", (8, 0), False),
        ("90", (12, 0), True),
        ("86", (8, 0), False),
        ("80", (8, 6), True),
        ("80", (9, 0), False),  # PTX whose kernels of clusters are empty
        ("80-virtual", (8, 9), True),
        ("90a-real", (9, 0), True),
        ("90a", (10, 0), False),
        ("80-real 90-real", (10, 0), False),
        ("100f-real", (10, 3), True),
        ("100f", (12, 0), False),
        ("native", (9, 0), True),
    ],
)
def test_what_has_code(built: str, capability: Capability, runs: bool) -> None:
    assert runs_on(built, capability) == runs


def test_one_gpu_without_code_does_not_stop_the_others_unless_it_were_wrong() -> None:
    assert refused(WHEEL, [(8, 0), (7, 5)]) == "" == refused(WHEEL, [])
    assert "was built for 80, not for sm_90" in refused("80", [(8, 0), (9, 0)])
    assert "not for sm_75" in refused(WHEEL, [(7, 5)])


@pytest.mark.parametrize(
    ("built", "message"), [("80", 'for 80, not for sm_90: .*BICM_CUDA_ARCH_LIST="90"'), ("90", "")]
)
def test_a_library_without_code_for_the_gpu_is_none(built: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def architectures() -> bytes:
        return built.encode()

    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(ctypes, "CDLL", lambda path: SimpleNamespace(bicm_kernels_architectures=architectures))
    monkeypatch.setattr(loaders, "_CUDA_LIBRARY", SimpleNamespace(exists=lambda: True))
    if not message:
        assert loaders.native_cuda() == "CUDA C++"
        return
    with pytest.raises(ImportError, match=message):
        loaders.native_cuda()
