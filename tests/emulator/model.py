"""The contract in NumPy, written from the specification: Philox, keyed noise, sampler updates to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import bicm_emulator
import numpy as np

from .tensors import Tensor, to_bits

MASK = np.uint64(0xFFFFFFFF)
OPTIONS = (
    "conditional",
    "guidance_scale",
    "noise_weight",
    "x0",
    "next",
    "x0_weight",
    "clip",
    "next_scale",
    "takes_second",
    "next_scale_is_sigma",
)


def philox(counters: np.ndarray, seed: int) -> np.ndarray:
    """Philox4x32-10 of (..., 4) counters under a 64-bit key."""
    x = [counters[..., i].astype(np.uint64) for i in range(4)]
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        a, b = x[0] * np.uint64(0xD2511F53), x[2] * np.uint64(0xCD9E8D57)
        x = [
            (b >> np.uint64(32)) ^ x[1] ^ np.uint64(k0),
            b & MASK,
            (a >> np.uint64(32)) ^ x[3] ^ np.uint64(k1),
            a & MASK,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(x, -1).astype(np.uint32)


def fold_in(seed: int, data: int) -> int:
    words = [data & 0xFFFFFFFF, (data >> 32) & 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF]
    r = philox(np.array(words, np.uint32), seed)
    return (int(r[1]) << 32 | int(r[0])) & (2**63 - 1)


def random_words(seed: int, sample: int, step: int, elements: np.ndarray) -> np.ndarray:
    """The quads of words from which elements of a sample are made, four per element."""
    quad = elements.astype(np.uint64) // np.uint64(4)
    counters = np.empty((*elements.shape, 4), np.uint32)
    counters[..., 0] = quad & MASK
    counters[..., 1] = quad >> np.uint64(32)
    counters[..., 2] = sample & 0xFFFFFFFF
    counters[..., 3] = step & 0xFFFFFFFF
    return philox(counters, seed)


def uniform(words: np.ndarray) -> np.ndarray:
    return (words.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)


def uniforms(seed: int, sample: int, step: int, elements: np.ndarray) -> np.ndarray:
    words = random_words(seed, sample, step, elements)
    lane = (elements % 4).astype(np.intp)
    return uniform(np.take_along_axis(words, lane[..., None], -1)[..., 0])


def normals(seed: int, sample: int, step: int, elements: np.ndarray) -> np.ndarray:
    """Box-Muller in float64: the kernels agree to a few float32 ulp."""
    words = random_words(seed, sample, step, elements)
    lane = (elements % 4).astype(np.intp)
    first = (lane - lane % 2)[..., None]
    u = uniform(np.take_along_axis(words, first, -1)[..., 0]).astype(np.float64)
    angle = 2.0 * np.pi * uniform(np.take_along_axis(words, first + 1, -1)[..., 0]).astype(np.float64)
    return np.sqrt(-2.0 * np.log(u)) * np.where(lane % 2 == 0, np.cos(angle), np.sin(angle))


Numbers = list[np.ndarray]


def bdia(a: np.ndarray, b: np.ndarray, a_last: np.ndarray, b_last: np.ndarray, gamma: np.ndarray) -> Numbers:
    return [gamma, a - gamma / a_last, b + gamma * (b_last / a_last)]


def bdia_inverse(a: np.ndarray, b: np.ndarray, a_last: np.ndarray, b_last: np.ndarray, gamma: np.ndarray) -> Numbers:
    one = gamma.dtype.type(1)
    return [one / gamma, one / a_last - a / gamma, -(b / gamma + b_last / a_last)]


def bcm(t: np.ndarray, u: np.ndarray, sigma_data: np.ndarray, *, scaled: bool = False) -> Numbers:
    variance = sigma_data * sigma_data
    s = variance + t * t
    r = np.sqrt(s)
    return [(variance + t * u) / (r if scaled else s), (sigma_data * (t - u)) / r]


def cm(t: np.ndarray, sigma_min: np.ndarray, sigma_data: np.ndarray, *, scaled: bool = False) -> Numbers:
    variance = sigma_data * sigma_data
    d, r = t - sigma_min, np.sqrt(variance + t * t)
    return [(variance * r if scaled else variance) / (variance + d * d), (sigma_data * d) / r]


def scaling(t: np.ndarray, sigma_data: np.ndarray) -> Numbers:
    return [t.dtype.type(1) / np.sqrt(sigma_data * sigma_data + t * t)]


# From coefficients to weights, in the contract's order of operations.
FORMS: dict[str, Callable[..., Numbers]] = {
    "affine": lambda *weights: list(weights),
    "bdia": bdia,
    "bdia_inverse": bdia_inverse,
    "bcm": bcm,
    "cm": cm,
    "bcm_scaled": partial(bcm, scaled=True),
    "cm_scaled": partial(cm, scaled=True),
    "input": scaling,
}


@dataclass
class Problem:
    """A sampler update: the arguments of `bicm_emulator.multistep`."""

    inputs: Sequence[Tensor]
    coefficients: Sequence[float | Tensor]
    out: Tensor
    form: str = "affine"
    conditional: Tensor | None = None
    guidance_scale: float | Tensor | None = None
    noise_weight: float | Tensor | None = None
    key: dict[str, object] = field(default_factory=lambda: {"seed": 0})
    x0: Tensor | None = None
    next: Tensor | None = None
    x0_coefficients: Sequence[float | Tensor] = ()
    x0_weight: float | Tensor = 0.0
    clip: float | Tensor | None = None
    next_scale: float | Tensor | None = None
    takes_second: bool = False
    next_scale_is_sigma: bool = False
    merge: bool = True
    streams: bool = False
    float64: bool | None = None

    @property
    def outputs(self) -> list[Tensor]:
        return [x for x in (self.out, self.x0, self.next) if x is not None]

    @property
    def operands(self) -> list[Tensor]:
        guide = [] if self.conditional is None else [self.conditional]
        return [*self.inputs, *guide]

    @property
    def compute(self) -> np.dtype:
        given = any(x.dtype == "float64" for x in self.operands) if self.float64 is None else self.float64
        return np.dtype("f8" if given else "f4")

    def run(self, target: str, units: list[tuple[int, int]] | None = None) -> None:
        def given(value: object) -> object:
            return value.argument if isinstance(value, Tensor) else value

        bicm_emulator.multistep(
            target,
            given(self.out),
            [given(x) for x in self.inputs],
            [given(x) for x in self.coefficients],
            form=self.form,
            x0_coefficients=[given(x) for x in self.x0_coefficients],
            merge=self.merge,
            streams=self.streams,
            float64=self.float64,
            units=units,
            **{name: given(getattr(self, name)) for name in OPTIONS},
            **self.key,
        )

    def number(self, value: float | Tensor | None) -> np.ndarray:
        """A number in the compute type, shaped to broadcast over the tensors."""
        dims = self.out.bits.ndim
        if isinstance(value, Tensor):
            value = value.values
        number = np.asarray(value).astype(self.compute)
        return number.reshape(-1, *[1] * (dims - 1)) if number.ndim == 1 else number

    def weights(self) -> list[np.ndarray]:
        raw = [self.number(x) for x in self.coefficients]
        weights = FORMS[self.form](*raw)
        return weights[1:] if self.takes_second else weights[: len(self.inputs)]

    def scale(self) -> np.ndarray:
        scale = self.number(self.next_scale)
        return scaling(scale, self.number(self.coefficients[2]))[0] if self.next_scale_is_sigma else scale

    def expected(self) -> list[np.ndarray]:
        """The bits of every output. The noise comes from the scalar kernel, which has tests of its own."""
        with np.errstate(all="ignore"):
            return [to_bits(y, x.dtype) for x, y in zip(self.outputs, self.results(), strict=True)]

    def results(self) -> list[np.ndarray]:
        x = [tensor.values.astype(self.compute) for tensor in self.inputs]
        if self.conditional is not None:
            difference = self.conditional.values.astype(self.compute) - x[-1]
            x[-1] = x[-1] + self.number(self.guidance_scale) * difference
        y = fold(x, self.weights())
        x0 = None
        if self.x0 is not None:
            x0 = fold(x, [self.number(p) for p in self.x0_coefficients])
            if self.clip is not None:
                bound = self.number(self.clip)
                x0 = np.where(x0 > bound, bound, np.where(x0 < -bound, -bound, x0))
            y = y + self.number(self.x0_weight) * x0
        if self.noise_weight is not None:
            noise = np.empty(self.out.bits.shape, np.float32)
            bicm_emulator.noise("scalar", noise, **self.key)
            weight = self.number(self.noise_weight)
            y = np.where(weight != 0, y + weight * noise.astype(self.compute), y)
        scaled = None if self.next is None else self.scale() * y
        return [result for result in (y, x0, scaled) if result is not None]


def fold(x: Sequence[np.ndarray], weights: Sequence[np.ndarray]) -> np.ndarray:
    y = weights[0] * x[0]
    for weight, operand in zip(weights[1:], x[1:], strict=True):
        y = y + weight * operand
    return y
