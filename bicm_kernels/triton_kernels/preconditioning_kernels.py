"""The weights of a sample and a network's output: csrc/core/preconditioning.h in Triton, in the same order."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from bicm_kernels.triton_kernels.rounding import divide, root


@triton.jit
def c_in(t, sigma_data):
    """1 / sqrt(sigma_data^2 + t^2)."""
    return divide(tl.full(t.shape, 1.0, t.dtype), root(sigma_data * sigma_data + t * t))


@triton.jit
def bcm(t, u, sigma_data, SCALED: tl.constexpr):
    """(c_skip, c_out) from t to u (BCM eq. 20, 39, 43); SCALED: of c_in(t) x."""
    variance = sigma_data * sigma_data
    s = variance + t * t
    r = root(s)
    divisor = s
    if SCALED:
        divisor = r
    return divide(variance + t * u, divisor), divide(sigma_data * (t - u), r)


@triton.jit
def cm(t, sigma_min, sigma_data, SCALED: tl.constexpr):
    """(c_skip, c_out) from t to sigma_min (BCM eq. 17); SCALED: of c_in(t) x."""
    variance = sigma_data * sigma_data
    r = root(variance + t * t)
    d = t - sigma_min
    above = variance
    if SCALED:
        above = variance * r
    return divide(above, variance + d * d), divide(sigma_data * d, r)
