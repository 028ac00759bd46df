"""The BCT loss of networks that checkpoint, share, tie, parametrize or compile parts: the gradients stay right."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from bicm_diffusion import Levels, bct_loss
from bicm_diffusion.consistency.frozen import evaluate_frozen
from tests.support.networks import (
    CHECKPOINTS,
    SIZE,
    Images,
    Network,
    TwiceRegistered,
    Wrap,
    assert_equal,
    build,
    problem,
)
from tests.support.plain_bct import plain_loss


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(network: nn.Module, x: Tensor, levels: Levels, **options: Any) -> list[Tensor]:
    """Loss and gradients of a step."""
    network.zero_grad()
    loss = bct_loss(network, x, levels, seed=5, step=3, **options)
    loss.total.backward()
    found = [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]
    assert len(found) == len([*network.parameters()])
    return [loss.consistency.detach(), loss.trajectory.detach(), *found]


# --- gradient checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("target", ["shared", "direct"])
@pytest.mark.parametrize("way", CHECKPOINTS)
def test_checkpoints_change_no_bit(way: str, target: str, dropout: float) -> None:
    plain = build(partial(Network, dropout=dropout))
    checkpointed = build(partial(Network, dropout=dropout, wrap=CHECKPOINTS[way]))
    for gradient in ("forward", "backward"):
        options = {"target": target, "gradient": gradient}
        assert_equal(gradients(checkpointed, *problem(), **options), gradients(plain, *problem(), **options))


def test_a_checkpoint_around_the_whole_network() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Network(dropout=0.3)

        def forward(self, *args: Tensor) -> Tensor:
            return checkpoint(self.inner, *args, use_reentrant=False)

    assert_equal(gradients(build(Whole), *problem()), gradients(build(partial(Network, dropout=0.3)), *problem()))


def test_checkpoints_under_autocast() -> None:
    found = []
    for wrap in (None, CHECKPOINTS["not reentrant"]):
        network = build(partial(Network, dropout=0.3, wrap=wrap))
        with torch.autocast("cpu", torch.bfloat16):
            loss = bct_loss(network, *problem(), seed=5, step=3).total
        loss.backward()
        found.append([loss.detach(), *[x.grad for x in network.parameters()]])
    assert_equal(*found)


def test_checkpointed_loss_serves_several_backward_passes() -> None:
    network = build(partial(Network, dropout=0.3, wrap=CHECKPOINTS["not reentrant"]))
    once = gradients(network, *problem())[2:]
    network.zero_grad()
    loss = bct_loss(network, *problem(), seed=5, step=3).total
    loss.backward(retain_graph=True)
    loss.backward()
    for twice, single in zip([x.grad for x in network.parameters()], once, strict=True):
        torch.testing.assert_close(twice, 2 * single, rtol=1e-6, atol=1e-6)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("mix", ["all", "one of them"])
def test_reentrant_checkpoints_are_refused(mix: str) -> None:
    calls = iter(range(10**6))
    reentrant = partial(checkpoint, use_reentrant=True)

    def sometimes(function: Wrap, *args: Tensor) -> Tensor:
        return reentrant(function, *args) if next(calls) % 3 == 1 else function(*args)

    network = build(partial(Network, wrap=reentrant if mix == "all" else sometimes))
    before = list(network.parameters())
    with pytest.raises(RuntimeError, match="network: expected gradient checkpoints with use_reentrant=False"):
        bct_loss(network, *problem(), seed=5, step=3).total.backward()
    assert all(a is b for a, b in zip(network.parameters(), before, strict=True))
    with torch.no_grad():
        assert bct_loss(network, *problem(), seed=5, step=3).total.item() > 0


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpoints_of_diffusers(dropout: float) -> None:
    x = torch.randn((2, 1, 8, 8), generator=torch.Generator().manual_seed(3))
    levels = problem(2)[1]
    network = build(partial(Images, dropout)).train()
    expected = gradients(network, x, levels)
    network.unet.enable_gradient_checkpointing()
    assert network.unet.down_blocks[0].gradient_checkpointing
    assert_equal(gradients(network, x, levels), expected)


# --- shared and unusual parameters ----------------------------------------------------------------------------------


class Tied(Network):
    """One parameter in two modules, and under two names in one of them."""

    def __init__(self) -> None:
        super().__init__(blocks=2)
        self.blocks[1].first.weight = self.blocks[0].first.weight
        self.blocks[0].second.alias = self.blocks[0].second.weight


class Parametrized(Network):
    def __init__(self) -> None:
        super().__init__()
        parametrizations.weight_norm(self.blocks[0].first)
        parametrizations.orthogonal(self.blocks[1].first)
        parametrizations.spectral_norm(self.blocks[2].first, n_power_iterations=1)


class Hooked(Network):
    """Whose weight is computed by a hook before every call."""

    def __init__(self) -> None:
        super().__init__()
        torch.nn.utils.spectral_norm(self.blocks[0].first)


class Recurrent(Network):
    """A module that keeps its parameters in a list of its own, too."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(SIZE, SIZE, batch_first=True)

    def forward(self, scaled: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return self.recurrent(super().forward(scaled, t, u)[:, None].expand(-1, 2, -1))[0][:, -1]


class Scripted(Network):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[1] = torch.jit.script(self.blocks[1])


class Normed(Network):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[0].norm = nn.BatchNorm1d(SIZE)


class PartlyFixed(Network):
    def __init__(self) -> None:
        super().__init__()
        self.fixed = nn.Linear(SIZE, SIZE).requires_grad_(False)

    def forward(self, scaled: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return self.fixed(super().forward(scaled, t, u))


KINDS: dict[str, Callable[[], nn.Module]] = {
    kind.__name__: kind for kind in (TwiceRegistered, Tied, Parametrized, Recurrent, Scripted, Normed, Network)
}


def plain_gradients(network: nn.Module, x: Tensor, levels: Levels) -> list[Tensor]:
    """The loss with a copy for the outer evaluation, whose gradients in its parameters are thrown away."""

    found = plain_loss(network, x[:, :, None], levels, seed=5, step=3, c=0.00054 * SIZE**0.5)
    total = found["consistency"] + found["trajectory"]
    grads = torch.autograd.grad(total, [p for p in network.parameters() if p.requires_grad])
    return [found["consistency"].detach(), found["trajectory"].detach(), *grads]


class Column(nn.Module):
    """For the plain formula, which wants (B, C, D)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, scaled: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return self.network(scaled[:, :, 0], t, u)[:, :, None]


def trained(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_formulas(kind: str) -> None:
    network = build(KINDS[kind], torch.float64)
    x, levels = problem(dtype=torch.float64)
    if kind == "Parametrized":
        network.eval()  # in training each evaluation of spectral_norm moves its vectors
    # A copy of a scripted module has no leaves for parameters.
    plain = build(Network, torch.float64) if kind == "Scripted" else copy.deepcopy(network)
    expected = plain_gradients(Column(plain), x, levels)
    actual = gradients(network, x, levels)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * float(b.abs().max()))


@pytest.mark.parametrize("kind", [*KINDS, "Hooked", "PartlyFixed"])
def test_a_network_keeps_its_parameters_and_trains_on(kind: str) -> None:
    network = build((KINDS | {"Hooked": Hooked, "PartlyFixed": PartlyFixed})[kind])
    before = {name: id(x) for name, x in network.named_parameters(remove_duplicate=False)}
    optimizer = torch.optim.SGD(trained(network), lr=0.01)
    for step in range(3):
        values = [x.detach().clone() for x in trained(network)]
        optimizer.zero_grad()
        bct_loss(network, *problem(), seed=5, step=step).total.backward()
        optimizer.step()
        assert {name: id(x) for name, x in network.named_parameters(remove_duplicate=False)} == before
        assert all(type(x) is nn.Parameter and x.is_leaf for x in network.parameters())
        assert not any(torch.equal(a, b) for a, b in zip(values, trained(network), strict=True))
    assert all(x.grad is None for x in network.parameters() if not x.requires_grad)


def test_parameters_come_back_after_an_error() -> None:
    class Failing(Network):
        calls = 0

        def forward(self, *args: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 4:
                raise ArithmeticError("on purpose")
            return super().forward(*args)

    network = build(Failing)
    before = list(network.parameters())
    with pytest.raises(ArithmeticError, match="on purpose"):
        bct_loss(network, *problem(), seed=5, step=3)
    assert all(a is b for a, b in zip(network.parameters(), before, strict=True))
    assert all(x.requires_grad for x in network.parameters())


def test_all_evaluations_update_the_running_statistics() -> None:
    network = build(Normed)
    bct_loss(network, *problem(), seed=5, step=3)
    assert network.blocks[0].norm.num_batches_tracked == 4


def test_the_outer_evaluation_computes_no_gradient_of_a_weight() -> None:
    wanted: list[tuple[bool, ...]] = []

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            return x @ weight

        @staticmethod
        def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
            x, weight = ctx.saved_tensors
            wanted.append(ctx.needs_input_grad)
            return upstream[0] @ weight.T, x.T @ upstream[0] if ctx.needs_input_grad[1] else None

    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(SIZE, SIZE))

        def forward(self, scaled: Tensor, t: Tensor, u: Tensor) -> Tensor:
            return Product.apply(scaled, self.weight)

    bct_loss(build(Custom), *problem(), seed=5, step=3).total.backward()
    assert wanted == [(True, False), (False, True), (False, True)]


# --- what else gradients flow to ------------------------------------------------------------------------------------


class Conditional(Network):
    def forward(self, scaled: Tensor, t: Tensor, u: Tensor, *, condition: dict[str, Any]) -> Tensor:
        return super().forward(scaled + condition["shift"][0], t, u) * condition["scale"]


def test_gradients_reach_extra_arguments_and_samples() -> None:
    """The plain formula with everything that requires grad, but for the outer network's parameters."""

    network = build(Conditional, torch.float64)
    x, levels = problem(dtype=torch.float64)
    shift = torch.randn(SIZE, dtype=torch.float64, requires_grad=True)
    x.requires_grad_()
    loss = bct_loss(network, x, levels, seed=5, step=3, extra_args={"condition": {"shift": [shift], "scale": 1.5}})
    found = torch.autograd.grad(loss.total, [x, shift])

    class Bound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, scaled: Tensor, t: Tensor, u: Tensor) -> Tensor:
            return self.network(scaled, t, u, condition={"shift": [shift], "scale": 1.5})

        def __deepcopy__(self, memo: Any) -> nn.Module:
            other = Bound()
            other.network = copy.deepcopy(network)
            return other

    y = x.detach().clone().requires_grad_()
    plain = plain_loss(Column(Bound()), y[:, :, None], levels, seed=5, step=3, c=0.00054 * SIZE**0.5)
    expected = torch.autograd.grad(plain["consistency"] + plain["trajectory"], [y, shift])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


@pytest.mark.parametrize("wrap", [None, "not reentrant"])
def test_second_derivatives(wrap: str | None) -> None:
    """The outer network is frozen in them, too; the plain formula's copy says what they are."""

    network = build(partial(Network, wrap=wrap and CHECKPOINTS[wrap]), torch.float64)
    other = Column(build(Network, torch.float64))
    x, levels = problem(dtype=torch.float64)

    def curvature(model: nn.Module, loss: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        return [*torch.autograd.grad(sum(g.square().sum() for g in first), list(model.parameters()))]

    for term in ("consistency", "trajectory"):
        ours = getattr(bct_loss(network, x, levels, seed=5, step=3, c=0.3, gradient="backward"), term)
        theirs = plain_loss(other, x[:, :, None], levels, seed=5, step=3, c=0.3)[term]
        for a, b in zip(curvature(network, ours), curvature(other, theirs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7 * float(b.abs().max()))


def test_frozen_evaluations_differentiate_three_times() -> None:
    network = build(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), torch.float64)
    frozen = copy.deepcopy(network).requires_grad_(False)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: evaluate_frozen(network, (y,), {}), (x,))
    assert torch.autograd.gradgradcheck(lambda y: evaluate_frozen(network, (y,), {}), (x,))
    thirds = []
    for function in (lambda y: evaluate_frozen(network, (y,), {}), frozen):
        y = function(x).sum()
        for _ in range(3):
            (y,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        thirds.append(y)
        assert all(g is None for g in torch.autograd.grad(y.sum(), list(network.parameters()), allow_unused=True))
    torch.testing.assert_close(*thirds, rtol=1e-9, atol=1e-9)


def test_a_network_without_parameters_to_train() -> None:
    network = build(Network).requires_grad_(False)
    loss = bct_loss(network, *problem(), seed=5, step=3)
    assert not loss.total.requires_grad
    torch.testing.assert_close(loss.total, bct_loss(build(Network), *problem(), seed=5, step=3).total.detach())


# --- compiled networks ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("part", ["network", "blocks"])
@pytest.mark.parametrize("wrap", [None, "not reentrant"])
def test_compiled_networks(part: str, wrap: str | None) -> None:
    plain = build(partial(Network, dropout=0.0))
    network: Any = build(partial(Network, wrap=wrap and CHECKPOINTS[wrap]))
    if part == "blocks":
        network.blocks = nn.ModuleList([torch.compile(block, backend="aot_eager") for block in network.blocks])
    else:
        network = torch.compile(network, backend="aot_eager")
    for _ in range(2):
        for a, b in zip(gradients(network, *problem()), gradients(plain, *problem()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(b.abs().max()))
    assert all(type(x) is nn.Parameter for x in network.parameters())


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_step_must_be_given() -> None:
    with pytest.raises(TypeError, match="step"):
        bct_loss(build(Network), *problem(), seed=5)
