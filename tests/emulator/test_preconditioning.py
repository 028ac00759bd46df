"""Preconditioning: the multistep kernel with weights formed from noise levels, and one noise at two levels."""

from __future__ import annotations

import bicm_emulator
import numpy as np
import pytest

from . import model
from .checks import check_step, keys_of
from .problems import NOISE, PAIRS, Shape, affine, values
from .tensors import DTYPES, INPUT_LAYOUTS, LAYOUTS, Tensor, same_bits, to_bits

SIZES = (1, 5, 64, 65, 1025)
TERMS = {"input": 1, "bcm": 2, "cm": 2, "bcm_scaled": 2, "cm_scaled": 2}


def levels(batch: int, offset: float, dtype: str = "float32") -> Tensor:
    return Tensor.of(offset + np.linspace(0.0, 7.0, batch), dtype)


def numbers(form: str, batch: int, dtype: str = "float32") -> list[Tensor]:
    """Levels per sample: one of them is zero, and one pair is equal."""
    count = 1 + TERMS[form]
    return [levels(batch, 0.5 * k, dtype) for k in range(count)]


@pytest.mark.parametrize("form", TERMS)
@pytest.mark.parametrize(("state", "network"), PAIRS)
def test_weights_from_levels(target: str, state: str, network: str, form: str) -> None:
    for size in SIZES:
        problem = affine((3, size), state, network if TERMS[form] > 1 else state, TERMS[form], form)
        check_step(lambda p: p.run(target), problem)
        problem.coefficients = numbers(form, 3)
        check_step(lambda p: p.run(target), problem)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compute", ["float32", "float64"])
def test_levels_from_memory(target: str, compute: str, dtype: str) -> None:
    for form, terms in TERMS.items():
        problem = affine((4, 37), compute, compute, terms, form)
        problem.coefficients = numbers(form, 4, dtype)
        check_step(lambda p: p.run(target), problem)


@pytest.mark.parametrize("form", ["bcm", "cm", "bcm_scaled", "cm_scaled"])
@pytest.mark.parametrize(("state", "network"), PAIRS)
@pytest.mark.parametrize("takes_second", [False, True])
def test_derivatives(target: str, state: str, network: str, form: str, takes_second: bool) -> None:
    """c_skip, or c_out, times the incoming gradient, in the dtype of x, or of F."""
    for size in SIZES:
        problem = affine((3, size), state, state, 1, form)
        problem.takes_second, problem.out = takes_second, Tensor.empty((3, size), network)
        if not takes_second:
            problem.inputs, problem.out = problem.inputs[:1], Tensor.empty((3, size), state)
        problem.coefficients = numbers(form, 3)
        check_step(lambda p: p.run(target), problem)


@pytest.mark.parametrize("form", ["bcm", "cm"])
@pytest.mark.parametrize(("state", "network"), PAIRS)
def test_renoise(target: str, state: str, network: str, form: str) -> None:
    for size in SIZES:
        problem = affine((3, size), state, network, 2, form)
        problem.noise_weight, problem.key = Tensor.of(np.array([0.7, 0.0, 1.3]), "float32"), NOISE
        problem.next, problem.next_scale, problem.next_scale_is_sigma = Tensor.empty((3, size), state), 0.7, True
        check_step(lambda p: p.run(target), problem)
        problem.next_scale = levels(3, 0.0)
        check_step(lambda p: p.run(target), problem)


class Pair:
    """A problem of `bicm_emulator.noisy_pair` and what must come of it."""

    def __init__(self, shape: Shape, dtype: str, layout: str = "contiguous", offset: int = 0) -> None:
        out = layout if layout in LAYOUTS else "contiguous"
        self.x, self.x_hat = (Tensor.of(values(k, shape), dtype, layout, offset) for k in range(2))
        self.low, self.high = (Tensor.empty(shape, dtype, out, offset) for _ in range(2))
        self.levels: list[float | Tensor] = [0.4, 1.9]
        self.mask: np.ndarray | None = None
        self.sigma_data: float | Tensor | None = None
        self.F: Tensor | None = None
        self.end: float | Tensor = 0.01
        self.cm, self.scales, self.merge = False, True, True

    def run(self, target: str) -> None:
        given = [x.argument if isinstance(x, Tensor) else x for x in self.levels]
        x_hat = None if self.mask is None or self.F else self.x_hat.argument
        outs = self.low.argument, self.high.argument
        data = self.sigma_data.argument if isinstance(self.sigma_data, Tensor) else self.sigma_data
        options = {"x_hat": x_hat, "mask": self.mask, "sigma_data": data, "merge": self.merge}
        if self.F:
            end = self.end.argument if isinstance(self.end, Tensor) else self.end
            options |= {"F": self.F.argument, "end": end, "cm": self.cm, "scales": self.scales}
        bicm_emulator.noisy_pair(target, *outs, self.x.argument, *given, **options, **NOISE)

    def check(self, target: str) -> None:
        dtypes = (self.x.dtype, self.F.dtype if self.F else "")
        compute = np.float64 if "float64" in dtypes else np.float32
        shape, column = self.x.bits.shape, (-1, *[1] * (self.x.bits.ndim - 1))
        noise = np.empty(shape, np.float32)
        bicm_emulator.noise("scalar", noise, **NOISE)
        base = self.x.values.astype(compute)

        def numbers_of(level: float | Tensor) -> np.ndarray:
            values_ = np.asarray(level.values if isinstance(level, Tensor) else level).astype(compute)
            return values_.reshape(column) if values_.ndim else values_

        x_hat, replaced = self.x_hat.values.astype(compute), self.mask
        if self.F:
            outputs = self.F.values.astype(compute)
            if replaced is not None and replaced.dtype == np.int64:
                outputs, replaced = outputs[np.clip(replaced, 0, len(outputs) - 1)], replaced >= 0
            form, sigma = model.cm if self.cm else model.bcm, numbers_of(self.levels[0])
            c_skip, c_out = form(sigma, numbers_of(self.end), numbers_of(self.sigma_data))
            noisy = np.where(sigma != 0, base + sigma * noise.astype(compute), base)
            x_hat = c_skip * noisy + c_out * outputs
            base = x_hat if self.mask is None else base
        if replaced is not None:
            base = np.where(replaced.reshape(column), x_hat, base)
        self.run(target)

        for out, level in zip((self.low, self.high), self.levels, strict=True):
            sigma = numbers_of(level)
            expected = np.where(sigma != 0, base + sigma * noise.astype(compute), base)
            if self.sigma_data is not None and self.scales:
                expected = model.scaling(sigma, numbers_of(self.sigma_data))[0] * expected
            assert same_bits(out.bits, to_bits(expected, out.dtype), out.dtype)
            assert out.guards_intact()


@pytest.mark.parametrize("layout", ["contiguous", "every second"])
@pytest.mark.parametrize(("state", "network"), PAIRS)
@pytest.mark.parametrize("size", [1, 65, 4099])
def test_the_pair_of_what_the_network_generates(target: str, size: int, state: str, network: str, layout: str) -> None:
    pair = Pair((3, size), state)
    pair.F, pair.sigma_data = Tensor.of(values(7, (3, size)), network, layout), 0.5
    for mask in (None, np.array([True, False, True])):
        for pair.cm, pair.scales in ((False, True), (True, True), (False, False)):
            pair.mask = mask
            pair.levels = [0.4, 1.9]
            pair.check(target)
            pair.levels = [Tensor.of(np.array([0.0, 2.5, 0.3]), "float32"), 1.0]
            pair.check(target)


@pytest.mark.parametrize("layout", ["contiguous", "every second"])
@pytest.mark.parametrize(("state", "network"), PAIRS)
@pytest.mark.parametrize("size", [1, 65, 4099])
def test_outputs_in_other_places(target: str, size: int, state: str, network: str, layout: str) -> None:
    """The network saw some samples only; a place past the last one is the last."""
    for batch, places in ((3, [1, -1, 0]), (4, [4, 0, -7, 2]), (1, [2]), (2, [0, 9])):
        pair = Pair((batch, size), state)
        pair.F, pair.sigma_data = Tensor.of(values(7, (max(2, max(places[:1]) + 1), size)), network, layout), 0.5
        pair.mask = np.array(places, np.int64)
        pair.check(target)
        pair.mask = np.repeat(pair.mask, 2)[::2]
        pair.check(target)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 5, 64, 65, 1025, 4099])
def test_one_noise_at_two_levels(target: str, size: int, dtype: str) -> None:
    pair = Pair((3, size), dtype)
    pair.check(target)
    pair.levels = [0.0, Tensor.of(np.array([0.0, 2.5, -0.0]), "float32")]
    pair.mask = np.array([True, False, True])
    pair.check(target)
    pair.mask = np.array([True, True, False, True, True, True])[::2]
    pair.check(target)
    pair.sigma_data = 0.5
    pair.check(target)
    pair.sigma_data = levels(3, 0.3)
    pair.check(target)


@pytest.mark.parametrize("layout", INPUT_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pairs_in_any_memory(target: str, dtype: str, layout: str) -> None:
    for merge in (True, False):
        for offset in (0, 1):
            pair = Pair((3, 5, 7), dtype, layout, offset)
            pair.mask, pair.merge = np.array([False, True, False]), merge
            pair.check(target)


def test_a_pair_is_one_launch(device: bicm_emulator.Device) -> None:
    launches = device.launches
    Pair((3, 1000), "float32").run("cuda")
    assert device.launches == launches + 1
    Pair((0, 5), "float32").run("cuda")
    assert device.launches == launches + 1


def test_the_pair_draws_the_specified_noise() -> None:
    pair = Pair((2, 100), "float64")
    pair.x.bits[...] = 0
    pair.levels = [1.0, 2.0]
    pair.run("cuda")
    for b, (seed, sample, step) in enumerate(keys_of(2, NOISE)):
        expected = model.normals(seed, sample, step, np.arange(100, dtype=np.int64))
        assert np.allclose(pair.low.values[b], expected, rtol=1e-5, atol=1e-6)
        assert np.array_equal(pair.high.values[b], 2 * pair.low.values[b])
