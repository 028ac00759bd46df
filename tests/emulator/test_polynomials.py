"""log, cos and sin over every float32 that a uniform number can be, [2^-33, 1]."""

import zlib

import bicm_emulator
import numpy as np
import pytest

from .checks import targets

LOW, HIGH = 0x2F000000, 0x3F800000  # the bits of 2^-33 and of 1
# The sanitizers slow the sweep down by an order of magnitude; a prime stride still meets every binade evenly.
STRIDE = 251 if bicm_emulator.SANITIZED else 1
BEST = bicm_emulator.instruction_sets()[-1]


@pytest.mark.parametrize("function", ["log", "cos", "sin"])
def test_error_is_at_most_two_ulp(function: str) -> None:
    ulps, at = bicm_emulator.polynomial_error(BEST, function, LOW, HIGH, STRIDE)
    assert ulps <= 2.0, f"{function} is off by {ulps} ulp at {at!r}"


@pytest.mark.parametrize("function", ["log", "cos"])
@pytest.mark.parametrize("other", [target for target in targets() if target != BEST])
def test_every_target_has_the_same_bits(function: str, other: str) -> None:
    assert bicm_emulator.polynomial_differences(BEST, other, function, LOW, HIGH, STRIDE) == 0


@pytest.mark.parametrize(("function", "stored"), [("log", 0x2BCF30F2), ("cos", 0x6EB1616C), ("sin", 0x46694367)])
def test_the_bits_are_those_of_this_noise_version(target: str, function: str, stored: int) -> None:
    """Accurate is not enough: other bits are another noise, and need another NOISE_VERSION."""
    u = np.arange(LOW, HIGH, 997, dtype=np.uint32).view(np.float32)
    assert zlib.crc32(bicm_emulator.evaluate(target, function, u).tobytes()) == stored


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 33])
def test_points_that_are_exact(target: str, count: int) -> None:
    def at(function: str, u: float) -> set[float]:
        return set(bicm_emulator.evaluate(target, function, np.full(count, u, np.float32)).tolist())

    assert at("log", 1.0) == {0.0}
    quarter_turns = [(0.25, 0.0, 1.0), (0.5, -1.0, 0.0), (0.75, 0.0, -1.0), (1.0, 1.0, 0.0)]
    for u, cosine, sine in quarter_turns:
        assert at("cos", u) == {cosine}
        assert at("sin", u) == {sine}


def test_a_wrong_constant_would_be_seen() -> None:
    """Two ulp is a tight bound: an argument that is off by one bit pattern exceeds it."""
    u = np.linspace(0.01, 0.9, 1000, dtype=np.float32)
    shifted = np.nextafter(u, np.float32(2))
    got = bicm_emulator.evaluate(BEST, "log", shifted)
    exact = np.log(u.astype(np.float64))
    assert np.max(np.abs(got - exact) / np.spacing(np.abs(exact).astype(np.float32))) > 2.0
