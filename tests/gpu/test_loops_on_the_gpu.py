"""Whole loops on a GPU: the CPU's bits, exact inversion, captured, compiled, and without waiting."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from loops import FLOATS, LOOPS, ROUND_TRIPS, opened, start
from torch import Tensor

from bicm_kernels import backend

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::bicm_diffusion.InexactInversionWarning")]

SameBits = Callable[[Tensor, Tensor], None]


@pytest.mark.parametrize("name", LOOPS)
def test_the_bits_of_the_cpu(gpu_backend: str, same_bits: SameBits, name: str) -> None:
    results = opened(LOOPS[name](start("cuda")))
    with backend.use("native"):  # Triton, where it is forced, has no kernels for the CPU
        there = opened(LOOPS[name](start("cpu")))
    for actual, expected in zip(results, there, strict=True):
        assert actual.is_cuda
        same_bits(actual.cpu(), expected)


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_every_bit_returns(gpu_backend: str, same_bits: SameBits, name: str) -> None:
    there, back = ROUND_TRIPS[name]
    pair = back(there(start("cuda")))
    same_bits(pair.z, start("cuda"))
    assert not pair.info.any()


@pytest.mark.parametrize("name", FLOATS)
def test_nothing_waits(gpu_backend: str, name: str, request: pytest.FixtureRequest) -> None:
    z = start("cuda")
    FLOATS[name](z)
    request.getfixturevalue("no_synchronisation")
    FLOATS[name](z)


@pytest.mark.parametrize("name", LOOPS)
def test_captured(gpu_backend: str, same_bits: SameBits, name: str) -> None:
    z = start("cuda")
    expected = [x.clone() for x in opened(LOOPS[name](z))]
    other = start("cuda").flip(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = opened(LOOPS[name](other))
    other.copy_(z)
    graph.replay()
    for actual, wanted in zip(captured, expected, strict=True):
        same_bits(actual.cpu(), wanted.cpu())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddim_sample", "bdia_sample floats", "bdia_sample", "edict_sample"])
def test_compiled(gpu_backend: str, same_bits: SameBits, name: str) -> None:
    torch.compiler.reset()
    fast = torch.compile(LOOPS[name], fullgraph=True)
    for actual, expected in zip(opened(fast(start("cuda"))), opened(LOOPS[name](start("cuda"))), strict=True):
        same_bits(actual.cpu(), expected.cpu())
