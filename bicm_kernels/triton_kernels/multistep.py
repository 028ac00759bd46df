"""Sampler updates: one kernel for an affine map of a few tensors plus keyed noise, and the ops that choose its weights."""

# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bicm_kernels.triton_kernels.checks import (
    check_key,
    check_number,
    check_output,
    check_states,
    require,
)
from bicm_kernels.triton_kernels.keys import (
    NO_KEY,
    Argument,
    Integer,
    Number,
    make_key,
    number,
    number_argument,
)
from bicm_kernels.triton_kernels.noise import draw
from bicm_kernels.triton_kernels.operands import lay_out, load, locate, store


@triton.jit
def divide(a, b):
    """The correctly rounded quotient."""
    if a.dtype == tl.float64:
        quotient = a / b
    else:
        quotient = tl.div_rn(a, b)
    return quotient


@triton.jit
def weight(k: tl.constexpr, coefficients, sample, present, FORM: tl.constexpr, COMPUTE: tl.constexpr):
    """Weight k of the map. The order of operations is part of the contract."""
    if FORM == "affine":
        return number(coefficients[k], sample, present, COMPUTE)
    a = number(coefficients[0], sample, present, COMPUTE)
    b = number(coefficients[1], sample, present, COMPUTE)
    a_last = number(coefficients[2], sample, present, COMPUTE)
    b_last = number(coefficients[3], sample, present, COMPUTE)
    gamma = number(coefficients[4], sample, present, COMPUTE)
    one = tl.full(sample.shape, 1.0, COMPUTE)
    if FORM == "bdia":  # BDIA eq. 24
        if k == 0:
            result = gamma
        elif k == 1:
            result = a - divide(gamma, a_last)
        else:
            result = b + gamma * divide(b_last, a_last)
    else:  # BDIA eq. 28
        if k == 0:
            result = divide(one, gamma)
        elif k == 1:
            result = divide(one, a_last) - divide(a, gamma)
        else:
            result = -(divide(b, gamma) + divide(b_last, a_last))
    return result
