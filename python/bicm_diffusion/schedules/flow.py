"""Flow matching: straight lines from data to noise, on uniform or shifted times."""

from __future__ import annotations

import math

from bicm_diffusion.schedules.schedule import Schedule, check_steps


def flow_schedule(steps: int, *, shift: float = 1.0) -> Schedule:
    """Return the schedule of a rectified-flow model: z = (1 - t)·x + t·n at N + 1 times t from 0, data, to 1, noise.

    alpha = 1 - t, sigma = t; the model gets t. steps: N ≥ 1. shift > 1 concentrates the times at noise:
    t = shift·s/(1 + (shift - 1)·s) of uniform s, 3 for Stable Diffusion 3; Flux's exponential shift by mu is
    shift = exp(mu). All tables are float64. alpha is 0 at t = 1, where only `prediction="flow"` is defined.
    Raises TypeError for a number of steps that is not an integer, ValueError for a value out of range.

    >>> flow_schedule(4).alpha
    (1.0, 0.75, 0.5, 0.25, 0.0)
    >>> flow_schedule(2, shift=3.0).times
    (0.0, 0.75, 1.0)
    """
    check_steps(steps)
    if not 0.0 < shift < math.inf:
        raise ValueError(f"shift: expected a positive value, got {shift}")
    uniform = [i / steps for i in range(steps + 1)]
    times = tuple(shift * s / (1.0 + (shift - 1.0) * s) for s in uniform)
    # Both ends are exact: a rounded 1 would leave some signal.
    times = (0.0, *times[1:-1], 1.0)
    return Schedule(times, tuple(1.0 - t for t in times), times, flow=True)
