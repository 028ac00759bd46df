"""How idempotent losses form their gradients: one from the frozen network, kept ones, passes and errors."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bicm_diffusion import vp_schedule
from bicm_diffusion.consistency.frozen import distance_to_frozen, evaluate_frozen
from bicm_diffusion.objectives import ign_loss, sign_loss
from bicm_diffusion.objectives.terms import Terms
from bicm_kernels import pseudo_huber
from bicm_kernels.ops import kept_gradient
from bicm_kernels.ops.kept_gradient import scaled
from tests.support.plain_idempotent import Plain, made, samples

SQUARED = partial(pseudo_huber, kind="squared")


def three(dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, 2, 3, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


def mean_square(sample: Tensor, goal: Tensor) -> Tensor:
    return (sample - goal).flatten(1).square().sum(1).mean()


# --- one distance of every sample -------------------------------------------------------------------------------------


def test_each_distance_has_its_weight_and_sums_to_the_term() -> None:
    sample, goal, _ = three()
    sample.requires_grad_()
    found = Terms({"recon": 0.4}, {"gradient": "auto"})
    each = found.each("recon", len(sample), lambda distance: distance(sample, goal))
    torch.testing.assert_close(each, (sample - goal).flatten(1).square().sum(1).detach())
    assert not each.requires_grad
    torch.testing.assert_close(found.loss().total, 0.4 * found.terms["recon"])
    torch.testing.assert_close(found.terms["recon"], each.mean())


def test_values_have_no_gradient_even_of_a_goal_that_has_one() -> None:
    sample, goal, _ = three()
    values = Terms({}, {}).values(sample.requires_grad_(), goal.requires_grad_())
    torch.testing.assert_close(values, (sample - goal).detach().flatten(1).square().sum(1))
    assert not values.requires_grad


# --- a bounded distance -----------------------------------------------------------------------------------------------


def bounded(sample: Tensor, goal: Tensor, reach: Tensor) -> Tensor:
    away = (sample - goal).flatten(1).square().sum(1)
    return -0.3 * (reach * (away / reach).tanh()).mean()


def ours_bounded(sample: Tensor, goal: Tensor, reach: Tensor, gradient: str = "auto") -> Tensor:
    found = Terms({"tight": 0.3}, {"gradient": gradient})
    found.bounded("tight", sample, goal, reach, found.values(sample, goal))
    return found.loss().total


@pytest.mark.parametrize("gradient", ["auto", "backward", "forward"])
def test_a_bounded_distance_and_its_derivatives(gradient: str) -> None:
    (sample, goal, direction), reach = three(), torch.tensor([0.1, 1.0, 5.0, 20.0, 1e3]).double()
    sample.requires_grad_()
    results = [ours_bounded(sample, goal, reach, gradient), bounded(sample, goal, reach)]
    torch.testing.assert_close(*results)
    first = [torch.autograd.grad(3 * value, sample, retain_graph=True)[0] for value in results]
    torch.testing.assert_close(*first)
    if gradient == "forward":
        return  # kept gradients are not differentiated
    once = [torch.autograd.grad(value, sample, create_graph=True)[0] for value in results]
    torch.testing.assert_close(*(torch.autograd.grad((g * direction).sum(), sample)[0] for g in once))


@pytest.mark.parametrize("gradient", ["auto", "forward"])
def test_a_bounded_distance_of_halves_differentiates_twice(gradient: str) -> None:
    """Since `pseudo_huber` keeps no gradients of halves, "forward" has second derivatives of them."""
    (sample, goal, direction), reach = three(torch.bfloat16), torch.tensor([0.1, 1.0, 5.0, 20.0, 1e3])
    found = []
    for value, dtype in ((ours_bounded, torch.bfloat16), (bounded, torch.float64)):
        leaf = sample.to(dtype).requires_grad_()
        options = {"gradient": gradient} if value is ours_bounded else {}
        result = value(leaf, goal.to(dtype), reach, **options)
        (once,) = torch.autograd.grad(result, leaf, create_graph=True)
        found.append(torch.autograd.grad((once * direction.to(dtype)).sum(), leaf)[0].double())
    torch.testing.assert_close(*found, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_a_bounded_distance_in_float32_is_as_accurate_as_the_formula(scale: float) -> None:
    goal, noise, _ = three(torch.float32)
    sample, reach = goal + scale * noise, scale**2 * torch.tensor([0.5, 1.0, 5.0, 20.0, 1e3])

    def gradient(value: Callable[[Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype) -> Tensor:
        leaf = sample.to(dtype).requires_grad_()
        return torch.autograd.grad(value(leaf, goal.to(dtype), reach.to(dtype)), leaf)[0]

    exact, eager = gradient(bounded, torch.float64), gradient(bounded, torch.float32)
    assert (gradient(ours_bounded, torch.float32) - exact).abs().max() <= 2 * (eager - exact).abs().max()


# --- a distance from the frozen network -------------------------------------------------------------------------------


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.Unflatten(1, (2, 3))
        ).double()


@pytest.mark.parametrize("kind", ["squared", "vector"])
@pytest.mark.parametrize("gradient", ["auto", "backward", "forward"])
def test_a_distance_to_the_frozen_network_is_that_of_both_arguments(kind: str, gradient: str) -> None:
    f, (x, *_) = network(), three()
    distance = partial(pseudo_huber, kind=kind, c=None if kind == "squared" else 0.2, weight=0.3, gradient=gradient)
    x.requires_grad_()
    ours = 3.0 * distance_to_frozen(f, x, {}, distance)
    theirs = 3.0 * distance(x, evaluate_frozen(f, (x,), {}))
    torch.testing.assert_close(ours, theirs)
    wanted = torch.autograd.grad(theirs, x)[0]
    torch.testing.assert_close(torch.autograd.grad(ours, x, retain_graph=True)[0], wanted)
    torch.testing.assert_close(torch.autograd.grad(ours, x)[0], wanted)
    assert all(p.grad is None for p in f.parameters())


def test_a_distance_to_the_frozen_network_differentiates_three_times() -> None:
    f, (x, *_) = network(), three()
    frozen = copy.deepcopy(f).requires_grad_(False)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda y: distance_to_frozen(f, y, {}, SQUARED), (x,))
    assert torch.autograd.gradgradcheck(lambda y: distance_to_frozen(f, y, {}, SQUARED), (x,))
    thirds = []
    for function in (lambda y: distance_to_frozen(f, y, {}, SQUARED), lambda y: SQUARED(y, frozen(y))):
        y = function(x)
        for _ in range(3):
            (y,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        thirds.append(y)
        assert all(g is None for g in torch.autograd.grad(y.sum(), list(f.parameters()), allow_unused=True))
    torch.testing.assert_close(*thirds, rtol=1e-9, atol=1e-9)


OUTSIDE = torch.full((2, 3), 0.5, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x,
        lambda x: x.view_as(x),
        lambda x: OUTSIDE.expand_as(x),  # of a parameter that the network does not list
        lambda x: OUTSIDE * x,
        lambda x: torch.ones_like(x),
    ],
    ids=["identity", "view", "constant", "scaled", "ones"],
)
def test_any_network_is_frozen(f: Callable[[Tensor], Tensor]) -> None:
    x, *_ = three()
    x.requires_grad_()
    value = distance_to_frozen(f, x, {}, SQUARED)  # type: ignore[arg-type]
    expected = SQUARED(x, evaluate_frozen(f, (x,), {}))  # type: ignore[arg-type]
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, x)[0], torch.autograd.grad(expected, x)[0])
    assert OUTSIDE.grad is None


def test_arguments_that_are_trained_get_gradients() -> None:
    x, *_ = three()
    shift = torch.zeros(1, 2, 3, dtype=torch.float64, requires_grad=True)

    class Shifted(nn.Module):
        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            return x.tanh() + shift

    distance_to_frozen(Shifted(), x.requires_grad_(), {"shift": shift}, SQUARED).backward()
    assert shift.grad is not None and shift.grad.any()


def test_the_sample_of_a_network_of_another_dtype_gets_an_unrounded_gradient() -> None:
    x = three(torch.float32)[0].requires_grad_()

    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (0.3 * x).bfloat16()

    (found,) = torch.autograd.grad(distance_to_frozen(Half(), x, {}, SQUARED), x)
    (wanted,) = torch.autograd.grad(SQUARED(x, evaluate_frozen(Half(), (x,), {})), x)
    assert torch.equal(found, wanted)


# --- passes -----------------------------------------------------------------------------------------------------------


class Large(TorchDispatchMode):
    """Counts ops by name that make a tensor of many elements outside of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        is_view = func._schema.returns and any(r.alias_info is not None for r in func._schema.returns)
        if func.namespace == "bicm_kernels" or (isinstance(result, Tensor) and result.numel() >= 36 and not is_view):
            self.found[name] += 1
        return result


class Twice(torch.autograd.Function):
    """A network whose passes make no tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class Passing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = Twice.apply(x, self.weight)
        return y


def large(step: Callable[[nn.Module, Tensor], Tensor]) -> Counter[str]:
    f, x = Passing(), samples().float()
    with Large() as counted:
        step(f, x).backward()
    return counted.found


KEY: dict[str, Any] = {"seed": 5, "step": 3}


def test_passes_of_sign() -> None:
    """z, x_n and x_s; idem's sum; torch's sum for f(x_n). Gradients are formed by another reading under a mode."""
    given = {"schedule": vp_schedule(4), "idem": 0.1, "denoise": 0.1}
    found = large(lambda f, x: sign_loss(f, x, **KEY, **given).total)
    assert found.pop("uniform") == 1
    assert found == {"affine_step": 4, "pseudo_huber": 4, "pseudo_huber_backward": 4, "add": 1}


def test_passes_of_ign() -> None:
    """z, and idem's sum; every distance with its gradient, whose upstream is 1: tight's slopes are known from idem."""
    found = large(lambda f, x: ign_loss(f, x, **KEY, gradient="forward").total)
    # recon's and idem's: nothing is read of samples where it is 1.
    assert found.pop("scale_gradients_") == 2
    assert found == {"affine_step": 2, "pseudo_huber_with_gradients": 3}
    # Without idem, tight's distance is measured before.
    found = large(lambda f, x: ign_loss(f, x, **KEY, idem=0.0, gradient="forward").total)
    assert found.pop("scale_gradients_") == 1
    assert found == {"affine_step": 1, "pseudo_huber": 1, "pseudo_huber_with_gradients": 2}


def test_the_gradient_of_recon_is_final_where_it_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    upstreams: list[Tensor] = []

    def noted(upstream: Tensor, kept: Sequence[Tensor]) -> Sequence[Tensor]:
        upstreams.append(upstream)
        return scaled(upstream, kept)

    monkeypatch.setattr(kept_gradient, "scaled", noted)
    ign_loss(Passing(), samples().float(), **KEY, recon=3.0, idem=0.3, gradient="forward").total.backward()
    assert len(upstreams) == 3 and all((upstream == 1).all() for upstream in upstreams)


def test_the_weight_of_recon_does_not_move_the_bound() -> None:
    model, x = made(Plain, 1), samples()
    values = [ign_loss(model, x, **KEY, recon=weight).terms for weight in (0.0, 0.3, 20.0)]
    for name in ("recon", "tight"):
        for value in values[1:]:
            torch.testing.assert_close(value[name], values[0][name])


def test_the_gradient_near_both_goals_is_as_accurate_as_the_formula() -> None:
    """Where f(x_n) is near its goals, differences are formed before they are multiplied."""
    x, outputs = samples().float(), list[Tensor]()
    shift = (1e-3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))).float().requires_grad_()

    def f(z: Tensor) -> Tensor:
        outputs.append(x + shift + 1e-3 * z)
        return outputs[-1]

    sign_loss(f, x, **KEY, schedule=vp_schedule(4), recon=0.0, idem=0.0, flow=0.7, denoise=0.3).total.backward()

    def formula(dtype: torch.dtype) -> Tensor:
        answer, goal, clean = (y.detach().to(dtype) for y in (*outputs, x))
        answer.requires_grad_()
        loss = 0.7 * mean_square(answer, goal) + 0.3 * mean_square(answer, clean)
        return torch.autograd.grad(loss, answer)[0]

    eager, exact = formula(torch.float32), formula(torch.float64)
    assert shift.grad is not None
    assert (shift.grad - exact).abs().max() <= 2 * (eager - exact).abs().max()
