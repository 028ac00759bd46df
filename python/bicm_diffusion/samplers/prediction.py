"""A model's prediction converted to noise: eps = of_state·z + of_output·output at one level.

The two numbers are folded into a step's weights, so that no prediction type needs an extra launch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from torch import Tensor

Number: TypeAlias = float | Tensor


class Level(NamedTuple):
    """One level of a schedule, or several as columns: z = alpha·x + sigma·n."""

    time: Number
    alpha: Number
    sigma: Number


class Reading(NamedTuple):
    """eps = of_state·z + of_output·output; of_state is None where the state does not contribute."""

    of_state: Number | None
    of_output: Number


@dataclass(frozen=True)
class Preconditioned:
    """A model that returns F, the raw output of a preconditioned network.

    D(z/alpha, t) = c_skip(t)·z/alpha + c_out(t)·F; t = sigma/alpha is the noise level, and the model is called with
    c_in(t)·z/alpha. parameterization: "edm" (the denoiser, EDM 7), "bcm" (t to t_min, BCM 20) or "cm" (BCM 17).
    sigma_data and t_min are in units of x.
    Raises ValueError for an unknown name or a value out of range.

    >>> Preconditioned().parameterization
    'edm'
    """

    parameterization: Literal["edm", "bcm", "cm"] = "edm"
    sigma_data: float = 0.5
    t_min: float = 0.002

    def __post_init__(self) -> None:
        if self.parameterization not in _LOST:
            raise ValueError(f"parameterization: expected one of {', '.join(_LOST)}, got {self.parameterization!r}")
        if not self.sigma_data > 0 or not self.t_min >= 0:
            raise ValueError(
                f"sigma_data, t_min: expected sigma_data > 0 and t_min >= 0, got {self.sigma_data} and {self.t_min}"
            )

    def input_scale(self, level: Level) -> Number:
        """c_in(t)/alpha, the scale from a state to the model's input."""
        t = level.sigma / level.alpha
        return 1.0 / ((self.sigma_data**2 + t * t) ** 0.5 * level.alpha)


Prediction: TypeAlias = Literal["noise", "epsilon", "v", "x0", "flow"] | Preconditioned


# 1 - c_skip and c_out, from t, sigma_data and the target level u; 1 - c_skip is written out, because
# at low noise the difference would lose most of its digits.
def _to_time(t: Number, data: float, u: float) -> tuple[Number, Number]:
    total = data * data + t * t
    return t * (t - u) / total, data * (t - u) / total**0.5


def _to_end(t: Number, data: float, end: float) -> tuple[Number, Number]:
    passed = t - end
    return passed * passed / (data * data + passed * passed), data * passed / (data * data + t * t) ** 0.5


_LOST: dict[str, Callable[[Number, float, float], tuple[Number, Number]]] = {
    "edm": lambda t, data, _: _to_time(t, data, 0.0),
    "bcm": _to_time,
    "cm": _to_end,
}


def _raw(prediction: Preconditioned, level: Level) -> Reading:
    lost, c_out = _LOST[prediction.parameterization](level.sigma / level.alpha, prediction.sigma_data, prediction.t_min)
    return Reading(lost / level.sigma, -c_out * level.alpha / level.sigma)


def _noise(_: Level) -> Reading:
    return Reading(None, 1.0)


def _velocity(level: Level) -> Reading:
    total = level.alpha * level.alpha + level.sigma * level.sigma
    return Reading(level.sigma / total, level.alpha / total)


def _clean(level: Level) -> Reading:
    return Reading(1.0 / level.sigma, -level.alpha / level.sigma)


def _flow(level: Level) -> Reading:
    total = level.alpha + level.sigma
    return Reading(1.0 / total, level.alpha / total)


#: noise: eps itself; v = alpha·eps - sigma·x; x0: the denoised sample; flow: eps - x.
_READINGS: dict[str, Callable[[Level], Reading]] = {"noise": _noise, "v": _velocity, "x0": _clean, "flow": _flow}


def read(prediction: Prediction, level: Level) -> Reading:
    """Return the weights that convert a model's output at a level, sigma > 0, to noise."""
    return _raw(prediction, level) if isinstance(prediction, Preconditioned) else _READINGS[prediction](level)


def folded(reading: Reading, of_state: Number, of_noise: Number) -> tuple[Number, Number]:
    """Return the weights of the state and the model's output equivalent to those of the state and the noise."""
    output = of_noise * reading.of_output
    return (of_state if reading.of_state is None else of_state + of_noise * reading.of_state), output


def denoised_weights(prediction: Prediction, level: Level) -> tuple[Number, Number]:
    """Return the weights of the state and the model's output, at a level, in the denoised sample."""
    if prediction == "x0":  # exactly zero for the state, without a rounding remainder
        return 0.0, 1.0
    of_state, of_output = read(prediction, level)
    lost = 0.0 if of_state is None else level.sigma * of_state
    return (1.0 - lost) / level.alpha, -level.sigma * of_output / level.alpha


def known_prediction(prediction: Prediction) -> Prediction:
    """Return the canonical name of a prediction, which pairs record; "epsilon" is "noise".

    Raises ValueError for an unknown prediction.
    """
    if isinstance(prediction, Preconditioned):
        return prediction
    if isinstance(prediction, str):
        if prediction == "epsilon":
            return "noise"
        if prediction in _READINGS:
            return prediction
    names = ", ".join(map(repr, ("noise", "epsilon", *list(_READINGS)[1:])))
    raise ValueError(f"prediction: expected {names} or a Preconditioned, got {prediction!r}")
