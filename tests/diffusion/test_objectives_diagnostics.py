"""R̃ of couplings, transport cost and its derivative against their closed forms (GC eq. 17, 19, 20 and 90).

Estimates are compared with expectations: five standard errors of the estimate itself are what chance allows them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bicm_diffusion.objectives.diagnostics import transport_cost, transport_cost_derivative, velocity_variance
from bicm_kernels import normal

S, D, BATCH = 0.5, 4, 40_000
KEY: dict[str, Any] = {"seed": 3, "step": 5}
X = S * normal((BATCH, D), seed=0, dtype=torch.float64)
Z = normal((BATCH, D), **KEY, dtype=torch.float64)
each_level = pytest.mark.parametrize("t", [0.05, 0.7, 3.0, 40.0])


def column(t: Tensor) -> Tensor:
    return t[:, None]


def flow(x: Tensor, t: Tensor) -> Tensor:
    """The exact consistency model of N(0, S²)."""
    return x * column(S / (S * S + t * t).sqrt())


def denoiser(x: Tensor, t: Tensor) -> Tensor:
    """E[x|x_t] of the independent coupling."""
    return x * column(S * S / (S * S + t * t))


def augmented_denoiser(x: Tensor, t: Tensor) -> Tensor:
    """E[x̂|x̃_t] of the coupling by `flow`: x̂ = q·x + q·t·z, x̃ = q·x + (q·t + t)·z."""
    q = S / (S * S + t * t).sqrt()
    of_noise = q * t + t
    return x * column(((q * S) ** 2 + q * t * of_noise) / ((q * S) ** 2 + of_noise**2))


def check_mean(values: Tensor, expected: float) -> None:
    assert values.shape == (BATCH,) and values.dtype == torch.float64
    assert abs(values.mean().item() - expected) <= 5 * values.std().item() / math.sqrt(BATCH)


@each_level
def test_the_independent_coupling_of_gaussian_data(t: float) -> None:
    check_mean(velocity_variance(denoiser, X, t, **KEY), D * S * S / (S * S + t * t))


@each_level
def test_the_augmented_coupling_of_gaussian_data(t: float) -> None:
    q = S / math.sqrt(S * S + t * t)
    a = q * S
    expected = a * a / (a * a + (q * t + t) ** 2)
    check_mean(velocity_variance(augmented_denoiser, X, t, predictor=flow, **KEY), D * expected)
    assert expected < S * S / (S * S + t * t)  # GC theorem 2


@each_level
def test_transport_cost_of_gaussian_data(t: float) -> None:
    root = math.sqrt(S * S + t * t)
    check_mean(transport_cost(flow, X, t, **KEY), D * (S * S + 1 - 2 * S * t / root))
    check_mean(transport_cost_derivative(flow, denoiser, X, t, **KEY), -2 * D * (S / root) * S * S / root**2)


def test_the_derivative_is_the_slope_of_the_cost() -> None:
    t, h = 0.7, 1e-4
    slope = (transport_cost(flow, X, t + h, **KEY) - transport_cost(flow, X, t - h, **KEY)) / (2 * h)
    check_mean(slope - transport_cost_derivative(flow, denoiser, X, t, **KEY), 0.0)


A = 1.0


def sign_flow(x: Tensor, t: Tensor) -> Tensor:
    """The exact consistency model of two Diracs at ±A along the first axis (GC fig. 1)."""
    return torch.cat([A * x[:, :1].sign(), torch.zeros_like(x[:, 1:])], dim=1)


def diracs() -> Tensor:
    x = torch.zeros(BATCH, D, dtype=torch.float64)
    x[:, 0] = A * normal((BATCH, 1), seed=1, dtype=torch.float64)[:, 0].sign()
    return x


@each_level
def test_two_diracs(t: float) -> None:
    def tanh_denoiser(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([A * torch.tanh(A * x[:, :1] / column(t * t)), torch.zeros_like(x[:, 1:])], dim=1)

    x = diracs()
    assert (velocity_variance(sign_flow, x, t, predictor=sign_flow, **KEY) == 0).all()
    assert velocity_variance(tanh_denoiser, x, t, **KEY).mean() > (1e-6 if t > 0.1 else -1)
    density = math.exp(-((A / t) ** 2) / 2) / math.sqrt(2 * math.pi)
    check_mean(transport_cost(sign_flow, x, t, **KEY), A * A + D - 4 * A * density)


def test_at_zero_the_cost_is_that_of_the_coupling() -> None:
    def never(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("asked about t = 0")

    expected = (X - Z).square().sum(1)
    assert torch.equal(transport_cost(never, X, 0.0, **KEY), expected)
    levels = torch.tensor([0.0, 0.7]).repeat(BATCH // 2)

    def positive(x: Tensor, t: Tensor) -> Tensor:
        assert (t > 0).all()
        return flow(x, t)

    mixed = transport_cost(positive, X, levels, **KEY)
    assert torch.equal(mixed[::2], expected[::2])
    one = transport_cost(flow, X, torch.full((BATCH,), 0.7), **KEY)
    assert torch.equal(mixed[1::2], one[1::2])


def test_another_pairing_is_a_permutation_of_sample_ids() -> None:
    order = torch.arange(BATCH).flip(0)
    z, t = Z[order], 0.7
    x_t = X + t * z
    by_hand = (z - (x_t - denoiser(x_t, torch.full((BATCH,), t, dtype=x_t.dtype))) / t).square().sum(1)
    got = velocity_variance(denoiser, X, t, sample_id=order, **KEY)
    torch.testing.assert_close(got, by_hand, rtol=1e-9, atol=1e-12)
    assert torch.equal(transport_cost(flow, X, 0.0, sample_id=order, **KEY), (X - z).square().sum(1))


def test_a_sample_s_number_does_not_depend_on_its_batch() -> None:
    calls: list[Callable[..., Tensor]] = [
        lambda x, **key: velocity_variance(denoiser, x, 0.7, predictor=flow, **key),
        lambda x, **key: transport_cost(flow, x, 0.7, **key),
        lambda x, **key: transport_cost_derivative(flow, denoiser, x, 0.7, **key),
    ]
    for call in calls:
        whole = call(X[:6].float(), **KEY)
        assert torch.equal(whole[2:], call(X[2:6].float(), sample_id=2, **KEY))
        assert not whole.requires_grad and call(X[:0], **KEY).shape == (0,)


def test_networks_are_differentiated_in_their_input_alone() -> None:
    layer = torch.nn.Linear(D, D, dtype=torch.float64)
    got = transport_cost_derivative(lambda x, t: layer(x), denoiser, X[:8], 0.7, **KEY)
    w = (denoiser(X[:8] + 0.7 * Z[:8], torch.full((8,), 0.7)) - X[:8]) / 0.7
    torch.testing.assert_close(got, -2 * ((w @ layer.weight.T) * w).sum(1).detach(), rtol=1e-6, atol=1e-9)
    assert layer.weight.grad is None


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: velocity_variance(denoiser, X, 0.0, **KEY), ValueError, "t: expected a noise level above 0, got 0"),
        (lambda: velocity_variance(denoiser, X, -1.0, **KEY), ValueError, "t: expected a finite noise level of at"),
        (lambda: velocity_variance(denoiser, X, "1", **KEY), TypeError, "t: expected a number or a tensor, got '1'"),
        (lambda: velocity_variance(denoiser, X, torch.ones(3), **KEY), ValueError, "t: expected a 0-d or a"),
        (lambda: velocity_variance(denoiser, X.numpy(), 1.0, **KEY), TypeError, r"x: expected a tensor \(B, …\)"),
        (lambda: velocity_variance(None, X, 1.0, **KEY), TypeError, "denoiser: expected a function or module, called"),
        (lambda: velocity_variance(lambda x, t: (x,), X, 1.0, **KEY), TypeError, "denoiser: expected a tensor of sh"),
        (
            lambda: velocity_variance(denoiser, X, 1.0, predictor=lambda x, t: x[:1], **KEY),
            ValueError,
            r"predictor: expected a tensor of shape .* got shape \(1, 4\)",
        ),
        (lambda: transport_cost("f", X, 1.0, **KEY), TypeError, "predictor: expected a function or module"),
        (lambda: transport_cost_derivative(flow, denoiser, X, 0.0, **KEY), ValueError, "t: expected a noise level abo"),
    ],
)
def test_what_is_wrong_is_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        call()


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("shape", [(), (1,), (2, 2)])
def test_samples_of_any_shape_have_one_number_each(shape: tuple[int, ...], count: int) -> None:
    x = S * normal((count, *shape), seed=1, dtype=torch.float64)

    def found(of: Tensor) -> list[Tensor]:
        def scaled(x: Tensor, t: Tensor) -> Tensor:
            return x * (S / (S * S + t * t)).reshape(-1, *[1] * (x.dim() - 1))

        derivative = transport_cost_derivative(scaled, scaled, of, 0.7, **KEY)
        return [derivative, *(cost(scaled, of, 0.7, **KEY) for cost in (velocity_variance, transport_cost))]

    for one, other in zip(found(x), found(x.reshape(count, math.prod(shape))), strict=True):
        assert one.shape == (count,)
        torch.testing.assert_close(one, other)
    assert transport_cost(lambda x, t: x, x, 0.0, **KEY).shape == (count,)
