"""A step of BCT training in one graph: no break, few compilations, and what torch draws shared as in eager."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from bicm_diffusion import Levels, bct_loss
from bicm_diffusion.consistency import shared_draws
from tests.support.networks import CHECKPOINTS, SIZE, Images, Network, TwiceRegistered, assert_equal, build, problem


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def step_of(network: nn.Module, x: Tensor, levels: Levels, **options: Any) -> Callable[..., Tensor]:
    return lambda **key: bct_loss(network, x, levels, **options, **key).total


def compiled(body: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], CompileCounterWithBackend]:
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(body, fullgraph=True, backend=counter), counter


def differentiated(loss: Tensor, network: nn.Module) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, list(network.parameters()), materialize_grads=True)]


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "dropout": (partial(Network, dropout=0.4, blocks=1), {}),
    "checkpoints": (
        partial(Network, dropout=0.4, wrap=CHECKPOINTS["not reentrant"], blocks=2),
        {"gradient": "backward", "target": "direct"},
    ),
    "nested checkpoints": (partial(Network, wrap=CHECKPOINTS["nested"], blocks=1), {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_steps_are_one_graph_with_the_eager_bits(case: str) -> None:
    make, options = CASES[case]
    network = build(make)
    body = step_of(network, *problem(), **options)
    fast, counter = compiled(body)
    for step in range(5):
        # A caller's counter: an int at first, as most have it, and then a tensor.
        key = {"seed": 3**step, "step": step if step < 4 else torch.tensor(step)}
        assert_equal(differentiated(fast(**key), network), differentiated(body(**key), network))
    assert counter.frame_count <= 3
    assert not counters["graph_break"], counters["graph_break"]


@pytest.mark.slow
def test_optimizer_steps_of_shared_blocks() -> None:
    ends = []
    for compile_step in (False, True):
        network = build(TwiceRegistered)
        body = step_of(network, *problem())
        fast = compiled(body)[0] if compile_step else body
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
        for step in range(3):
            optimizer.zero_grad()
            fast(seed=5, step=step).backward()
            optimizer.step()
        ends.append([x.detach() for x in network.parameters()])
    assert_equal(*ends)


@pytest.mark.slow
def test_a_network_of_diffusers() -> None:
    network = build(partial(Images, 0.3)).train()
    network.unet.enable_gradient_checkpointing()
    x = torch.randn((2, 1, 8, 8), generator=torch.Generator().manual_seed(3))
    body = step_of(network, x, problem(2)[1])
    fast, _ = compiled(body)
    key = {"seed": 5, "step": 1}
    for a, b in zip(differentiated(fast(**key), network), differentiated(body(**key), network), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


# --- what torch draws -----------------------------------------------------------------------------------------------

# What a network may do with (B, 12) numbers.
DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: functional.dropout(x, 0.4),
    "torch.dropout": lambda x: torch.dropout(x, 0.4, True),
    "torch.dropout_": lambda x: torch.dropout_(2 * x, p=0.4, train=True),
    "dropout in place": lambda x: functional.dropout(2 * x, 0.4, inplace=True),
    "dropout of everything": lambda x: functional.dropout(x, 1.0),
    "dropout in evaluation": lambda x: functional.dropout(x, 0.4, training=False),
    "another rate": lambda x: functional.dropout(x, p=0.2),
    "dropout1d": lambda x: functional.dropout1d(x.reshape(-1, 3, 4), 0.4),
    "dropout1d without a batch": lambda x: functional.dropout1d(x, 0.4),
    "dropout2d": lambda x: functional.dropout2d(x.reshape(-1, 3, 2, 2), 0.4),
    "dropout2d in place": lambda x: functional.dropout2d(2 * x.reshape(-1, 3, 2, 2), 0.4, inplace=True),
    "dropout3d": lambda x: functional.dropout3d(x.reshape(-1, 3, 2, 2, 1), 0.4),
    "dropout3d without a batch": lambda x: functional.dropout3d(x.reshape(-1, 3, 2, 2), 0.4),
    "module": lambda x: nn.Dropout2d(0.4)(x.reshape(-1, 3, 2, 2)),
    "channels last": lambda x: functional.dropout(
        x.reshape(-1, 3, 2, 2).contiguous(memory_format=torch.channels_last), 0.4
    ),
    "rand": lambda x: x + torch.rand(x.shape[0], 1, dtype=x.dtype),
    "rand of a shape": lambda x: x * torch.rand(x.shape),
    "randn": lambda x: x + torch.randn(x.shape, device=x.device),
    "rand_like": lambda x: x + torch.rand_like(x, dtype=torch.float64).to(x.dtype),
    "randn_like": lambda x: x + torch.randn_like(x),
    "stochastic depth": lambda x: x * x.new_empty(x.shape[0], 1).bernoulli_(0.7).div_(0.7),
    "uniform_": lambda x: x + torch.empty_like(x).uniform_(-1, to=3.0),
    "normal_": lambda x: x + torch.zeros_like(x).normal_(std=2.0),
    "in a checkpoint": lambda x: checkpoint(lambda y: functional.dropout(y, 0.4), x, use_reentrant=False),
}


class Drawing(nn.Module):
    """A network that applies functions that draw, each to the numbers that the same layer gives."""

    def __init__(self, draws: list[Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.first, self.second, self.draws = nn.Linear(SIZE, SIZE), nn.Linear(SIZE * len(draws), SIZE), draws

    def forward(self, scaled: Tensor, t: Tensor, u: Tensor) -> Tensor:
        h = self.first(scaled)
        return self.second(torch.cat([draw(h).reshape(scaled.shape) for draw in self.draws], dim=1))


@pytest.mark.slow
def test_random_functions_draw_the_eager_numbers() -> None:
    network = build(partial(Drawing, [*DRAWS.values()]))
    body = step_of(network, *problem())
    fast, _ = compiled(body)
    before = torch.get_rng_state()
    for step in (1, 2):
        key = {"seed": 5, "step": step}
        loss, first, *_ = actual = differentiated(fast(**key), network)
        assert_equal(actual, differentiated(body(**key), network))
        assert loss.isfinite() and first.abs().max() > 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", DRAWS)
def test_each_random_function_draws_the_eager_numbers(name: str) -> None:
    """Its numbers alone, without a network around it."""

    def draw(x: Tensor) -> tuple[Tensor, Tensor]:
        alike = shared_draws.draws_alike(torch.tensor(5), x.device)
        with alike():
            first = DRAWS[name](x)
        with alike():
            return first, DRAWS[name](x)

    x = torch.randn(5, SIZE)
    first, second = torch.compile(draw, fullgraph=True, backend="eager")(x)
    assert_equal([first, second], [*draw(x)])
    assert torch.equal(first, second)
    assert "evaluation" in name or "everything" in name or not torch.equal(first.reshape(x.shape), x)


REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "alpha_dropout": lambda x: functional.alpha_dropout(x, 0.4, training=True),
    "rrelu": lambda x: functional.rrelu(x, training=True),
    "scaled_dot_product_attention": lambda x: functional.scaled_dot_product_attention(x, x, x, dropout_p=0.4),
    "multi_head_attention_forward": lambda x: ATTENTION(x, x, x)[0],
    "gumbel_softmax": lambda x: functional.gumbel_softmax(x),
    "bernoulli": lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)),
    "Tensor.bernoulli": lambda x: x * torch.full_like(x, 0.5).bernoulli(),
    "randint": lambda x: x + torch.randint(5, x.shape),
    "randperm": lambda x: x[:, torch.randperm(x.shape[1])],
    "randint_like": lambda x: x + torch.randint_like(x, 5),
    "normal": lambda x: x + torch.normal(x, 1.0),
    "rrelu_": lambda x: torch.rrelu_(2 * x, training=True),
    "native_dropout": lambda x: torch.native_dropout(x, 0.4, True)[0],
    "exponential_": lambda x: x + torch.empty_like(x).exponential_(),
}
ATTENTION = nn.MultiheadAttention(SIZE, 2, dropout=0.4)


@pytest.mark.parametrize("name", REFUSED)
def test_other_random_functions_are_refused(name: str) -> None:
    def draw(x: Tensor) -> Tensor:
        with shared_draws.draws_alike(torch.tensor(5), x.device)():
            return REFUSED[name](x)

    with pytest.raises(Exception, match=f"{name.removeprefix('Tensor.')} draws random numbers") as raised:
        torch.compile(draw, fullgraph=True, backend="eager")(torch.randn(5, SIZE))
    assert "compile the network instead of the loss" in str(raised.value)


def test_functions_that_draw_only_in_training_pass_otherwise() -> None:
    attention = nn.MultiheadAttention(SIZE, 2, dropout=0.4).eval()

    def draw(x: Tensor) -> Tensor:
        with shared_draws.draws_alike(torch.tensor(5), x.device)():
            y = functional.alpha_dropout(x, 0.4, training=False) + functional.rrelu(x)
            return y + functional.scaled_dot_product_attention(x, x, x) + attention(x, x, x)[0]

    x = torch.randn(5, SIZE)
    torch.testing.assert_close(torch.compile(draw, fullgraph=True, backend="eager")(x), draw(x), rtol=1e-5, atol=1e-5)


# What of torch's random ops no network calls by a public name, or what no graph holds.
UNSEEN = {"lstm", "gru", "rnn_tanh", "rnn_relu", "miopen_rnn", "rrelu_with_noise", "rrelu_with_noise_"}


def test_every_random_function_of_torch_is_known() -> None:
    """Found by the tag that torch gives its random ops: shared or refused, under each of their public names."""
    names = set()
    for whole in torch._C._dispatch_get_all_op_names():
        name, _, overload = whole.removeprefix("aten::").partition(".")
        if whole.startswith("aten::") and not name.startswith("_"):
            op = getattr(getattr(torch.ops.aten, name), overload or "default", None)
            names |= {name} if op is not None and torch.Tag.nondeterministic_seeded in op.tags else set()
    assert {"dropout", "rand_like", "bernoulli_", "multinomial"} <= names
    known = {*shared_draws._STAND_INS, *shared_draws._REFUSED}
    missing = [
        (place.__name__, name)
        for place in (torch, functional, Tensor)
        for name in names - UNSEEN
        if callable(found := getattr(place, name, None)) and found not in known
    ]
    assert not missing


def test_draws_pass_opcheck() -> None:
    state = torch.ops.bicm_diffusion.seeded_state(torch.tensor(5), torch.device("cpu"))
    torch.library.opcheck(torch.ops.bicm_diffusion.seeded_state.default, (torch.tensor(5), torch.device("cpu")))
    for method, numbers in (("bernoulli_", [0.5]), ("normal_", [0.0, 1.0]), ("native_dropout", [0.5])):
        torch.library.opcheck(torch.ops.bicm_diffusion.draw.default, (state, torch.zeros(3, 4), method, numbers))


# --- compiled networks in an eager step -----------------------------------------------------------------------------


class Mask(nn.Module):
    """A network that answers with its dropout mask."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, scaled: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return functional.dropout(torch.ones_like(scaled), 0.5) * self.one + 0 * scaled


class Listening(nn.Module):
    def __init__(self, inner: Callable[..., Tensor]) -> None:
        super().__init__()
        self.inner, self.answers = inner, []

    def forward(self, *args: Tensor) -> Tensor:
        self.answers.append(self.inner(*args))
        last: Tensor = self.answers[-1]
        return last


@pytest.mark.slow
def test_compiled_networks_share_their_masks() -> None:
    network = Listening(torch.compile(build(Mask), backend="inductor"))
    bct_loss(network, *problem(), seed=5, step=3).total.backward()
    first, *others = (answer.detach() for answer in network.answers)
    assert len(others) == 3 and 0 < (first == 0).float().mean() < 1
    assert all(torch.equal(first, other) for other in others)
