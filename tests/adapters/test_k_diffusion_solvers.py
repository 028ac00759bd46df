"""k-diffusion's samplers with noise and its linear multistep sampler, against those methods written plainly.

Where k-diffusion is installed, against its own functions too: results, and what noise samplers are asked for.
"""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from bicm_diffusion.adapters import k_diffusion
from bicm_diffusion.adapters.k_diffusion import (
    brownian_noise_sampler,
    keyed_noise_sampler,
    sample_dpmpp_2m_sde,
    sample_dpmpp_2s_ancestral,
    sample_dpmpp_3m_sde,
    sample_dpmpp_sde,
    sample_lms,
)
from bicm_diffusion.adapters.k_diffusion.solvers import polynomial_weights

Noise = Callable[[Tensor, Tensor], Tensor]
SHAPE = (3, 8, 64)


def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    level = sigma.reshape(-1, 1, 1).to(x.dtype)
    return torch.tanh(0.25 * x / (0.25 + level**2))


def grid(steps: int = 8, dtype: torch.dtype = torch.float64) -> Tensor:
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    levels = (80 ** (1 / 7) + ramp * (0.02 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    return torch.cat([levels, levels.new_zeros(1)]).to(dtype)


def start(dtype: torch.dtype = torch.float64) -> Tensor:
    return 80 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


class Noises:
    """A noise sampler that remembers what it was asked for; its k-th answer is the same numbers in any dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.asked = dtype, list[tuple[Tensor, Tensor]]()

    def __call__(self, sigma: Tensor, below: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(len(self.asked))
        self.asked.append((sigma, below))
        return torch.randn(SHAPE, generator=generator).to(torch.bfloat16).to(self.dtype)


# --- the methods, written plainly -------------------------------------------------------------------------------------
def down_and_up(level: Tensor, below: Tensor, eta: float) -> tuple[Tensor, Any]:
    if not eta:
        return below, 0.0
    up = min(below, eta * (below**2 * (level**2 - below**2) / level**2) ** 0.5)
    return (below**2 - up**2) ** 0.5, up


def plain_2s(x: Tensor, sigmas: Tensor, noise: Noise, eta: float, s_noise: Any) -> Tensor:
    for level, below in pairwise(sigmas):
        denoised = denoiser(x, level.expand(3))
        down, up = down_and_up(level, below, eta)
        if down > 0:
            h = (level / down).log()
            middle = (-h / 2).exp() * x - (-h / 2).expm1() * denoised
            denoised = denoiser(middle, (level * (-h / 2).exp()).expand(3))
            x = (-h).exp() * x - (-h).expm1() * denoised
        else:
            x = x + (x - denoised) / level * (down - level)
        if below > 0:
            x = x + noise(level, below) * s_noise * up
    return x


def plain_sde(x: Tensor, sigmas: Tensor, noise: Noise, eta: float, s_noise: Any, r: float = 0.5) -> Tensor:
    for level, below in pairwise(sigmas):
        denoised = denoiser(x, level.expand(3))
        if below == 0:
            x = denoised
            continue
        between = (level.log() + r * (below.log() - level.log())).exp()
        down, up = down_and_up(level, between, eta)
        middle = down / level * x + (1 - down / level) * denoised + noise(level, between) * s_noise * up
        second = denoiser(middle, between.expand(3))
        down, up = down_and_up(level, below, eta)
        mixed = denoised + (second - denoised) / (2 * r)
        x = down / level * x + (1 - down / level) * mixed + noise(level, below) * s_noise * up
    return x


def plain_multistep(order: int, heun: bool) -> Callable[..., Tensor]:
    def sample(x: Tensor, sigmas: Tensor, noise: Noise, eta: float, s_noise: Any) -> Tensor:
        before: list[Tensor] = []
        lengths: list[Tensor] = []
        for level, below in pairwise(sigmas):
            denoised = denoiser(x, level.expand(3))
            if below == 0:
                x = denoised
                continue
            h = level.log() - below.log()
            whole = h * (1 + eta)
            gain = -(-whole).expm1()
            x = (-whole).exp() * x + gain * denoised
            phi = 1 - gain / whole
            if len(before) == 1:
                slope = (denoised - before[0]) * h / lengths[0]
                x = x + (phi if heun or order == 3 else gain / 2) * slope
            elif len(before) == 2:
                r0, r1 = lengths[0] / h, lengths[1] / h
                near, far = (denoised - before[0]) / r0, (before[0] - before[1]) / r1
                first = near + (near - far) * r0 / (r0 + r1)
                x = x + phi * first - (phi / whole - 0.5) * (near - far) / (r0 + r1)
            if eta:
                x = x + noise(level, below) * below * (-(-2 * h * eta).expm1()).sqrt() * s_noise
            before, lengths = [denoised, *before][: order - 1], [h, *lengths][: order - 1]
        return x

    return sample


def plain_lms(x: Tensor, sigmas: Tensor, order: int = 4) -> Tensor:
    """Each Lagrange polynomial integrated by Gauss's rule, which is exact for it."""
    at, share = (0.9061798459386640, 0.5384693101056831), (0.2369268850561891, 0.4786286704993665)
    nodes = torch.tensor([-at[0], -at[1], 0.0, at[1], at[0]], dtype=torch.float64)
    shares = torch.tensor([*share, 2.0 - 2.0 * sum(share), *share[::-1]], dtype=torch.float64)
    slopes: list[Tensor] = []
    for i in range(len(sigmas) - 1):
        slopes = [(x - denoiser(x, sigmas[i].expand(3))) / sigmas[i], *slopes][:order]
        known = sigmas.double()[torch.arange(i, i - len(slopes), -1)]
        half, middle = (sigmas[i + 1] - sigmas[i]).double() / 2, (sigmas[i + 1] + sigmas[i]).double() / 2
        for j, slope in enumerate(slopes):
            others = torch.cat([known[:j], known[j + 1 :]])
            values = ((middle + half * nodes)[:, None] - others).prod(1) / (known[j] - others).prod()
            x = x + (half * (shares * values).sum()).to(x.dtype) * slope
    return x


METHODS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "2s": (sample_dpmpp_2s_ancestral, plain_2s, {}),
    "sde": (sample_dpmpp_sde, plain_sde, {}),
    "sde, r": (sample_dpmpp_sde, lambda *a: plain_sde(*a, r=0.3), {"r": 0.3}),
    "2m": (sample_dpmpp_2m_sde, plain_multistep(2, False), {}),
    "2m, heun": (sample_dpmpp_2m_sde, plain_multistep(2, True), {"solver_type": "heun"}),
    "3m": (sample_dpmpp_3m_sde, plain_multistep(3, False), {}),
}
methods = pytest.mark.parametrize("name", METHODS)
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@methods
@pytest.mark.parametrize("eta", [1.0, 0.5, 0.0, 1.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samplers_are_their_formulas(name: str, dtype: torch.dtype, eta: float) -> None:
    ours, plain, options = METHODS[name]
    levels = torch.float64 if dtype is torch.float64 else torch.float32
    asked, expected = Noises(dtype), Noises(torch.float64)
    sigmas = grid(dtype=levels)
    mine = ours(denoiser, start(dtype), sigmas, disable=True, eta=eta, s_noise=0.9, noise_sampler=asked, **options)
    truth = plain(start(dtype).double(), sigmas.double(), expected, eta, 0.9)
    assert mine.dtype == dtype and len(asked.asked) == len(expected.asked)
    for one, other in zip(asked.asked, expected.asked, strict=True):
        for mine_, theirs in zip(one, other, strict=True):
            torch.testing.assert_close(mine_.double(), theirs, rtol=1e-6, atol=0)
    if dtype is torch.float64:
        torch.testing.assert_close(mine, truth, rtol=0, atol=1e-11)
        return
    theirs = plain(start(dtype), sigmas.to(dtype), Noises(dtype), eta, 0.9)
    assert (mine - truth).norm() <= 2 * (theirs - truth).norm()


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_multistep_is_its_formula(order: int, told: bool, dtype: torch.dtype) -> None:
    sigmas = grid(10, torch.float64 if dtype is torch.float64 else torch.float32)
    callback = (lambda info: None) if told else None
    mine = sample_lms(denoiser, start(dtype), sigmas, callback=callback, disable=True, order=order)
    truth = plain_lms(start(dtype).double(), sigmas.double(), order)
    assert mine.dtype == dtype
    if dtype is torch.float64:
        torch.testing.assert_close(mine, truth, rtol=0, atol=1e-10)
        return
    theirs = plain_lms(start(dtype), sigmas.to(dtype), order)
    assert (mine - truth).norm() <= 2 * (theirs - truth).norm()


def test_weights_integrate_polynomials() -> None:
    levels = [5.0, 7.0, 8.5, 12.0]
    for power in range(4):
        weights = polynomial_weights(levels, 3.5)
        found = sum(w * level**power for w, level in zip(weights, levels, strict=True))
        assert found == pytest.approx((3.5 ** (power + 1) - 5.0 ** (power + 1)) / (power + 1), rel=1e-12)


@methods
def test_a_callback_may_write_and_deviations_may_be_a_tensor(name: str) -> None:
    ours, plain, options = METHODS[name]
    deviations = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64).reshape(3, 1, 1)
    seen: list[dict[str, Any]] = []
    common = {"disable": True, "callback": seen.append, "s_noise": deviations, **options}
    mine = ours(denoiser, start(), grid(), noise_sampler=Noises(torch.float64), **common)
    torch.testing.assert_close(mine, plain(start(), grid(), Noises(torch.float64), 1.0, deviations), rtol=0, atol=1e-11)
    assert [info["i"] for info in seen] == list(range(8))
    assert {"x", "i", "sigma", "sigma_hat", "denoised"} == set(seen[0])
    once = grid(1)  # one step, to 0: the denoised sample
    moved = ours(
        denoiser, start(), once, callback=lambda info: info["x"].add_(5.0), noise_sampler=Noises(torch.float64),
        disable=True, **options,
    )  # fmt: skip
    torch.testing.assert_close(moved, denoiser(start(), once[:1].expand(3)), rtol=0, atol=1e-12)


def test_linear_multistep_takes_what_a_callback_writes() -> None:
    """The slope is that of the state before it, which then goes on from where it was moved."""
    mine = sample_lms(denoiser, start(), grid(1), callback=lambda info: info["x"].add_(5.0), disable=True)
    torch.testing.assert_close(mine, denoiser(start(), grid(1)[:1].expand(3)) + 5.0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [*METHODS, "lms"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_callback_that_only_reads_changes_no_bit(name: str, dtype: torch.dtype) -> None:
    ours, options = (sample_lms, {}) if name == "lms" else (METHODS[name][0], METHODS[name][2])
    sigmas = grid(10, torch.float64 if dtype is torch.float64 else torch.float32)
    ends = []
    for callback in (None, lambda info: None):
        noise = {} if name == "lms" else {"noise_sampler": Noises(dtype)}
        ends.append(ours(denoiser, start(dtype), sigmas, callback=callback, disable=True, **noise, **options))
    assert torch.equal(*ends)


@pytest.mark.parametrize("name", [*METHODS, "lms"])
def test_levels_that_repeat_or_rise(name: str) -> None:
    ours, options = (sample_lms, {}) if name == "lms" else (METHODS[name][0], METHODS[name][2])
    if name != "lms":
        options = {**options, "eta": 0.0, "noise_sampler": Noises(torch.float64)}
    x, sigmas = start(), torch.tensor([8.0, 4.0, 4.0, 1.0, 0.0], dtype=torch.float64)
    once = ours(denoiser, x, sigmas[[0, 1, 3, 4]], disable=True, **options)
    twice = ours(denoiser, x, sigmas, disable=True, **options)
    torch.testing.assert_close(twice, once, rtol=0, atol=1e-12)
    if name in ("2s", "sde", "sde, r"):
        with pytest.raises(ValueError, match=r"sigmas: expected levels that do not rise, got 4.0 and then"):
            ours(denoiser, x, torch.tensor([8.0, 4.0, 5.0, 0.0]), disable=True, **options)


@methods
def test_keyed_noise_makes_a_sample_what_it_is_in_any_batch(name: str) -> None:
    ours, _, options = METHODS[name]
    x, sigmas = start(torch.float32), grid(dtype=torch.float32)
    ends = []
    for rows, first in ((slice(None), 0), (slice(1, 2), 1)):
        noise = keyed_noise_sampler(x[rows], sigmas, seed=3, sample_id=first)
        ends.append(ours(denoiser, x[rows], sigmas, disable=True, noise_sampler=noise, **options))
    assert torch.equal(ends[0][1:2], ends[1])


def test_what_is_out_of_range_is_named() -> None:
    noise: Any = {"noise_sampler": Noises(torch.float64), "disable": True}
    with pytest.raises(ValueError, match="solver_type: expected 'heun' or 'midpoint', got 'euler'"):
        sample_dpmpp_2m_sde(denoiser, start(), grid(), solver_type="euler", **noise)
    with pytest.raises(ValueError, match="order: expected at least 1, got 0"):
        sample_lms(denoiser, start(), grid(), order=0)
    for ours, _, options in METHODS.values():
        with pytest.raises(TypeError, match="x: expected a tensor, got 3"):
            ours(denoiser, 3, grid(), **noise, **options)


# --- the Brownian path ------------------------------------------------------------------------------------------------
class Path:
    """In place of torchsde's tree: it answers the interval's length, and says what it was made with."""

    made: list[dict[str, Any]] = []  # noqa: RUF012

    def __init__(self, t0: Any, w0: Tensor, t1: Any, entropy: int) -> None:
        self.w0 = w0
        Path.made.append({"t0": float(t0), "t1": float(t1), "entropy": entropy})

    def __call__(self, t0: Tensor, t1: Tensor) -> Tensor:
        assert t0 <= t1
        return self.w0 + (t1 - t0)


def test_the_noise_of_sde_samplers_is_a_brownian_path_s(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = ModuleType("torchsde")
    stub.BrownianTree = Path  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchsde", stub)
    x, sigmas = start(torch.float32), grid(dtype=torch.float32)
    torch.manual_seed(0)
    seed = torch.randint(0, 2**63 - 1, []).item()
    torch.manual_seed(0)
    noise = brownian_noise_sampler(x, sigmas)
    known = Path.made.pop()
    assert known == {"t0": sigmas[-2].item(), "t1": sigmas[0].item(), "entropy": seed}
    length = math.sqrt(float(sigmas[0] - sigmas[1]))
    torch.testing.assert_close(noise(sigmas[0], sigmas[1]), torch.full_like(x, -length))
    torch.testing.assert_close(noise(sigmas[1], sigmas[0]), torch.full_like(x, length))
    brownian_noise_sampler(x, sigmas, seed=5)
    assert Path.made.pop()["entropy"] == 5
    for ours in (sample_dpmpp_sde, sample_dpmpp_2m_sde, sample_dpmpp_3m_sde):
        torch.manual_seed(0)
        alone = ours(denoiser, x, sigmas, disable=True)
        torch.testing.assert_close(alone, ours(denoiser, x, sigmas, disable=True, noise_sampler=noise))
        assert Path.made.pop() == known


def test_without_torchsde_a_noise_sampler_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchsde", None)
    for ours in (sample_dpmpp_sde, sample_dpmpp_2m_sde, sample_dpmpp_3m_sde):
        with pytest.raises(ImportError, match=r"torchsde is not installed: .*or pass noise_sampler="):
            ours(denoiser, start(), grid(), disable=True)


# --- k-diffusion's own ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [*METHODS, "lms"])
@pytest.mark.parametrize("eta", [1.0, 0.5, 0.0])
def test_k_diffusion_s_own_functions(name: str, eta: float) -> None:
    theirs_ = pytest.importorskip("k_diffusion.sampling", reason="compares with k-diffusion where it is installed")
    ours, options = (sample_lms, {}) if name == "lms" else (METHODS[name][0], METHODS[name][2])
    theirs = getattr(theirs_, ours.__name__)
    names = [(p.name, p.default) for p in inspect.signature(ours).parameters.values()]
    assert names == [(p.name, p.default) for p in inspect.signature(theirs).parameters.values()]
    for dtype, near in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        results, asked = [], []
        for sample in (ours, theirs):
            noises = Noises(dtype)
            more = {} if name == "lms" else {"noise_sampler": noises, "eta": eta, "s_noise": 0.9}
            results.append(sample(denoiser, start(dtype), grid(dtype=dtype), disable=True, **more, **options))
            asked.append(noises.asked)
        torch.testing.assert_close(results[0], results[1], rtol=near, atol=near)
        assert len(asked[0]) == len(asked[1])
        assert all(
            torch.equal(a, b) for one, other in zip(*asked, strict=True) for a, b in zip(one, other, strict=True)
        )


def test_every_name_is_there() -> None:
    assert all(hasattr(importlib.import_module(k_diffusion.__name__), name) for name in k_diffusion.__all__)


@pytest.mark.parametrize("sampler", [k_diffusion.sample_dpmpp_2m_sde, k_diffusion.sample_dpmpp_3m_sde])
def test_rising_levels_are_named(sampler: Any) -> None:
    x = torch.ones(2, 3)
    rising = torch.tensor([1.0, 2.0, 0.0])
    with pytest.raises(ValueError, match=r"sigmas: expected levels that do not rise, got 1.0 and then 2.0"):
        sampler(lambda x, sigma: 0 * x, x, rising, disable=True, noise_sampler=lambda a, b: torch.zeros_like(x))


def test_a_loss_trains_after_it_was_evaluated_in_inference_mode() -> None:
    weight = torch.ones((), requires_grad=True)
    denoiser = k_diffusion.Denoiser(lambda x, sigma: weight * x, scales=3)
    x, sigma = torch.randn(2, 3, 6, 10), torch.ones(2)
    with torch.inference_mode():
        denoiser.loss(x, torch.ones_like(x), sigma)
    denoiser.loss(x, torch.ones_like(x), sigma).sum().backward()
    assert weight.grad is not None
