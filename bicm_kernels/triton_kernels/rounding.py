"""Products that wrap around, and quotients and roots that are correctly rounded in float32 and in float64."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

#: Before 3.6, Triton's own quotients and roots of float32 flush subnormal numbers to zero where they are compiled, and
#: products that may overflow fail under TRITON_DEBUG.
OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6)

if OLD and not triton.knobs.runtime.interpret:

    @triton.jit
    def float32_quotient(a, b):
        return tl.inline_asm_elementwise("div.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, is_pure=True, pack=1)

    @triton.jit
    def float32_root(x):
        return tl.inline_asm_elementwise("sqrt.rn.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)

else:

    @triton.jit
    def float32_quotient(a, b):
        return tl.div_rn(a, b)

    @triton.jit
    def float32_root(x):
        return tl.sqrt_rn(x)


if OLD:

    @triton.jit
    def wrapping_product(a, b):
        return a * b

else:

    @triton.jit
    def wrapping_product(a, b):
        return tl.mul(a, b, sanitize_overflow=False)


@triton.jit
def divide(a, b):
    """The correctly rounded quotient."""
    if a.dtype == tl.float64:
        quotient = a / b
    else:
        quotient = float32_quotient(a, b)
    return quotient


@triton.jit
def root(x):
    """The correctly rounded root."""
    if x.dtype == tl.float64:
        result = tl.sqrt(x)
    else:
        result = float32_root(x)
    return result
