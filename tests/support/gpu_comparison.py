"""What a GPU's results are compared with the CPU's for, and by what: every backend adds up in an order of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.support.calls import EVERY

#: By a half's dtype, a step of its numbers in relation to the power of two below them, and its smallest normal number:
#: all smaller numbers are as far apart as those above it.
HALVES = {torch.float16: (2.0**-10, 2.0**-14), torch.bfloat16: (2.0**-7, 2.0**-126)}

#: Ops that add up, and how many of their results come before the sums: those have the same bits everywhere.
SUMS = {"pseudo_huber": 0, "consistency_loss": 0, "gaussian_step": 1, "gaussian_log_prob": 0, "gaussian_kl": 0}

#: The calls of tests/support/calls.py that are on a GPU where their numbers are on the CPU: not those of `fold_in`, of
#: which nothing is left there.
WITH_NUMBERS = [(name, k) for name, k in EVERY if name != "fold_in"]


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    """Assert that no element is further off than a part of the largest one, halves than a step of theirs more."""
    assert (actual.dtype.is_floating_point, actual.shape) == (expected.dtype.is_floating_point, expected.shape)
    step, normal = HALVES.get(actual.dtype, (0.0, 0.0))
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan), "NaNs stand elsewhere"
    actual, expected = actual[~nan].double(), expected[~nan].double()
    if expected.numel() == 0:
        return
    error, scale = (actual - expected).abs(), expected.abs().max()
    excess = error - (tolerance * scale + step * expected.abs().clamp(min=normal))
    assert bool((excess <= 0).all()), f"{int((excess > 0).sum())} of {excess.numel()} too far, by {excess.max():.3g}"
