"""Comparing tensors bit by bit."""

from collections.abc import Sequence

import torch
from torch import Tensor

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def steps(actual: Tensor, expected: Tensor) -> int:
    """How many representable numbers lie between two tensors at most."""

    def ordered(x: Tensor) -> Tensor:
        width = 8 * x.element_size()
        bits = x.contiguous().view(INTEGERS[x.element_size()]).long()
        return torch.where(bits < 0, -(2 ** (width - 1)) - bits, bits)

    return int((ordered(actual) - ordered(expected)).abs().max()) if actual.numel() else 0


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """The same dtype, layout and bits, any NaN for a NaN.

    The interpreter truncates to bfloat16: there, one step is allowed.
    """
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.stride() == expected.stride()
    nan = torch.isnan(expected)
    assert torch.equal(torch.isnan(actual), nan)
    if actual.dtype == torch.bfloat16:
        assert steps(actual.nan_to_num(), expected.nan_to_num()) <= 1
        return
    integer = INTEGERS[actual.element_size()]
    zero = torch.zeros((), dtype=actual.dtype)
    actual, expected = (torch.where(nan, zero, x).contiguous().view(integer) for x in (actual, expected))
    assert torch.equal(actual, expected)


def random(shape: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Some numbers, some of them zeros of either sign."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    flat = x.view(-1)
    flat[:: max(1, flat.numel() // 3)] = 0.0
    flat[1 :: max(1, flat.numel() // 2)] = -0.0
    return x.to(dtype)
