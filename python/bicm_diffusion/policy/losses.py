"""The clipped policy loss of DDPO and Flow-GRPO, with a divergence from a reference."""

from __future__ import annotations

import torch
from torch import Tensor

from bicm_diffusion.described import described
from bicm_diffusion.objectives.evaluation import Loss
from bicm_diffusion.samplers.checks import check_number


def policy_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    *,
    clip: float = 1e-4,
    most: float = 5.0,
    divergence: Tensor | None = None,
    divergence_weight: float = 0.0,
) -> Loss:
    """Return PPO's clipped loss: the mean over a batch of max(-A·ratio, -A·ratio clipped to 1 ± clip), ratio = p/p_old.

    log_prob: (B,) under the network, with its gradient; old_log_prob: (B,) as recorded by the rollout; advantages:
    (B,), which are clamped to [-most, most]. clip > 0: ratios of log-densities that are means over elements are near 1,
    hence DDPO's 1e-4. divergence: (B,) from a reference, as from `step_divergence`, whose mean is added with
    divergence_weight >= 0.

    Terms: "policy", "divergence"; and without a gradient "ratio", the mean ratio, and "clipped", the share of samples
    whose ratio is outside 1 ± clip.
    Raises TypeError, ValueError for an argument of another type, shape or range.

    >>> zero = torch.zeros(2)
    >>> policy_loss(zero, zero, torch.tensor([1.0, -3.0])).total
    tensor(1.)
    """
    for name, row in (("log_prob", log_prob), ("old_log_prob", old_log_prob), ("advantages", advantages)):
        _check_row(name, row, log_prob)
    check_number("clip", clip)
    check_number("most", most)
    check_number("divergence_weight", divergence_weight)
    if not clip > 0.0 or not most > 0.0 or not divergence_weight >= 0.0:
        raise ValueError(
            "clip, most, divergence_weight: expected clip > 0, most > 0 and divergence_weight >= 0, got "
            f"{clip}, {most} and {divergence_weight}"
        )
    ratio = (log_prob - old_log_prob.detach()).exp()
    weights = advantages.detach().to(ratio.dtype).clamp(-most, most)
    policy = torch.maximum(-weights * ratio, -weights * ratio.clamp(1.0 - clip, 1.0 + clip)).mean()
    total, terms = policy, {"policy": policy}
    if divergence is not None:
        _check_row("divergence", divergence, log_prob)
        terms["divergence"] = divergence.mean()
        total = policy + divergence_weight * terms["divergence"]
    still = ratio.detach()
    terms |= {"ratio": still.mean(), "clipped": ((still - 1.0).abs() > clip).to(still.dtype).mean()}
    return Loss(total, terms)


def _check_row(name: str, row: object, first: object) -> None:
    if not isinstance(row, Tensor) or not row.is_floating_point():
        raise TypeError(f"{name}: expected a floating tensor (B,), got {described(row)}")
    assert isinstance(first, Tensor)
    if row.dim() != 1 or row.shape != first.shape:
        expected = f"({len(first)},)" if first.dim() == 1 else "(B,)"
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(row.shape)}")
