"""Preconditioning: closed forms, the reference's bits, accuracy, derivatives, tracing, errors."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import bicm_kernels as bk
from bicm_kernels import reference
from tests.support.tensors import BF16, F16, F32, F64, Bits, random

DTYPES = [(F32, F32), (F32, BF16), (F32, F16), (BF16, BF16), (F16, F16), (F64, F64), (F64, F32)]
PARAMETERIZATIONS = ["bcm", "cm", "edm"]
SD, EPS = 0.5, 0.002

levels = st.floats(0, 80, allow_nan=False)


def weights(t: float, u: float | None = None, parameterization: str = "bcm") -> tuple[float, float]:
    """c_skip and c_out in float64, read off the op itself."""
    one, zero = torch.ones(1, 1, dtype=F64), torch.zeros(1, 1, dtype=F64)
    options: dict[str, Any] = {"parameterization": parameterization}
    return bk.denoise(one, zero, t, u, **options).item(), bk.denoise(zero, one, t, u, **options).item()


# --- closed forms (BCM appendix) --------------------------------------------------------------------------------------


@given(levels)
def test_bcm_stays_where_it_is_exactly(t: float) -> None:
    for dtype in (F32, F64):
        x, F = random(1, 5, dtype=dtype), random(1, 5, dtype=dtype, seed=1)
        assert torch.equal(bk.denoise(x, F, t, t), x)


@given(levels, levels)
def test_bcm_weights_are_the_formula(t: float, u: float) -> None:
    c_skip, c_out = weights(t, u)
    s = SD**2 + t**2
    assert c_skip == pytest.approx((SD**2 + t * u) / s, rel=1e-14)
    assert c_out == pytest.approx(SD * (t - u) / math.sqrt(s), rel=1e-13, abs=1e-300)


@given(st.floats(0.01, 80), levels)
def test_c_out_is_least_and_the_target_has_unit_variance(t: float, u: float) -> None:
    # BCM eq. 36: c_out^2(c) = variance of x_u - c x_t, least at c = c_skip; eq. 32: the target over c_out is standard.
    c_skip, c_out = weights(t, u)

    def variance(c: float) -> float:
        return (1 - c) ** 2 * SD**2 + (u - c * t) ** 2

    # x_u - c_skip x_t cancels where u is near t: compare against the size of what is subtracted.
    size = SD**2 + u**2 + (c_skip * t) ** 2
    assert c_out**2 == pytest.approx(variance(c_skip), rel=1e-9, abs=1e-13 * size)
    assert variance(c_skip) <= variance(c_skip * 1.01) + 1e-13 * size
    assert variance(c_skip) <= variance(c_skip * 0.99) + 1e-13 * size


@given(levels)
def test_bcm_near_cm_and_at_zero_edm(t: float) -> None:
    assert abs(weights(t)[0] - weights(t, parameterization="cm")[0]) <= EPS / (2 * SD)  # BCM eq. 53
    assert weights(t, 0.0) == weights(t, parameterization="edm")


def test_two_time_gaussian_flow() -> None:
    # For x ~ N(0, s^2) the exact flow is linear (GC eq. 90): the network's output that reaches it is linear in x too.
    s, x = 1.3, random(4, 6, dtype=F64)
    t, u = torch.tensor([80.0, 3.0, 0.5, 0.002], dtype=F64), torch.tensor([0.002, 5.0, 0.1, 80.0], dtype=F64)
    exact = ((s**2 + u**2) / (s**2 + t**2)).sqrt()[:, None] * x
    c_skip, c_out = (
        torch.tensor(w, dtype=F64)[:, None] for w in zip(*map(weights, t.tolist(), u.tolist()), strict=True)
    )
    F = (exact - c_skip * x) / c_out
    torch.testing.assert_close(bk.denoise(x, F, t, u), exact, rtol=1e-12, atol=1e-12)
    # Edm's denoiser for sigma_data = s is the posterior mean with F = 0.
    mean = (s**2 / (s**2 + t**2))[:, None] * x
    torch.testing.assert_close(bk.denoise(x, 0 * x, t, parameterization="edm", sigma_data=s), mean, rtol=1e-14, atol=0)


def test_scaled_input_has_unit_variance() -> None:
    for t in (0.0, 0.002, 1.0, 80.0):
        scale = bk.scale_input(torch.ones(1, 1, dtype=F64), t).item()
        assert scale**2 * (SD**2 + t**2) == pytest.approx(1, rel=1e-14)


# --- the reference's bits, and accuracy -------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "sliced": lambda x: x[:, :, 1:, ::2],
    "expanded": lambda x: x[:, :1].expand_as(x),
    "transposed": lambda x: x.transpose(1, 3),
}
KEY = {"seed": 4, "step": 2, "sample_id": 7}


def results(module: Any, x: Tensor, F: Tensor, t: Any, u: Any, parameterization: str) -> list[Tensor]:
    options: dict[str, Any] = {"parameterization": parameterization}
    u = u if parameterization == "bcm" else None
    following = 0.3 if u is None else u
    return [
        module.denoise(x, F, t, u, **options),
        module.denoise(x, F, t, u, scaled=True, **options),
        module.scale_input(x, t),
        *module.renoise(x, F, t, u, 0.7, next_sigma=following, **KEY, **options),
        *module.renoise(x, F, t, u, 0.0, **KEY, **options),
    ]


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize(("states", "network"), DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits(layout: str, states: torch.dtype, network: torch.dtype, parameterization: str, same_bits: Bits) -> None:
    x, F = (LAYOUTS[layout](random(5, 3, 8, 8, dtype=d, seed=k)) for k, d in enumerate((states, network)))
    t, u = torch.rand(5, dtype=F64) * 80, torch.rand(5) * 80
    for numbers in ((3.3, 0.4), (torch.tensor(3.3), torch.tensor(0.4)), (t, u), (t, 0.4)):
        ours, plain = (results(m, x, F, *numbers, parameterization) for m in (bk, reference))
        for actual, expected in zip(ours, plain, strict=True):
            same_bits(actual, expected)
            assert actual.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("shape", [(1,), (3, 1), (2, 1025), (0, 3), (2, 0), (130, 63)])
def test_sizes(shape: tuple[int, ...], same_bits: Bits) -> None:
    x, F = random(*shape), random(*shape, seed=1)
    for parameterization in PARAMETERIZATIONS:
        ours, plain = (results(m, x, F, 3.3, 0.4, parameterization) for m in (bk, reference))
        for actual, expected in zip(ours, plain, strict=True):
            same_bits(actual, expected)


@pytest.mark.parametrize(("states", "network"), DTYPES[:5])
def test_accuracy_against_eager(states: torch.dtype, network: torch.dtype) -> None:
    x, F = random(64, 300, dtype=states), random(64, 300, dtype=network, seed=1)
    t, u = torch.linspace(0, 80, 64), torch.linspace(30, 0.1, 64)

    def formula(x: Tensor, F: Tensor, t: Tensor, u: Tensor) -> Tensor:
        t, u = t[:, None].to(x.dtype), u[:, None].to(x.dtype)
        s = SD**2 + t**2
        return (SD**2 + t * u) / s * x + SD * (t - u) / s.sqrt() * F.to(x.dtype)

    exact = formula(x.double(), F.double(), t.double(), u.double())
    ours = (bk.denoise(x, F, t, u).double() - exact).abs()
    eager = (formula(x, F, t, u).double() - exact).abs()
    assert ours.max() <= 2 * eager.max()
    assert ours.mean() <= 2 * eager.mean()


def test_zigzag_in_one_pass_is_its_parts(same_bits: Bits) -> None:
    x, F, t = random(3, 3, 8, 8), random(3, 3, 8, 8, seed=1), torch.tensor([80.0, 3.0, 0.4])
    x_s, scaled = bk.renoise(x, F, t, None, 0.2, next_sigma=t, seed=1)
    same_bits(x_s, bk.add_noise(bk.denoise(x, F, t), 0.2, seed=1))
    same_bits(scaled, bk.scale_input(x_s, t))


@pytest.mark.parametrize("count", [1, 2])
def test_batch_invariance(count: int, same_bits: Bits, threads: Callable[[int], Any]) -> None:
    x, F = random(33, 3, 32, 32), random(33, 3, 32, 32, seed=1)
    t, u = torch.linspace(0.1, 80, 33), torch.linspace(3, 0.1, 33)
    with threads(count):
        whole = bk.renoise(x, F, t, u, u, seed=1)
        for b in (0, 17, 32):
            alone = bk.renoise(x[b : b + 1], F[b : b + 1], t[b], u[b], u[b], seed=1, sample_id=b)
            for all_samples, one in zip(whole, alone, strict=True):
                same_bits(all_samples[b : b + 1], one)


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_from_the_networks_input(parameterization: str) -> None:
    x, F = random(4, 6, dtype=F64), random(4, 6, dtype=F64, seed=1)
    t = torch.tensor([0.0, 0.002, 1.3, 80.0], dtype=F64)
    options: dict[str, Any] = {"parameterization": parameterization, "sigma_data": 0.7}
    u = {"u": t.flip(0)} if parameterization == "bcm" else {}
    scaled = bk.denoise(bk.scale_input(x, t, sigma_data=0.7), F, t, scaled=True, **u, **options)
    torch.testing.assert_close(scaled, bk.denoise(x, F, t, **u, **options), rtol=1e-14, atol=1e-14)


# --- derivatives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_gradients(parameterization: str, scaled: bool) -> None:
    x, F = random(3, 4, dtype=F64).requires_grad_(), random(3, 4, dtype=F64, seed=1).requires_grad_()
    t, u = (torch.rand(3, dtype=F64) + 0.5).requires_grad_(), torch.rand(3, dtype=F64).requires_grad_()
    options: dict[str, Any] = {"parameterization": parameterization, "scaled": scaled}
    target = [u] if parameterization == "bcm" else []
    fixed = [t.detach(), *(v.detach() for v in target)]

    def moved(x: Tensor, F: Tensor, *numbers: Tensor) -> Tensor:
        return bk.denoise(x, F, *numbers, **options)

    assert torch.autograd.gradcheck(lambda x, F: moved(x, F, *fixed), (x, F), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, F: moved(x, F, *fixed), (x, F))
    assert torch.autograd.gradcheck(moved, (x, F, t, *target))
    assert torch.autograd.gradcheck(lambda x: bk.scale_input(x, fixed[0]), (x,), check_batched_grad=True)
    assert torch.autograd.gradcheck(bk.scale_input, (x, t))
    assert torch.autograd.gradcheck(
        lambda x, F, s: bk.renoise(x, F, fixed[0], None, s, seed=1, parameterization=parameterization),
        (x, F, torch.tensor(0.3, dtype=F64).requires_grad_()),
    )
    assert torch.autograd.gradcheck(lambda x: moved(x, F, *fixed), (x,), check_forward_ad=True)


def test_gradients_keep_dtype_and_memory(same_bits: Bits) -> None:
    x, F = random(2, 3, 8, 8).requires_grad_(), random(2, 3, 8, 8, dtype=BF16, seed=1).requires_grad_()
    t, saved = torch.tensor([3.0, 0.2]), []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        bk.denoise(x, F, t, 0.1).backward(torch.ones_like(x))
    assert all(s.numel() <= 2 for s in saved)
    assert x.grad is not None and F.grad is not None
    assert (x.grad.dtype, F.grad.dtype) == (F32, BF16)
    plain = [v.detach().requires_grad_() for v in (x, F)]
    reference.denoise(*plain, t, 0.1).backward(torch.ones_like(x))
    for ours, theirs in zip((x, F), plain, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        same_bits(ours.grad, theirs.grad)


# --- tracing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tracked", [False, True])
def test_compiles_once_for_changing_numbers(tracked: bool, same_bits: Bits) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def body(x: Tensor, F: Tensor, t: float, u: float, sigma: float, step: int) -> tuple[Tensor, ...]:
        y, scaled = bk.renoise(x, F, t, u, sigma, seed=3, step=step)
        return y, scaled, bk.denoise(x, F, t, u), bk.scale_input(x, t)

    compiled = torch.compile(body, fullgraph=True, backend=counter)
    x, F = random(2, 3, 5).requires_grad_(tracked), random(2, 3, 5, seed=1).requires_grad_(tracked)
    for k in range(12):
        numbers = (1.1 * k + 0.3, 0.7 * k, 0.1 + 0.01 * k, k)
        for actual, expected in zip(compiled(x, F, *numbers), body(x, F, *numbers), strict=True):
            same_bits(actual, expected)
    assert counter.frame_count <= 3


def test_export(same_bits: Bits) -> None:
    class Denoiser(torch.nn.Module):
        def forward(self, x: Tensor, F: Tensor, t: Tensor) -> Tensor:
            return bk.scale_input(bk.denoise(x, F, t), t)

    arguments = (random(2, 3, 5), random(2, 3, 5, seed=1), torch.rand(2))
    exported = torch.export.export(Denoiser(), arguments)
    same_bits(exported.module()(*arguments), Denoiser()(*arguments))


def test_u_is_alike_in_denoise_and_in_the_loss(each_backend: str) -> None:
    """Its place, its default and what it means: the level to arrive at."""
    x, F = torch.randn(2, 4, 6, dtype=torch.float64)
    functions = (bk.denoise, bk.consistency_loss)
    one, other = (inspect.signature(function).parameters["u"] for function in functions)
    assert (
        (one.default, one.kind, one.annotation)
        == (other.default, other.kind, other.annotation)
        == (
            None,
            one.POSITIONAL_OR_KEYWORD,
            "Number | None",
        )
    )
    for name, options in (("bcm", {}), ("bcm", {"u": 0.3}), ("cm", {}), ("edm", {})):
        options = {**options, "parameterization": name}
        loss = bk.consistency_loss(x, F, 1.5, target=torch.zeros_like(x), c=0.0, reduction="none", **options)
        torch.testing.assert_close(loss, bk.denoise(x, F, 1.5, **options).norm(dim=1), rtol=1e-12, atol=0)
    calls: list[Callable[[], Tensor]] = [
        lambda: bk.denoise(x, F, 1.5, 0.5, parameterization="cm"),
        lambda: bk.consistency_loss(x, F, 1.5, 0.5, x, parameterization="cm"),
    ]
    messages = []
    for call in calls:
        with pytest.raises(ValueError, match="only 'bcm' takes it, got 0") as raised:
            call()
        messages.append(str(raised.value))
    assert messages[0] == messages[1]
    with pytest.raises(TypeError, match="target must be a tensor"):
        bk.consistency_loss(x, F, 1.5)


# --- errors -----------------------------------------------------------------------------------------------------------

X = torch.ones(2, 3)
WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: bk.denoise(X, X, 1.0, parameterization="vp"),
        ValueError,
        "parameterization must be one of bcm, cm, edm",
    ),
    (
        lambda: bk.denoise(X, X, 1.0, 0.5, parameterization="cm"),
        ValueError,
        "u must be None for parameterization=",
    ),
    (lambda: bk.denoise(X, X[:1], 1.0), ValueError, r"F must have the shape of x, \(2, 3\), got \(1, 3\)"),
    (lambda: bk.denoise(X, X.int(), 1.0), TypeError, "F must be float16"),
    (lambda: bk.denoise(X, X, torch.ones(3)), ValueError, "t must be a 0-d or a "),
    (lambda: bk.denoise(X, X, "1"), TypeError, "t must be a float"),  # type: ignore[arg-type]
    (lambda: bk.scale_input(X, torch.ones(2, 1)), ValueError, "t must be a 0-d or a "),
    (lambda: bk.renoise(X, X, 1.0, None, 0.5, seed=0, step=-1), ValueError, "step must be in"),
    (lambda: bk.renoise(X, X, 1.0, None, torch.ones(3), seed=0), ValueError, "sigma must be a 0-d or a "),
]


@pytest.mark.parametrize(("call", "error", "words"), WRONG)
def test_errors(call: Callable[[], Any], error: type[Exception], words: str, each_backend: str) -> None:
    with pytest.raises(error, match=words):
        call()
