"""Results of some MiB, which are written with non-temporal stores or not: the bits of their samples alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.support import calls

Bits = Callable[[Tensor, Tensor], None]
# float32 results of 9 MB and halves of 4.5 MB are on both sides of the limits in csrc/torch/tensors.cpp; those of one
# sample, 560 kB, are below all of them.
B, N = 16, 140_001
DIFFERENTIATED = ("pseudo_huber", "consistency_loss", "gaussian_log_prob", "gaussian_kl")


@pytest.fixture(params=[1, 2], ids=lambda count: f"{count}-threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def enlarged(name: str, call: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A call of the table with B samples of N elements."""
    drawn = torch.Generator().manual_seed(0)

    def enlarge(_: str, x: Tensor) -> Tensor:
        if x.dim() < 2:
            return x.repeat(6)[:B] if x.dim() == 1 else x
        if x.is_floating_point():
            return torch.randn(B, N, generator=drawn).to(dtype)
        return torch.randint(-(2**40), 2**40, (B, N), generator=drawn) if x.any() else x.new_zeros(B, N)

    call = calls.changed({key: value for key, value in call.items() if key != "out"}, enlarge)
    parameters = inspect.signature(calls.op_of(name)).parameters
    if "kind" in parameters:  # a density is one number per sample anyway
        call["reduction"] = "none"
    if "shape" in parameters:
        call |= {"shape": (B, N), "dtype": dtype}
    return call


def sample(call: dict[str, Any], b: int) -> dict[str, Any]:
    """The call with sample b alone."""
    shape = {"shape": (1, N)} if "shape" in call else {}
    return calls.changed(call, lambda _, x: x[b : b + 1].detach() if x.dim() else x) | shape


def results(name: str, call: dict[str, Any]) -> list[Tensor]:
    """Results and, for densities and losses, the gradients of their sum."""
    if name not in DIFFERENTIATED:
        return calls.opened(calls.op_of(name)(**call))
    call = calls.changed(call, lambda _, x: x.requires_grad_() if x.dim() == 2 and x.is_floating_point() else x)
    value = calls.op_of(name)(**call)
    inputs = [x for x in tree_leaves(call) if isinstance(x, Tensor) and x.requires_grad]
    return [value, *torch.autograd.grad(value.sum(), inputs)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "k"), [case for case in calls.EVERY if case[0] not in (*calls.WITHOUT, "fold_in")])
def test_samples_of_large_results(name: str, k: int, dtype: torch.dtype, threads: int, same_bits: Bits) -> None:
    call = enlarged(name, calls.CALLS[name][k], dtype)
    together = results(name, call)
    for b in (0, 7, B - 1):
        for whole, alone in zip(together, results(name, sample(call, b)), strict=True):
            same_bits(whole[b : b + 1], alone)
