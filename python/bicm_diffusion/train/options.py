"""The settings of a training run apart from its network, data and loss."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import numpy as np

from bicm_diffusion.described import described

CHOICES = {
    "optimizer": ("radam", "adamw", "lion"),
    "decay": ("constant", "cosine"),
    "precision": ("float32", "bfloat16"),
}
_WHOLE = ("steps", "batch_size", "seed", "micro_batch", "warmup")
_FLAGS = ("ema_warmup", "compiled")
_REAL = ("learning_rate", "weight_decay", "clip", "ema")


@dataclass(frozen=True)
class TrainingOptions:
    """The settings of a run: equal options, network, data and loss give equal bits on one device.

    steps: optimizer steps of the whole run. batch_size: samples per step, over all processes and micro-batches.
    seed: of the data's order and of all draws of a loss by `Step.key`.
    micro_batch: samples evaluated together; None for a process's whole part. Their gradients are accumulated.
    optimizer: "radam", "adamw", or "lion" (extra `[lion]`); optimizer_args: further arguments of it, such as betas.
    learning_rate: the peak; it rises over `warmup` steps, then stays ("constant") or falls to 0 ("cosine").
    clip: the maximum norm of the gradient, None for no limit. precision: "bfloat16" runs the loss under autocast.
    ema: decay of the averaged weights, in [0, 1]; ema_warmup: whether it starts lower, see `update_average`.
    compiled: whether the network is compiled by torch.compile.
    NumPy's numbers become Python's. Raises TypeError for a value of another kind, ValueError for one out of range.

    >>> TrainingOptions(steps=10, batch_size=4, optimizer="adamw").learning_rate_at(0)
    0.0001
    """

    steps: int
    batch_size: int
    seed: int = 0
    micro_batch: int | None = None
    optimizer: str = "radam"
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    optimizer_args: Mapping[str, Any] = field(default_factory=dict)
    warmup: int = 0
    decay: str = "constant"
    clip: float | None = None
    precision: str = "float32"
    ema: float = 0.9999
    ema_warmup: bool = True
    compiled: bool = False

    def __post_init__(self) -> None:
        for names, kind, what, plain in ((_WHOLE, Integral, "an int", int), (_REAL, Real, "a number", float)):
            for name in names:
                self._convert(name, kind, what, plain)
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool | np.bool_):
                raise TypeError(f"{name}: expected a bool, got {described(getattr(self, name))}")
            object.__setattr__(self, name, bool(getattr(self, name)))
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("steps", "batch_size", "micro_batch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip: expected a norm above 0, or None, got {self.clip}")
        if not self.warmup >= 0:
            raise ValueError(f"warmup: expected at least 0 steps, got {self.warmup}")
        if not 0 <= self.ema <= 1:
            raise ValueError(f"ema: expected a value in [0, 1], got {self.ema}")
        try:
            json.dumps(dict(self.optimizer_args), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise TypeError(f"optimizer_args: expected values that JSON can hold, got {error}") from None

    def _convert(self, name: str, kind: type, what: str, plain: Callable[[Any], int | float]) -> None:
        """Check a number's kind, and make it one that checkpoints can hold."""
        value = getattr(self, name)
        if value is None and name in ("micro_batch", "clip"):
            return
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected {what}, got {described(value)}")
        object.__setattr__(self, name, plain(value))

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        fallen = 0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.decay == "cosine" else 1.0
        return self.learning_rate * (warm * fallen)
