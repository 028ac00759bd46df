"""Purposes of keyed noise: every part of this package that draws folds the caller's seed with its purpose.

The ops of `bicm_kernels` draw from the given seed itself, and so does the noise of training pairs, which is
`normal(x.shape, seed=seed, step=step, sample_id=sample_id)`. Everything else here draws from
`fold_in(seed, PURPOSE)`, so that one seed serves latents, samplers and training without repeating a number.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Purposes are numbered from here; a program's own `fold_in(seed, n)` with a small n never coincides with one.
RESERVED = 0x6269636D << 32

# Training draws.
LEVELS, PARTNERS, DROPOUT, TIMES, MASKS, ORDER, AUGMENTATION, TRAINING = (RESERVED + n for n in range(1, 9))
# Idempotent networks: latents, noise on their samples for comparing scores, and for training the learned one.
LATENTS, MATCHING, LEARNING = (RESERVED + n for n in range(9, 12))
# Fresh noise of samplers, of the adapters' samplers, and of accelerated schedulers.
CONSISTENCY_SAMPLING, CONSISTENCY_INVERSION, CHURN, SIGN, K_DIFFUSION, SCHEDULER = (RESERVED + n for n in range(33, 39))
# Inverse solvers: ancestral noise, noise on a denoised sample, FreeDoM's renoising, and new levels of CM inversion.
ANCESTRAL, AROUND, TRAVEL, CM_INVERSION = (RESERVED + n for n in range(65, 69))
# Rollouts of policies.
POLICY = RESERVED + 97


def device_of(*key: int | Tensor, default: torch.device | None = None) -> torch.device | None:
    """Return where the numbers of a key are drawn: on the device that one of its tensors is on, or the default.

    >>> device_of(0, torch.tensor([1, 2])) is None
    True
    """
    return next((x.device for x in key if isinstance(x, Tensor) and not x.is_cpu), default)
