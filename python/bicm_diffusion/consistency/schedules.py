"""Schedules of consistency samplers, and the papers' choices by name."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real

from torch import Tensor

from bicm_diffusion.described import described
from bicm_diffusion.schedules.karras import T_MIN
from bicm_diffusion.schedules.schedule import as_floats


@dataclass(frozen=True)
class ConsistencySchedule:
    """Levels from the noisiest down, then zigzags: the schedule of a consistency sampler or an inversion.

    levels: T = t_N > … > t_1 > t_min; an inversion uses them in reverse. zigzags: pairs (ε, t), t_min < ε < t: noise
    of level ε is added to the sample and amplified to t. Levels are standard deviations, in the units of the data.
    Sequences of numbers are converted to tuples of floats. Raises TypeError for anything else, and ValueError for
    levels out of order or range.

    >>> ConsistencySchedule((80.0, 1.2), zigzags=((0.1, 0.3),)).evaluations
    4
    """

    levels: tuple[float, ...]
    zigzags: tuple[tuple[float, float], ...] = ()
    t_min: float = T_MIN
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", as_floats("levels", self.levels, "a sequence of noise levels"))
        object.__setattr__(self, "zigzags", _pairs(self.zigzags))
        for name in ("t_min", "sigma_data"):
            if not isinstance(getattr(self, name), Real):
                raise TypeError(f"{name}: expected a number, got {described(getattr(self, name))}")
        falls = all(high > low for high, low in pairwise([*self.levels, self.t_min]))
        if not self.levels or not falls or not 0 <= self.t_min < self.levels[0] < math.inf:
            raise ValueError(f"levels: expected finite levels that fall to t_min = {self.t_min}, got {self.levels}")
        if not all(self.t_min < noise < level < math.inf for noise, level in self.zigzags):
            raise ValueError(f"zigzags: expected pairs with t_min < ε < t, got {self.zigzags}")
        if not 0 < self.sigma_data < math.inf:
            raise ValueError(f"sigma_data: expected a positive value, got {self.sigma_data}")

    @property
    def evaluations(self) -> int:
        """The network's evaluations that sampling takes; an inversion takes one less than there are levels."""
        return len(self.levels) + 2 * len(self.zigzags)


def _pairs(zigzags: object) -> tuple[tuple[float, float], ...]:
    pairs = zigzags.tolist() if isinstance(zigzags, Tensor) else zigzags
    if isinstance(pairs, str) or not isinstance(pairs, Iterable):
        raise TypeError(f"zigzags: expected a sequence of pairs (ε, t), got {described(zigzags)}")
    known = []
    for pair in pairs:
        noise_and_level = as_floats("zigzags", pair, "pairs (ε, t)")
        if len(noise_and_level) != 2:
            raise ValueError(f"zigzags: expected pairs (ε, t), got {noise_and_level}")
        known.append(noise_and_level)
    return tuple(known)


# BCM, appendix D.2, and for ImageNet-64 the authors' code.
PRESETS: dict[str, ConsistencySchedule] = {
    "cifar10-1step": ConsistencySchedule((80.0,)),
    "cifar10-ancestral": ConsistencySchedule((80.0, 1.2)),
    "cifar10-zigzag": ConsistencySchedule((80.0,), ((0.2, 0.8),)),
    "cifar10-combined": ConsistencySchedule((80.0, 1.2), ((0.1, 0.3),)),
    "cifar10-deep-ancestral": ConsistencySchedule((80.0, 0.7)),
    "cifar10-deep-zigzag": ConsistencySchedule((80.0,), ((0.4, 0.8),)),
    "cifar10-deep-combined": ConsistencySchedule((80.0, 0.6), ((0.14, 0.3),)),
    "cifar10-inversion-2": ConsistencySchedule((80.0, 6.0, 0.07)),
    "cifar10-inversion-4": ConsistencySchedule((80.0, 10.0, 4.0, 1.5, 0.07)),
    "cifar10-interpolation": ConsistencySchedule((80.0, 6.0, 1.5, 0.07)),
    "imagenet64-ancestral": ConsistencySchedule((80.0, 2.4)),
    "imagenet64-zigzag": ConsistencySchedule((80.0,), ((0.1, 1.2),)),
    "imagenet64-combined": ConsistencySchedule((80.0, 3.0), ((0.12, 0.4),)),
    "imagenet64-inversion": ConsistencySchedule((80.0, 15.0, 0.07)),
}
