"""Steps as Gaussian policies: a step with its log-probability, that of a recorded state, and a divergence.

Reinforcement learning computes a step's log-probability twice: when it is taken, and when the network that took it is
trained. Both are the same bits where the network's output is.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bicm_kernels.ops.arguments import Integer, Number, weight_list
from bicm_kernels.ops.checks import check_sequence
from bicm_kernels.ops.gaussian_dispatch import ADDS_UP, GAUSSIAN_KL, GAUSSIAN_LOG_PROB, GAUSSIAN_STEP
from bicm_kernels.ops.multistep import TensorOrPair
from bicm_kernels.ops.reduction import check_choice


def gaussian_step(
    tensors: Sequence[TensorOrPair],
    weights: Sequence[Number],
    *,
    std: Number,
    seed: Integer | None,
    step: Integer = 0,
    sample_id: Integer = 0,
    guidance_scale: Number | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """A stochastic sampler step and the log-probability of the state that it takes, in one pass.

    m = sum of w_k x_k, a left fold; next = m + s n with keyed noise n, rounded to the dtype of the first tensor;
    log p = -(next - m)^2 / (2 s^2) - ln s - ln(2 pi) / 2 of the rounded state, reduced over the elements of a sample.

    Args:
        tensors: 1 to 5 tensors (B, ...), float16, bfloat16, float32 or float64, any strides; the last may be a pair
            (eps_uncond, eps_cond) with ``guidance_scale``.
        weights: w_k, one per tensor; float, 0-d or (B,) tensor.
        std: s >= 0; float, 0-d or (B,) tensor. A sample whose std is exactly 0 draws nothing: its next state is the
            mean, and its log-probability counts as 0.
        seed, step, sample_id: the noise's key, see ``normal``; the seed may be None where std is the number 0.
        guidance_scale: g in eps_uncond + g (eps_cond - eps_uncond), which the kernel forms.
        reduction: "mean" or "sum" over the elements of a sample.

    Returns:
        (next, log_prob): next in the dtype and layout of the first tensor; log_prob (B,), float64 where any tensor is,
        else float32.

    Raises:
        TypeError, ValueError: an argument has another type, shape, device or range.

    Where a gradient is required, the reference computes it: log_prob has that of the density of a given state.

    >>> import torch, bicm_kernels as bk
    >>> x, v = torch.zeros(2, 3), torch.ones(2, 3)
    >>> next, log_prob = bk.gaussian_step([x, v], [1.0, -0.1], std=0.5, seed=1)
    >>> torch.equal(log_prob, bk.gaussian_log_prob(next, [x, v], [1.0, -0.1], std=0.5))
    True
    """
    try:
        adds_up = ADDS_UP[reduction]
    except (KeyError, TypeError):
        check_choice("reduction", reduction, ADDS_UP)
        raise
    result: tuple[Tensor, Tensor] = GAUSSIAN_STEP.call(
        tensors, weights, guidance_scale, std, adds_up, seed, step, sample_id
    )
    return result


def gaussian_log_prob(
    next: Tensor,  # noqa: A002 (an iterator is not what takes a step)
    tensors: Sequence[TensorOrPair],
    weights: Sequence[Number],
    *,
    std: Number,
    guidance_scale: Number | None = None,
    reduction: str = "mean",
    gradient: str = "auto",
) -> Tensor:
    """The log-probability of a recorded state under a step, with the bits that ``gaussian_step`` gave.

    log p = -(next - m)^2 / (2 s^2) - ln s - ln(2 pi) / 2 with m = sum of w_k x_k, reduced over the d elements of a
    sample. Its derivative in x_k is (next - m) w_k / (s^2 d), or without d for the sum.

    Args:
        next: the state that the step took, like the tensors, of any floating dtype.
        tensors, weights, std, guidance_scale, reduction: as for ``gaussian_step``.
        gradient: "backward" reads the tensors again in the backward pass, and no tensor of their size is kept between
            the passes. "forward" reads them once, forms the gradients with the value and keeps them in place of the
            tensors; the backward pass scales them by the upstream gradient, and second derivatives raise. "auto" keeps
            them beside references to the tensors, for second derivatives. Where a gradient is a half, which could not
            be scaled without loss, both act as "backward"; where else "auto" does, see ``pseudo_huber``.

    Returns:
        (B,), float64 where any tensor is, else float32. A sample whose std is exactly 0 has 0 and no gradient. The
        gradient of a tensor has that tensor's dtype and layout.

    Raises:
        TypeError, ValueError: an argument has another type, shape, device or range.

    Differentiable in every tensor through the fused kernel; in weights, std and guidance_scale, and twice, through the
    reference.

    >>> import torch, bicm_kernels as bk
    >>> bk.gaussian_log_prob(torch.ones(1, 2), [torch.zeros(1, 2)], [1.0], std=1.0)
    tensor([-1.4189])
    """
    check_sequence("tensors", tensors)
    weights = weight_list("weights", weights)
    return GAUSSIAN_LOG_PROB.reduced(((next, *tensors), weights, guidance_scale, std, reduction), gradient)


def gaussian_kl(
    tensors: Sequence[Tensor],
    reference: Sequence[Tensor],
    weights: Sequence[Number],
    *,
    std: Number,
    reduction: str = "mean",
) -> Tensor:
    """The KL divergence of two steps of the same std, a policy's and a reference's: (m - m_ref)^2 / (2 s^2), reduced.

    Args:
        tensors: of the mean m = sum of w_k x_k; 1 to 5 tensors (B, ...), any floating dtypes and strides.
        reference: as many tensors of the reference's mean m_ref, with the same weights; shared tensors are passed
            twice.
        weights, std, reduction: as for ``gaussian_step``.

    Returns:
        (B,), float64 where any tensor is, else float32. A sample whose std is exactly 0 has 0 and no gradient.

    Raises:
        TypeError, ValueError: an argument has another type, shape, device or range.

    Differentiable in every tensor through the fused kernel, which reads them again in the backward pass; in weights and
    std, and twice, through the reference.

    >>> import torch, bicm_kernels as bk
    >>> bk.gaussian_kl([torch.ones(1, 2)], [torch.zeros(1, 2)], [2.0], std=1.0)
    tensor([2.])
    """
    weights = weight_list("weights", weights)
    GAUSSIAN_KL.check_lists(tensors, reference, weights)
    return GAUSSIAN_KL.reduced(((*reference, *tensors), weights, None, std, reduction), "backward")
