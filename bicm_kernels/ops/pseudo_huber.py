"""Pseudo-Huber losses: a single pass computes value and gradient, and keeps the gradient for the backward pass.

Or one pass over the inputs forward and one backward, and no saved tensor of their size.
"""

from __future__ import annotations

from torch import Tensor

from bicm_kernels.ops.arguments import Number
from bicm_kernels.ops.pseudo_huber_dispatch import CONSISTENCY_LOSS, PSEUDO_HUBER


def pseudo_huber(
    pred: Tensor,
    target: Tensor,
    *,
    c: Number | None = None,
    weight: Number | None = None,
    kind: str = "vector",
    reduction: str = "mean",
    gradient: str = "auto",
) -> Tensor:
    """Pseudo-Huber loss, the distance of consistency training (BCM eq. 11), from one reading of its inputs.

    ``vector``: sqrt(|r|^2 + c^2) - c per sample, r = pred - target; ``elementwise``: the mean of sqrt(r_i^2 + c^2) - c
    over a sample's elements. Both are computed as s / (sqrt(s + c^2) + c); value and gradient are 0 at s = c = 0.
    Squares may overflow or underflow. An infinite residual makes the distance infinite and its own derivative NaN.
    ``squared``: |r|^2 per sample, the sum of its squares, whose gradient is 2 r; infinite where it overflows, and an
    infinite residual has an infinite derivative.

    Args:
        pred, target: (B, ...) of one shape, each float16, bfloat16, float32 or float64, any strides.
        c: residual norm at which the loss turns from quadratic to linear, >= 0 (checked for floats in eager calls);
            float, 0-d or (B,) tensor. None is 0.00054 sqrt(d) for ``vector``, d elements in a sample; ``elementwise``
            requires c, ``squared`` takes none.
        weight: of samples, a (B,) tensor, a 0-d tensor or a float, which multiplies their distances; None weights all
            equally. Or of elements, with as many dimensions as pred and each size that of pred or 1: it multiplies the
            terms of a sample's sum, w_i r_i^2 in ``vector`` and ``squared``, the distances in ``elementwise``; d stays
            the number of all elements, in c and in the mean. A bool mask is read as 0 and 1. Where the weight is 0, an
            infinite or NaN residual still gives NaN. Weights must be >= 0: a negative sum becomes NaN.
        kind: "vector", "elementwise" or "squared".
        reduction: "mean" or "sum" of the weighted distances over the batch, or "none".
        gradient: "backward" reads the inputs again in the backward pass. "forward" reads them once, forms the gradients
            with the value and keeps them in place of the inputs; second derivatives raise. "auto" does the same and
            keeps references to the inputs too, for second derivatives. The backward pass returns the kept gradients
            scaled by the upstream gradient: where that is no power of two, they are rounded once more than by
            "backward". Gradients of halves are not kept, since they could not be scaled without loss: where one is
            needed, "forward" and "auto" act as "backward". So does "auto" in traced and compiled code, and under hooks
            for saved tensors, such as those of checkpoints.

    Returns:
        The loss, 0-d or (B,), float64 where pred or target is float64, else float32: it is not rounded to halves. The
        gradient of a tensor has that tensor's dtype and layout. Of an empty batch the mean is NaN and the sum 0.

    Raises:
        TypeError, ValueError: an argument has another type, shape, device, name or range.

    Differentiable in pred and target through the fused kernel; in c and weight, and twice, through the reference.

    >>> import torch, bicm_kernels as bk
    >>> bk.pseudo_huber(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), c=0.0)
    tensor(5.)
    """
    return PSEUDO_HUBER.loss((pred, target, weight), (c,), (kind, reduction), gradient)


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
    gradient: str = "auto",
) -> Tensor:
    """``pseudo_huber(denoise(x, F, t, u), target)`` without the denoised sample: training allocates only F's gradient.

    c_skip x + c_out F (BCM eq. 20, 39, 43) exists in the compute type only: unlike ``denoise`` it is not rounded to the
    dtype of x.

    Args:
        x: noisy sample (B, ...), float16, bfloat16, float32 or float64, any strides.
        F: network output, like x, of any of these dtypes.
        t: noise level, >= 0; float, 0-d or (B,) tensor.
        u: target level, only for "bcm"; float, 0-d or (B,) tensor. None means sigma_min for "bcm"; "cm" goes to
            sigma_min and "edm" to 0.
        target: like x, of any of these dtypes; required, and by name where u is omitted.
        c, weight, kind, reduction, gradient: as for ``pseudo_huber``.
        parameterization: "bcm" (t to u), "cm" (t to sigma_min) or "edm" (t to 0).
        sigma_data, sigma_min: standard deviation of the data and smallest noise level; floats.
        scaled: x is the network's input, c_in(t) times the noisy sample: see ``noisy_pair``.

    Returns:
        The loss, as for ``pseudo_huber``.

    Raises:
        TypeError, ValueError: an argument has another type, shape, device, name or range.

    Differentiable in F, x and target through the fused kernel; in t, u, c and weight, and twice, through the reference.

    >>> import torch, bicm_kernels as bk
    >>> x = torch.tensor([[3.0, 4.0]]); bk.consistency_loss(x, x, 2.0, 2.0, 0 * x, c=0.0)
    tensor(5.)
    """
    numbers, names = (c, sigma_data, sigma_min), (parameterization, scaled, kind, reduction)
    return CONSISTENCY_LOSS.loss((F, target, x, t, u, weight), numbers, names, gradient)
