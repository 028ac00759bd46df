"""Gaussian steps and densities: values, and the bits on which a step and the density of its result agree."""

from __future__ import annotations

from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor

import bicm_kernels as bk
from bicm_kernels import backend, reference
from tests.support import instruction_sets
from tests.support.gaussian_calls import (
    DTYPES,
    FORMS,
    KEY,
    form,
    log_density,
    mean_of,
    opened,
    operands,
    plain_log_prob,
)
from tests.support.tensors import BF16, F16, F32, F64, LAYOUTS, Bits, Threads, random

SHAPES = [(3, 5), (2, 3, 4, 4), (2, 1025), (3, 70_001)]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(("state", "network"), DTYPES)
def test_values(
    each_backend: str, state: torch.dtype, network: torch.dtype, name: str, reduction: str, same_bits: Bits
) -> None:
    """The after state has the bits of ``affine_step``; its log-probability, a few roundings of what float64 gives."""
    for shape in SHAPES[: 2 if each_backend == "reference" else 4]:
        tensors, weights, more = form(name, operands(shape, state, network))
        std = torch.linspace(0.1, 2, shape[0])
        after, log_prob = bk.gaussian_step(tensors, weights, std=std, reduction=reduction, **KEY, **more)
        same_bits(after, bk.affine_step(tensors, weights, noise_weight=std, **KEY, **more))
        exact = log_density(after, mean_of(tensors, weights, **more), std, reduction)
        wide = F64 in [x.dtype for x in opened(tensors)]
        assert log_prob.dtype == (F64 if wide else F32) and log_prob.shape == shape[:1]
        scale = 1 if reduction == "mean" else after[0].numel()
        assert (log_prob.double() - exact).abs().max() <= (1e-14 if wide else 2e-6) * scale
        same_bits(bk.gaussian_log_prob(after, tensors, weights, std=std, reduction=reduction, **more), log_prob)


@pytest.mark.parametrize("dtype", [F16, BF16, F32])
def test_the_error_is_not_above_that_of_plain_float32(dtype: torch.dtype) -> None:
    for d in (12, 4096, 100_000):
        x, v = (random(4, d, dtype=dtype, seed=k) for k in range(2))
        after, ours = bk.gaussian_step([x, v], [0.93, -0.21], std=0.3, **KEY)
        # Of the numbers that both compute with, which are float32.
        a, b, std = torch.tensor([0.93, -0.21, 0.3]).tolist()
        exact = log_density(after, mean_of([x, v], [a, b]), std)
        plain = plain_log_prob(after, x, v, 0.93, -0.21, 0.3)
        allowed = 2 * (plain.double() - exact).abs().max() + torch.finfo(F32).eps * exact.abs().max()
        assert (ours.double() - exact).abs().max() <= allowed


def test_against_scipy(each_backend: str) -> None:
    after, x, v = (random(3, 50, dtype=F64, seed=k) for k in range(3))
    ours = bk.gaussian_log_prob(after, [x, v], [0.9, -0.3], std=0.7, reduction="sum")
    exact = scipy.stats.norm(loc=(0.9 * x - 0.3 * v).numpy(), scale=0.7).logpdf(after.numpy()).sum(1)
    torch.testing.assert_close(ours, torch.from_numpy(exact), rtol=1e-14, atol=0)
    ours = bk.gaussian_kl([x, v], [x, after], [0.9, -0.3], std=0.7, reduction="sum")
    exact = ((0.3 * (v - after)) ** 2).sum(1) / (2 * 0.7**2)
    torch.testing.assert_close(ours, exact, rtol=1e-13, atol=0)


@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
@pytest.mark.parametrize("d", [(7,), (4, 16, 16), (3, 40, 40)])
def test_the_ratio_is_exactly_one(each_backend: str, dtype: torch.dtype, batch: int, d: tuple[int, ...]) -> None:
    """Between rollout and training, alone, in a batch, and in two shards."""
    x, v = (random(batch, *d, dtype=dtype, seed=k) for k in range(2))
    std, weights = torch.linspace(0.05, 1, batch), [torch.linspace(0.9, 1, batch), -0.125]
    after, old = bk.gaussian_step([x, v], weights, std=std, **KEY)

    def again(begin: int, end: int) -> Tensor:
        some = slice(begin, end)
        leaf = v[some].clone().requires_grad_()
        return bk.gaussian_log_prob(after[some], [x[some], leaf], [weights[0][some], -0.125], std=std[some]).detach()

    halves = torch.cat([again(0, batch // 2), again(batch // 2, batch)])
    alone = torch.cat([again(k, k + 1) for k in range(0, batch, 13)])
    for new, before in ((again(0, batch), old), (halves, old), (alone, old[::13])):
        assert torch.equal((new - before).exp(), torch.ones_like(before))
    shard, log_prob = bk.gaussian_step(
        [x[-1:], v[-1:]], [weights[0][-1:], -0.125], std=std[-1:], seed=5, step=2, sample_id=3 + batch - 1
    )
    assert torch.equal(shard, after[-1:]) and torch.equal(log_prob, old[-1:])


@pytest.mark.parametrize("shape", [(40, 64), (9, 5000), (3, 150_000), (2, 3, 50, 60)])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_sample_does_not_depend_on_its_batch_or_the_threads(
    dtype: torch.dtype, shape: tuple[int, ...], same_bits: Bits, threads: Threads
) -> None:
    batch = shape[0]
    tensors = [random(*shape, dtype=dtype, seed=k) for k in range(3)]
    std = torch.linspace(0.1, 2, batch)

    def part(begin: int, end: int) -> list[Tensor]:
        after, x, v = (y[begin:end].detach().requires_grad_() for y in tensors)
        value = bk.gaussian_log_prob(after, [x, v], [0.9, -0.2], std=std[begin:end])
        value = value + bk.gaussian_kl([x, v], [x.detach(), after], [0.9, -0.2], std=std[begin:end])
        with torch.no_grad():
            step = bk.gaussian_step([x, v], [0.9, -0.2], std=std[begin:end], seed=1, sample_id=begin)
        return [value.detach(), *step, *torch.autograd.grad(value.sum(), [after, x, v])]

    whole = part(0, batch)
    for count in (1, 2, 3):
        with threads(count):
            for actual, expected in zip(part(0, batch), whole, strict=True):
                same_bits(actual, expected)
    for begin, end in [(0, 1), (batch - 1, batch), (1, batch)]:
        for actual, expected in zip(part(begin, end), whole, strict=True):
            same_bits(actual, expected[begin:end])


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [F32, BF16, F64])
def test_layouts(each_backend: str, name: str, dtype: torch.dtype, same_bits: Bits) -> None:
    """Elements are visited in their logical order, so no bit depends on where they lie."""
    x, v, other = (LAYOUTS[name](random(4, 3, 6, 5, dtype=dtype, seed=k)) for k in range(3))
    after, log_prob = bk.gaussian_step([x, (v, other)], [0.9, -0.2], std=0.4, guidance_scale=3.0, **KEY)
    plain = [y.clone(memory_format=torch.contiguous_format) for y in (x, v, other)]
    wanted, density = bk.gaussian_step(
        [plain[0], (plain[1], plain[2])], [0.9, -0.2], std=0.4, guidance_scale=3.0, **KEY
    )
    same_bits(after, wanted)
    same_bits(log_prob, density)
    assert after.stride() == torch.empty_like(x).stride()
    same_bits(
        bk.gaussian_log_prob(after, [x, v], [0.9, -0.2], std=0.4),
        bk.gaussian_log_prob(wanted, plain[:2], [0.9, -0.2], std=0.4),
    )
    same_bits(
        bk.gaussian_kl([x, v], [x, other], [0.9, -0.2], std=0.4),
        bk.gaussian_kl(plain[:2], [plain[0], plain[2]], [0.9, -0.2], std=0.4),
    )


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
def test_native_and_reference_agree(dtype: torch.dtype, same_bits: Bits) -> None:
    """The states to the bit; the densities, whose sums are cut elsewhere, to their last digits."""
    x, v, other = (random(3, 2, 9, 70, dtype=dtype, seed=k) for k in range(3))
    for std in (0.3, torch.tensor([0.0, 1.0, 0.2]), 0.0):
        ours = bk.gaussian_step([x, v], [0.9, -0.2], std=std, **KEY)
        plain = reference.gaussian_step([x, v], [0.9, -0.2], std=std, **KEY)
        same_bits(ours[0], plain[0])
        torch.testing.assert_close(ours[1], plain[1], rtol=1e-6 if dtype != F64 else 1e-13, atol=1e-7)
        ours = bk.gaussian_kl([x, v], [x, other], [0.9, -0.2], std=std)
        plain = reference.gaussian_kl([x, v], [x, other], [0.9, -0.2], std=std)
        torch.testing.assert_close(ours, plain, rtol=1e-6 if dtype != F64 else 1e-13, atol=0)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_a_std_of_zero_is_no_policy(each_backend: str, dtype: torch.dtype, same_bits: Bits) -> None:
    """Deterministic steps of a window: the mean, a log-probability of 0, and no gradient."""
    x, v = (random(3, 20, dtype=dtype, seed=k) for k in range(2))
    std = torch.tensor([0.5, 0.0, 0.2])
    after, log_prob = bk.gaussian_step([x, v], [0.9, -0.2], std=std, **KEY)
    same_bits(after[1:2], bk.affine_step([x[1:2], v[1:2]], [0.9, -0.2]))
    assert log_prob[1] == 0 and log_prob[0] != 0
    leaf = v.clone().requires_grad_()
    value = bk.gaussian_log_prob(after, [x, leaf], [0.9, -0.2], std=std)
    divergence = bk.gaussian_kl([x, leaf], [x, x], [0.9, -0.2], std=std)
    assert divergence[1] == 0 and divergence[0] > 0
    (gradient,) = torch.autograd.grad((value + divergence).sum(), leaf)
    assert not gradient[1].any() and gradient[0].all()
    none, zero = bk.gaussian_step([x, v], [0.9, -0.2], std=0.0, seed=None)
    same_bits(none, bk.affine_step([x, v], [0.9, -0.2]))
    assert torch.equal(zero, torch.zeros(3))


def test_nothing_to_sum(each_backend: str) -> None:
    for shape in ((0, 4), (0, 2, 3, 3)):
        x = torch.empty(shape).requires_grad_()
        after, log_prob = bk.gaussian_step([x, x], [1.0, 1.0], std=1.0, seed=1)
        assert after.shape == shape and log_prob.shape == (0,)
        value = bk.gaussian_log_prob(after.detach(), [x, x], [1.0, 1.0], std=1.0)
        assert torch.autograd.grad(value.sum(), x)[0].shape == shape
        assert bk.gaussian_kl([x], [x], [1.0], std=1.0).shape == (0,)
    x = torch.empty(2, 0)
    assert bk.gaussian_step([x], [1.0], std=1.0, seed=1, reduction="sum")[1].tolist() == [0.0, 0.0]
    assert bk.gaussian_log_prob(x, [x], [1.0], std=1.0).isnan().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_sample(each_backend: str, bad: float) -> None:
    x, v = random(3, 2000), random(3, 2000, seed=1)
    x[1, 777] = bad
    after, log_prob = bk.gaussian_step([x, v], [0.9, -0.2], std=0.3, **KEY)
    assert log_prob.isfinite().tolist() == [True, False, True]
    assert bk.gaussian_log_prob(after, [x, v], [0.9, -0.2], std=0.3).isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("std", [1e-30, 1e-12, 1e15])
def test_extreme_deviations(std: float) -> None:
    """Neither the quotient nor the gradient's factor leaves float32's range before its product has to."""
    x = random(2, 300)
    after = x + std * random(2, 300, seed=1)
    mean = torch.zeros_like(x).requires_grad_()
    ours = bk.gaussian_log_prob(after - x, [mean], [1.0], std=std)
    exact = log_density(after - x, torch.zeros(2, 300, dtype=F64), std)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(ours.sum(), mean)
    wanted = (after - x).double() / (torch.tensor(std, dtype=F32).double() ** 2 * 300)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-6, atol=1e-45)


DIGEST = """
import hashlib, torch, bicm_kernels as bk
def digest_all():
    digest = hashlib.sha256()
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for shape in [(1, 1), (3, 67), (5, 1025), (2, 140_003), (700, 3, 32, 32)]:
            x, v, other = (bk.normal(shape, seed=k, dtype=dtype).requires_grad_() for k in range(3))
            std = torch.linspace(0.1, 3, shape[0])
            with torch.no_grad():
                after, log_prob = bk.gaussian_step([x, (v, other)], [0.9, 0.2], std=std, guidance_scale=2.0, seed=1)
            value = bk.gaussian_log_prob(after, [x, (v, other)], [0.9, 0.2], std=std, guidance_scale=2.0)
            value = value + bk.gaussian_kl([x, v], [x, other], [0.9, 0.2], std=std)
            for y in (after, log_prob, value, *torch.autograd.grad(value.sum(), [x, v, other])):
                digest.update(y.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
"""


@pytest.mark.parametrize("instructions", instruction_sets.EVERY)
def test_instruction_sets_and_threads_give_one_digest(python: Any, instructions: str) -> None:
    instruction_sets.need(instructions)
    space: dict[str, Any] = {}
    exec(DIGEST, space)
    program = DIGEST + "for n in (1, 2):\n    torch.set_num_threads(n)\n    print(digest_all())\n"
    one, two = python(program, BICM_KERNELS_ISA=instructions).stdout.splitlines()
    assert one == two == space["digest_all"]()


def test_the_score_has_mean_zero() -> None:
    """A policy gradient adds nothing where every reward is the same: the score is 0 in the mean over the noise."""
    draws, x, v = 4000, random(1, 6), random(1, 6, seed=1)
    xs, vs = x.expand(draws, 6), v.expand(draws, 6).clone().requires_grad_()
    after, _ = bk.gaussian_step([xs, vs.detach()], [0.9, -0.4], std=0.7, seed=3)
    value = bk.gaussian_log_prob(after, [xs, vs], [0.9, -0.4], std=0.7, reduction="sum")
    (score,) = torch.autograd.grad(value.sum(), vs)
    error = 0.4 / 0.7 / draws**0.5  # of the mean: the score's standard deviation is |w|/s
    assert (score.mean(0).abs() < 5 * error).all()
    # Its variance is the Fisher information, w^2 / s^2.
    torch.testing.assert_close(score.var(0), torch.full((6,), (0.4 / 0.7) ** 2), rtol=0.12, atol=0)


def test_a_policy_gradient_in_closed_form() -> None:
    """Reward -|after - c|^2 of a linear step: the gradient of its expectation in the mean is -2 (m - c)."""
    draws, target = 200_000, 0.7
    theta = torch.zeros(draws, 1, requires_grad=True)
    after, _ = bk.gaussian_step([theta.detach()], [1.0], std=0.5, seed=11)
    reward = -((after - target) ** 2).flatten()
    value = bk.gaussian_log_prob(after, [theta], [1.0], std=0.5)
    (gradient,) = torch.autograd.grad((value * (reward - reward.mean())).sum(), theta)
    samples = gradient.flatten()
    assert abs(samples.mean() - 2 * target) < 5 * samples.std() / draws**0.5


def test_kernels_run_and_say_so() -> None:
    with backend.use("native"):
        assert hasattr(backend.direct, "gaussian_step")
