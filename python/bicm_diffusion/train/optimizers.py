"""Optimizers by name."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from bicm_diffusion.extras import extra
from bicm_diffusion.train.options import TrainingOptions


def make_optimizer(parameters: Iterable[nn.Parameter], options: TrainingOptions) -> torch.optim.Optimizer:
    """Return the optimizer named in the options; raises ImportError with the command to install a missing package.

    >>> make_optimizer([nn.Parameter(torch.zeros(1))], TrainingOptions(steps=1, batch_size=1)).__class__.__name__
    'RAdam'
    """
    named = {"lr": options.learning_rate, "weight_decay": options.weight_decay, **options.optimizer_args}
    if options.optimizer == "radam":
        return torch.optim.RAdam(parameters, **named)
    if options.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **named)
    with extra("lion", "or choose optimizer='adamw'"):
        from lion_pytorch import Lion
    made: torch.optim.Optimizer = Lion(parameters, **named)
    return made
