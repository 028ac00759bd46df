"""The densities' derivatives: values, what is kept for them, and what falls back to the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap

import bicm_kernels as bk
from bicm_kernels import reference
from tests.support.gaussian_calls import DTYPES, FORMS, KEY, form, mean_of, opened, operands
from tests.support.loss_calls import Allocations
from tests.support.tensors import BF16, F16, F32, F64, LAYOUTS, Bits, random

GRADIENTS = ("backward", "forward")


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", FORMS)
def test_gradcheck(each_backend: str, name: str, reduction: str, gradient: str) -> None:
    x = [leaf(y) for y in operands((2, 3, 2), F64, F64)]
    tensors, weights, more = form(name, x)
    after, std = leaf(random(2, 3, 2, dtype=F64, seed=9)), torch.tensor([0.5, 1.5], dtype=F64)

    def density(after: Tensor, *_: Tensor) -> Tensor:
        return bk.gaussian_log_prob(after, tensors, weights, std=std, reduction=reduction, gradient=gradient, **more)

    flat = opened(tensors)
    # The closure holds the same leaves that gradcheck moves.
    assert gradcheck(density, (after, *flat), check_batched_grad=False)
    if gradient == "backward":
        assert gradgradcheck(density, (after, *flat))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradcheck_of_the_divergence(each_backend: str, reduction: str) -> None:
    x, v, y, w = (leaf(random(2, 3, 2, dtype=F64, seed=k)) for k in range(4))

    def divergence(x: Tensor, v: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return bk.gaussian_kl([x, v], [y, w], [0.9, -0.3], std=0.7, reduction=reduction)

    assert gradcheck(divergence, (x, v, y, w), check_batched_grad=False)
    assert gradgradcheck(divergence, (x, v, y, w))
    assert gradcheck(lambda x: bk.gaussian_kl([x, x], [x, v], [0.9, -0.3], std=0.7), (x,))


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(("state", "network"), DTYPES)
def test_gradients_are_the_formula(state: torch.dtype, network: torch.dtype, name: str, gradient: str) -> None:
    """(after - m) w / (s^2 d), within two roundings of what float64 gives; dtypes and layouts of the tensors."""
    x = [leaf(y.contiguous(memory_format=torch.channels_last)) for y in operands((3, 2, 40, 17), state, network)]
    tensors, weights, more = form(name, x)
    std, upstream = torch.tensor([0.3, 0.7, 2.0]), torch.tensor([1.0, -2.5, 0.3])
    with torch.no_grad():
        after, _ = bk.gaussian_step(tensors, weights, std=std, **KEY, **more)
    value = bk.gaussian_log_prob(after, tensors, weights, std=std, gradient=gradient, **more)
    flat = opened(tensors)
    found = torch.autograd.grad(value, flat, upstream.to(value.dtype))
    d = after[0].numel()
    column = (upstream / (std.double() ** 2 * d)).reshape(3, 1, 1, 1)
    # As float32 has the mean, which bounds what is left of its residual.
    fixed = [tuple(y.detach() for y in x) if isinstance(x, tuple) else x.detach() for x in tensors]
    pull = column * (after.double() - mean_of(fixed, weights, **more))
    size = column * (after.double().abs() + sum(y.detach().double().abs() for y in flat) * 4)
    factors = [*weights]
    if more:
        g = more["guidance_scale"]
        factors[-1:] = [weights[-1] * (1 - g), weights[-1] * g]
    for ours, factor, y in zip(found, factors, flat, strict=True):
        assert ours.dtype == y.dtype and ours.stride() == y.stride()
        arithmetic = torch.finfo(F64 if F64 in [y.dtype for y in flat] else F32).eps
        allowed = abs(factor) * (8 * arithmetic * size.abs() + 2 * torch.finfo(ours.dtype).eps * pull.abs())
        assert ((ours.double() - factor * pull).abs() <= allowed + torch.finfo(ours.dtype).tiny).all()


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
def test_both_gradients_agree(dtype: torch.dtype, same_bits: Bits) -> None:
    """To the bit where the incoming gradient is a power of two, or the gradient is a half, which is not kept."""
    after, x, v = (random(3, 5000, dtype=dtype, seed=k) for k in range(3))
    powers = dtype in (F32, F64)
    upstream = torch.tensor([1.0, -2.0, 0.25] if powers else [1.0, -2.3, 0.7], dtype=F64 if dtype == F64 else F32)

    def once(gradient: str) -> Tensor:
        network = leaf(v)
        value = bk.gaussian_log_prob(after, [x, network], [0.9, -0.3], std=0.4, gradient=gradient)
        return torch.autograd.grad(value, network, upstream)[0]

    same_bits(once("forward"), once("backward"))


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_one_gradient_is_all_that_is_allocated(dtype: torch.dtype, gradient: str) -> None:
    after, x, v = (random(4, 4096, dtype=dtype, seed=k) for k in range(3))
    network, std = leaf(v), torch.full((4,), 0.3)
    with Allocations() as seen:
        bk.gaussian_log_prob(after, [x, network], [0.9, -0.3], std=std, gradient=gradient).sum().backward()
    tensors = {y.untyped_storage().data_ptr() for y in (after, x, network)}
    large = [size for where, size in seen.found.items() if where not in tensors and size > 1000]
    assert sum(large) <= v.nbytes
    assert network.grad is not None


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_nothing_of_the_tensors_size_is_kept(gradient: str) -> None:
    saved: list[Tensor] = []
    after, x = random(3, 1000), random(3, 1000, seed=1)
    network = leaf(x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        bk.gaussian_log_prob(after, [x, network], [0.9, -0.3], std=0.4, gradient=gradient)
    given = {y.data_ptr() for y in (after, x, network)}
    kept = [y for y in saved if y.data_ptr() not in given]
    assert sum(y.numel() for y in kept) <= (3000 if gradient == "forward" else 0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str, same_bits: Bits) -> None:
    tensors = [LAYOUTS[name](random(3, 2, 4, 6, seed=k)) for k in range(3)]

    def gradients(states: list[Tensor]) -> tuple[Tensor, ...]:
        leaves = [y.detach().requires_grad_() for y in states]
        value = bk.gaussian_log_prob(leaves[0], leaves[1:], [0.9, -0.3], std=0.4)
        return torch.autograd.grad(value.sum(), leaves)

    plain = gradients([y.clone(memory_format=torch.contiguous_format) for y in tensors])
    for ours, wanted in zip(gradients(tensors), plain, strict=True):
        same_bits(ours, wanted)


@pytest.mark.parametrize("number", ["weights", "std", "guidance_scale"])
def test_numbers_have_derivatives(each_backend: str, number: str) -> None:
    after, x, v, other = (random(2, 3, dtype=F64, seed=k) for k in range(4))
    numbers = {
        "weights": torch.tensor([0.9, 1.1], dtype=F64),
        "std": torch.tensor([0.5, 1.5], dtype=F64),
        "guidance_scale": torch.tensor(2.0, dtype=F64),
    }

    def density(value: Tensor) -> Tensor:
        given = {**numbers, number: value}
        return bk.gaussian_log_prob(
            after, [x, (v, other)], [given["weights"], -0.3], std=given["std"], guidance_scale=given["guidance_scale"]
        )

    assert gradcheck(density, (numbers[number].clone().requires_grad_(),))
    if number != "guidance_scale":

        def divergence(value: Tensor) -> Tensor:
            given = {**numbers, number: value}
            return bk.gaussian_kl([x, v], [x, other], [given["weights"], -0.3], std=given["std"])

        assert gradcheck(divergence, (numbers[number].clone().requires_grad_(),))


def test_a_step_has_the_gradient_of_its_density(each_backend: str) -> None:
    """The after state counts as given, as it does where it was recorded; it has the derivative of a sample, too."""
    x, v = leaf(random(3, 20, dtype=F64)), leaf(random(3, 20, dtype=F64, seed=1))
    after, log_prob = bk.gaussian_step([x, v], [0.9, -0.3], std=0.4, **KEY)
    ours = torch.autograd.grad(log_prob.sum(), [x, v], retain_graph=True)
    value = bk.gaussian_log_prob(after.detach(), [x, v], [0.9, -0.3], std=0.4)
    for actual, expected in zip(ours, torch.autograd.grad(value.sum(), [x, v]), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-16)
    (pathwise,) = torch.autograd.grad(after.sum(), v)
    torch.testing.assert_close(pathwise, torch.full_like(v, -0.3))


def test_transforms_take_the_reference() -> None:
    after, x, v = (random(4, 3, 5, dtype=F64, seed=k) for k in range(3))

    def density(v: Tensor, after: Tensor, x: Tensor) -> Tensor:
        return bk.gaussian_log_prob(after, [x, v], [0.9, -0.3], std=0.4)

    mapped = vmap(density)(v, after, x)
    one_by_one = torch.stack([density(v[k], after[k], x[k]) for k in range(4)])
    torch.testing.assert_close(mapped, one_by_one, rtol=1e-13, atol=0)
    network = leaf(v[0])
    (wanted,) = torch.autograd.grad(density(network, after[0], x[0]).sum(), network)
    torch.testing.assert_close(grad(lambda v: density(v, after[0], x[0]).sum())(v[0]), wanted, rtol=1e-12, atol=1e-15)
    _, tangent = jvp(lambda v: density(v, after[0], x[0]), (v[0],), (x[0],))
    torch.testing.assert_close(tangent, (wanted * x[0]).sum(1), rtol=1e-12, atol=1e-15)
    with pytest.raises(ValueError, match="seed must hold one seed per sample"):
        vmap(lambda x: bk.gaussian_step([x], [1.0], std=1.0, seed=1)[1])(x)
    seeds = torch.arange(12).reshape(4, 3)
    stepped = vmap(lambda x, seed: bk.gaussian_step([x], [1.0], std=1.0, seed=seed))(x, seeds)
    torch.testing.assert_close(stepped[1][2], bk.gaussian_step([x[2]], [1.0], std=1.0, seed=seeds[2])[1])


def test_kept_gradients_refuse_a_second_derivative() -> None:
    after, x = random(2, 5), leaf(random(2, 5, seed=1))
    value = bk.gaussian_log_prob(after, [x], [0.9], std=0.4, gradient="forward")
    (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='gradient="backward"'):
        first.sum().backward()


def test_a_batch_of_gradients() -> None:
    after, x = random(3, 5, dtype=F64), leaf(random(3, 5, dtype=F64, seed=1))
    value = bk.gaussian_log_prob(after, [x], [0.9], std=0.4)
    (rows,) = torch.autograd.grad(value, x, torch.eye(3, dtype=F64), is_grads_batched=True)
    plain = reference.gaussian_log_prob(after, [x], [0.9], std=0.4)
    (wanted,) = torch.autograd.grad(plain, x, torch.eye(3, dtype=F64), is_grads_batched=True)
    torch.testing.assert_close(rows, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_compiled_whole(gradient: str, dtype: torch.dtype, same_bits: Bits) -> None:
    torch._dynamo.reset()
    after, x, v, other = (random(3, 40, dtype=dtype, seed=k) for k in range(4))
    std = torch.tensor([0.3, 0.0, 1.0])

    def loss(v: Tensor, other: Tensor) -> Tensor:
        value = bk.gaussian_log_prob(
            after, [x, (v, other)], [0.9, -0.3], std=std, guidance_scale=2.0, gradient=gradient
        )
        divergence = bk.gaussian_kl([x, v], [x, other], [0.9, -0.3], std=std)
        return torch.stack([value, divergence])

    def both(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [leaf(v), leaf(other)]
        value = function(*leaves)
        return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(both(compiled), both(loss), strict=True):
        same_bits(actual, expected)


def test_numbers_overwritten_before_the_backward_pass(same_bits: Bits) -> None:
    after, x, v = (random(3, 40, seed=k) for k in range(3))

    def once(spoil: bool) -> Tensor:
        network, std, weight = leaf(v), torch.tensor([0.3, 0.5, 1.0]), torch.tensor(-0.3)
        value = bk.gaussian_log_prob(after, [x, network], [0.9, weight], std=std)
        if spoil:
            std.zero_()
            weight.fill_(7.0)
        return torch.autograd.grad(value.sum(), network)[0]

    same_bits(once(True), once(False))


def test_a_state_overwritten_before_the_backward_pass_raises() -> None:
    after, x, v = (random(3, 40, seed=k) for k in range(3))
    network = leaf(v)
    value = bk.gaussian_log_prob(after, [x, network], [0.9, -0.3], std=0.3)
    after.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()
