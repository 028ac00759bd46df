"""Whole loops on a GPU: the CPU's bits, exact inversion, captured, compiled, and without waiting."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from loops import EXACT, FLOATS, ROUND_TRIPS, opened
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::bicm_diffusion.InexactInversionWarning")]

SameBits = Callable[[Tensor, Tensor], None]
LOOPS = FLOATS | EXACT


def start(device: str = "cuda") -> Tensor:
    """Noise that integers of 32 fractional bits hold to the bit."""
    noise = torch.randn(3, 4, 24, 24, generator=torch.Generator().manual_seed(0))
    return (torch.round(noise * 2**20) / 2**20).to(device)


@pytest.mark.parametrize("name", LOOPS)
def test_the_bits_of_the_cpu(gpu_backend: str, same_bits: SameBits, name: str) -> None:
    results = opened(LOOPS[name](start()))
    for actual, expected in zip(results, opened(LOOPS[name](start("cpu"))), strict=True):
        assert actual.is_cuda
        same_bits(actual.cpu(), expected)


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_every_bit_returns(gpu_backend: str, same_bits: SameBits, name: str) -> None:
    there, back = ROUND_TRIPS[name]
    pair = back(there(start()))
    same_bits(pair.z, start())
    assert not pair.info.any()


@pytest.mark.parametrize("name", FLOATS)
def test_nothing_waits(gpu_backend: str, name: str, request: pytest.FixtureRequest) -> None:
    z = start()
    FLOATS[name](z)
    request.getfixturevalue("no_synchronisation")
    FLOATS[name](z)


@pytest.mark.parametrize("name", LOOPS)
def test_captured(gpu_backend: str, same_bits: SameBits, name: str) -> None:
    z = start()
    expected = [x.clone() for x in opened(LOOPS[name](z))]
    other = start().flip(0)
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
    for actual, expected in zip(opened(fast(start())), opened(LOOPS[name](start())), strict=True):
        same_bits(actual.cpu(), expected.cpu())
