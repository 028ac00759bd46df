"""Pseudo-Huber losses in PyTorch.

The residual is formed in the compute type. Sums over a sample, and everything that exists once per sample, are float64;
the loss is rounded once to the compute type.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bicm_kernels.reference.arithmetic import compute_dtype, per_sample, root
from bicm_kernels.reference.preconditioning import c_skip_c_out

Number = float | Tensor


#: Magnitudes of float32 numbers whose squares, and sums of two, are normal; of float64, with room for long sums.
_LEAST, _MOST = {torch.float32: 2.0**-63, torch.float64: 2.0**-300}, {torch.float32: 2.0**63, torch.float64: 2.0**300}


def distance(s: Tensor, c: Tensor) -> Tensor:
    """sqrt(s + c^2) - c as s / (sqrt(s + c^2) + c); 0, and so is its derivative, at s = c = 0; infinite where s is."""
    square = s + c * c
    zero, infinite = square == 0, s.isinf()
    length = root(torch.where(zero, 1.0, square))
    quotient = torch.where(infinite, 0.0, s) / (length + c)
    return torch.where(zero, 0.0, torch.where(infinite, length - c, quotient))


def _power(size: Tensor, exponent: int) -> Tensor:
    """1; for float64 numbers that are small, a power of two to multiply them by; for large ones its inverse."""
    power = torch.where(size < _LEAST[size.dtype], 2.0**exponent, torch.ones_like(size))
    return torch.where(size > _MOST[size.dtype], 2.0**-exponent, power)


def _float64_distances(r: Tensor, c: Tensor, vector: bool) -> Tensor:
    """``distance`` of every row of residuals (B, d) in float64, as (B, 1), or of every residual.

    Where squares may overflow or underflow it is the sum of r_i (r_i / (sqrt(s + c^2) + c)), with powers of two that
    keep every factor in range.
    """

    def add(x: Tensor) -> Tensor:
        return x.sum(1, keepdim=True) if vector else x

    size = r.detach().abs()
    if vector:
        size = size.amax(1, keepdim=True)
    # The first for squares; the second so that an upstream gradient times a residual is in range, too; the third so
    # that small terms keep their digits until they are added up.
    power, outer = _power(torch.maximum(size, c.detach()), 600), _power(size, 100)
    lifted = torch.where(outer > 1, 2.0**200, torch.ones_like(outer))
    infinite, plain = size.isinf(), (power == 1) & (outer == 1)
    x, y = r * power, c * power
    s = add(x * x)
    square = s + y * y
    zero = square == 0
    length = root(torch.where(zero, 1.0, square))
    terms = torch.where(infinite, 0.0, r * (outer * lifted)) * (torch.where(infinite, 0.0, x) / ((length + y) * outer))
    values = torch.where(plain, torch.where(infinite, 0.0, s) / (length + y), add(terms) / lifted)
    return torch.where(zero, 0.0, torch.where(infinite, (length - y) / power, values))


def _float32_distances(r: Tensor, c: Tensor) -> Tensor:
    """``distance`` of each residual (B, d) in float32, in float64 where its square would overflow or underflow."""
    size = r.detach().abs()
    plain = (size >= _LEAST[r.dtype]) & (size <= _MOST[r.dtype]) & (c.detach() <= _MOST[r.dtype])
    usual = torch.where(plain, r, 1.0)
    wide = distance(r.double().square(), c.double())
    return torch.where(plain, distance(usual * usual, torch.where(plain, c, 1.0)).double(), wide)


def _mean(values: Tensor, *dim: int) -> Tensor:
    """The mean, also where the sum of float64 values overflows."""
    mean = values.mean(*dim)
    return torch.where(mean.isinf(), (values * 2.0**-64).mean(*dim) * 2.0**64, mean)


def _squares(flat: Tensor, weights: Tensor | None) -> Tensor:
    """The sums of the squares of rows, weighted; NaN where weights below 0 make one negative."""
    wide = flat.double()
    squares = wide * wide  # not wide**2, whose derivative computes 2 x first and may overflow
    if weights is None:
        return squares.sum(1)
    sums = (weights * squares).sum(1)
    return torch.where(sums < 0, math.nan, sums)


def reduced(residual: Tensor, c: Number | None, weight: Number | None, kind: str, reduction: str) -> Tensor:
    """The loss of a residual (B, ...) in the compute type."""
    batch, elements = residual.shape[0], math.prod(residual.shape[1:])
    flat = residual.reshape(batch, elements)
    per_batch, wide = flat.new_empty((batch,)), flat.dtype == torch.float64
    terms = None
    if isinstance(weight, Tensor) and weight.dim() > 1:
        terms, weight = weight.expand(residual.shape).reshape(batch, elements).double(), None
    if kind == "squared":
        assert c is None
        values = _squares(flat, terms)
    elif kind == "vector":
        if c is None:
            c = 0.00054 * math.sqrt(elements)
        if terms is not None:
            values = distance(_squares(flat, terms), per_sample(c, per_batch, torch.float64))
        elif wide and elements:
            values = _float64_distances(flat, per_sample(c, flat, torch.float64), True).squeeze(1)
        else:
            values = distance(flat.double().square().sum(1), per_sample(c, per_batch, torch.float64))
    else:
        assert c is not None
        c = per_sample(c, flat, flat.dtype)
        values = _float64_distances(flat, c, False) if wide else _float32_distances(flat, c)
        values = _mean(values if terms is None else terms * values, 1)
        values = values if terms is None else torch.where(values < 0, math.nan, values)
    if weight is not None:
        values = per_sample(weight, per_batch, torch.float64) * values
    if reduction != "none":
        values = _mean(values) if reduction == "mean" else values.sum()
    return values.to(residual.dtype)


def pseudo_huber(
    pred: Tensor,
    target: Tensor,
    *,
    c: Number | None = None,
    weight: Number | None = None,
    kind: str = "vector",
    reduction: str = "mean",
) -> Tensor:
    """BCM eq. 11: sqrt(|pred - target|^2 + c^2) - c per sample, the mean of the same over elements, or the square."""
    compute = compute_dtype(pred, target)
    return reduced(pred.to(compute) - target.to(compute), c, weight, kind, reduction)


def consistency_loss(
    x: Tensor,
    F: Tensor,
    t: Number,
    u: Number | None = None,
    target: Tensor | None = None,
    *,
    c: Number | None = None,
    weight: Number | None = None,
    kind: str = "vector",
    reduction: str = "mean",
    parameterization: str = "bcm",
    sigma_data: Number = 0.5,
    sigma_min: Number = 0.002,
    scaled: bool = False,
) -> Tensor:
    """The pseudo-Huber distance between c_skip x + c_out F, which is not rounded to the dtype of x, and the target."""
    if target is None:
        raise TypeError("target must be a tensor, got None")
    compute = compute_dtype(x, F, target)
    if u is None:
        u = 0.0 if parameterization == "edm" else sigma_min
    t_, u_, data, least = (per_sample(value, x, compute) for value in (t, u, sigma_data, sigma_min))
    c_skip, c_out = c_skip_c_out(t_, u_, data, least, parameterization, scaled)
    denoised = c_skip * x.to(compute) + c_out * F.to(compute)
    return reduced(denoised - target.to(compute), c, weight, kind, reduction)
