"""Contract 4: every op traces whole, changing numbers compile at most three times, and bits stay the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import bicm_kernels as bk
from bicm_kernels import backend

Bits = Callable[[Tensor, Tensor], None]
F32, F64 = torch.float32, torch.float64


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def state(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def into(out: Tensor, op: Callable[..., Any], *args: Any, **numbers: Any) -> Tensor:
    op(*args, out=out, **numbers)
    return out


def denoised_into(x: Tensor, v: float, key: dict[str, int]) -> tuple[Tensor, ...]:
    outs = x.clone(), torch.empty_like(x), torch.empty_like(x)
    weights = ([v, 2.0], [0.1, v])
    bk.denoised_step([outs[0], x], *weights, x0_weight=v, clip=1 + v, next_scale=v, noise_weight=v, out=outs, **key)
    return outs


# One op after another on a state, a float that changes and a noise key that changes.
BODIES: dict[str, Callable[[Tensor, float, dict[str, int]], Any]] = {
    "ddim_step": lambda x, v, key: bk.ddim_step(x, x.bfloat16(), a=v, b=1 - v),
    "ddim_step guided": lambda x, v, key: bk.ddim_step(x, (x, -x), a=v, b=1 - v, guidance_scale=v),
    "bdia_step": lambda x, v, key: bk.bdia_step(x, -x, x, a=v, b=1.0, a_last=1 + v, b_last=v, gamma=v),
    "bdia_inverse_step": lambda x, v, key: bk.bdia_inverse_step(
        x, -x, x, a=v, b=1.0, a_last=1 + v, b_last=v, gamma=1 + v
    ),
    "affine_step": lambda x, v, key: bk.affine_step([x, -x], [v, 0.5], noise_weight=v, **key),
    "affine_step per sample": lambda x, v, key: bk.affine_step(
        [x, -x], [v * x[:, 0], 0.5], noise_weight=x[:, 0], **key
    ),
    "denoised_step": lambda x, v, key: bk.denoised_step(
        [x, -x], [v, 2.0], [0.1, v], x0_weight=v, clip=1 + v, next_scale=v, noise_weight=v, **key
    ),
    "gaussian_step": lambda x, v, key: bk.gaussian_step([x, -x], [v, 0.5], std=v, **key),
    "gaussian_step per sample": lambda x, v, key: bk.gaussian_step(
        [x, (x, -x)], [v * x[:, 0], 0.5], std=x[:, 0].abs(), guidance_scale=v, reduction="sum", **key
    ),
    "gaussian_log_prob": lambda x, v, key: bk.gaussian_log_prob(x.cos(), [x, x.sin()], [v, 0.5], std=1 + v),
    "gaussian_log_prob guided": lambda x, v, key: bk.gaussian_log_prob(
        x.cos(), [x, (x.sin(), x)], [v, 0.5], std=x[:, 0].detach().abs(), guidance_scale=v, reduction="sum"
    ),
    "gaussian_kl": lambda x, v, key: bk.gaussian_kl([x, x.sin()], [x, x.cos()], [v, 0.5], std=1 + v),
    "add_noise": lambda x, v, key: bk.add_noise(x, v, scale=1 - v, **key),
    "add_noise per sample": lambda x, v, key: bk.add_noise(
        x, x[:, 0], seed=key["step"] + torch.arange(x.shape[0]), step=7
    ),
    "normal": lambda x, v, key: x + v * bk.normal(x.shape, **key),
    "normal per sample": lambda x, v, key: x + bk.normal(x.shape, seed=key["step"] + torch.arange(x.shape[0])),
    "uniform": lambda x, v, key: x + v * bk.uniform(x.shape, **key, dtype=x.dtype, device=x.device),
    "fold_in": lambda x, v, key: x + bk.normal(x.shape, seed=bk.fold_in(bk.fold_in(key["seed"], key["step"]), 7)),
    "out": lambda x, v, key: into(torch.empty_like(x), bk.affine_step, [x], [v], noise_weight=v, **key),
    "out in place": lambda x, v, key: into(x.clone(), bk.ddim_step, x, x, a=v, b=1 - v),
    "out of three": denoised_into,
}

# Seeds of both signs and of more than 63 bits; steps and samples up to the end of their range.
KEYS = [{"seed": (-3) ** (3 * k), "step": 2**32 - 12 + k, "sample_id": k * 2**28} for k in range(11)]
KEYS += [{"seed": 2**64 - 1, "step": 0, "sample_id": 0}]


def compiled(body: Callable[..., Any], **options: Any) -> tuple[Callable[..., Any], CompileCounterWithBackend]:
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(body, fullgraph=True, backend=counter, **options), counter


def compare(actual: Any, expected: Any, same_bits: Bits) -> None:
    pairs = zip(actual, expected, strict=True) if isinstance(expected, tuple) else [(actual, expected)]
    for x, y in pairs:
        same_bits(x, y)


CHANGING = [(name, False) for name in BODIES]
CHANGING += [(name, True) for name in ("ddim_step guided", "bdia_step", "affine_step", "add_noise")]
CHANGING += [(name, True) for name in BODIES if name.startswith(("gaussian_log_prob", "gaussian_kl"))]


@pytest.mark.parametrize(("name", "tracked"), CHANGING)
def test_twelve_values_compile_at_most_three_times(name: str, tracked: bool, same_bits: Bits) -> None:
    body = BODIES[name]
    fast, counter = compiled(body)
    x = state(3, 4).requires_grad_(tracked)
    for k, key in enumerate(KEYS):
        compare(fast(x, 0.07 * k, key), body(x, 0.07 * k, key), same_bits)
    assert counter.frame_count <= 3


@pytest.mark.parametrize("name", BODIES)
def test_graphs_hold_the_kernels(name: str) -> None:
    targets: list[str] = []

    def collect(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compile(BODIES[name], fullgraph=True, backend=collect)(state(3, 4), 0.3, KEYS[1])
    ours = [target for target in targets if target.startswith("bicm_kernels")]
    assert ours, targets
    assert len(ours) == (3 if name == "fold_in" else 1)


def test_a_sampler_loop_with_tensor_keys(same_bits: Bits) -> None:
    """What a captured loop does: numbers and keys are tensors that the graph itself advances."""

    def body(z_last: Tensor, z: Tensor, table: Tensor, seed: Tensor, step: Tensor) -> Tensor:
        for row in table:
            z_last, z = (
                z,
                bk.bdia_step(z_last, z, torch.tanh(z), a=row[0], b=row[1], a_last=row[2], b_last=row[3]),
            )
            z = bk.add_noise(z, row[1], seed=seed, step=step)
            step = step + 1
        return z

    table = torch.linspace(0.5, 1.5, 12, dtype=F64).reshape(3, 4)
    fast, counter = compiled(body)
    for seed in range(12):
        arguments = (
            state(2, 5),
            state(2, 5, seed=1),
            table * (1 + seed),
            torch.tensor(seed),
            torch.tensor(seed),
        )
        same_bits(fast(*arguments), body(*arguments))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", BODIES)
def test_dynamic_batch(name: str, same_bits: Bits) -> None:
    fast, counter = compiled(BODIES[name])
    for batch in (3, 5, 2, 8):
        x = state(batch, 6)
        torch._dynamo.mark_dynamic(x, 0)
        compare(fast(x, 0.3, KEYS[2]), BODIES[name](x, 0.3, KEYS[2]), same_bits)
    assert counter.frame_count == 1


@pytest.mark.parametrize("channels_last", [False, True])
def test_traced_layouts(channels_last: bool, same_bits: Bits) -> None:
    x = state(2, 3, 4, 5)
    x = x.to(memory_format=torch.channels_last) if channels_last else x[..., ::2]
    for name in ("ddim_step", "affine_step", "denoised_step", "add_noise"):
        torch._dynamo.reset()
        actual, expected = compiled(BODIES[name])[0](x, 0.3, KEYS[1]), BODIES[name](x, 0.3, KEYS[1])
        compare(actual, expected, same_bits)
        first = actual[0] if isinstance(actual, tuple) else actual
        assert first.stride() == torch.empty_like(x).stride()


# --- other ways to trace ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["affine_step", "normal"])
def test_inductor(name: str, same_bits: Bits) -> None:
    fast = torch.compile(BODIES[name], fullgraph=True)
    for v, key in ((0.3, KEYS[1]), (0.4, KEYS[2])):
        same_bits(fast(state(3, 4), v, key), BODIES[name](state(3, 4), v, key))


@pytest.mark.parametrize("name", BODIES)
def test_export(name: str, same_bits: Bits) -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Any:
            return BODIES[name](x, 0.3, KEYS[3])

    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(Module(), (state(3, 4),), dynamic_shapes=({0: batch},))
    assert any(str(node.target).startswith("bicm_kernels") for node in program.graph.nodes)
    for size in (3, 7):
        compare(program.module()(state(size, 4)), BODIES[name](state(size, 4), 0.3, KEYS[3]), same_bits)


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(name: str, mode: str, same_bits: Bits) -> None:
    graph = make_fx(lambda x: BODIES[name](x, 0.3, KEYS[3]), tracing_mode=mode)(state(3, 4))
    assert any(str(node.target).startswith("bicm_kernels") for node in graph.graph.nodes)
    compare(graph(state(3, 4, seed=5)), BODIES[name](state(3, 4, seed=5), 0.3, KEYS[3]), same_bits)


@pytest.mark.parametrize("name", BODIES)
def test_fake_tensors(name: str) -> None:
    expected = BODIES[name](state(3, 4), 0.3, KEYS[3])
    with FakeTensorMode():
        fake = BODIES[name](torch.empty(3, 4), 0.3, KEYS[3])
        with pytest.raises(ValueError, match="shape"):
            bk.ddim_step(torch.empty(3, 4), torch.empty(3, 5), a=1.0, b=1.0)
    pairs = zip(fake, expected, strict=True) if isinstance(expected, tuple) else [(fake, expected)]
    for x, y in pairs:
        assert (x.shape, x.dtype, x.stride(), x.device) == (y.shape, y.dtype, y.stride(), y.device)


@pytest.mark.slow
def test_the_reference_traces_too(same_bits: Bits) -> None:
    with backend.use("reference"):
        for name in ("bdia_step", "uniform"):
            fast, counter = compiled(BODIES[name])
            for k, key in enumerate(KEYS):
                compare(fast(state(3, 4), 0.07 * k, key), BODIES[name](state(3, 4), 0.07 * k, key), same_bits)
            assert counter.frame_count <= 3


# --- wrong calls --------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "shape": (lambda x: bk.ddim_step(x, x[:2], a=1.0, b=2.0), "eps must have the shape of z"),
    "dtype": (lambda x: bk.ddim_step(x, x.int(), a=1.0, b=2.0), "eps must be float16"),
    "number": (lambda x: bk.ddim_step(x, x, a=x[0], b=2.0), "a must be a 0-d or a"),
    "out": (
        lambda x: bk.ddim_step(x, x, a=1.0, b=2.0, out=x.new_empty(2, 4)),
        "out must have the shape of z",
    ),
    "sigma": (lambda x: bk.add_noise(x, x[0], seed=1), "sigma must be a 0-d or a"),
    "step": (lambda x: bk.add_noise(x, 1.0, seed=1, step=-1), "step must be in"),
    "seed": (lambda x: bk.normal(x.shape, seed=x[:, 0]), "seed must be an int or an int64 tensor"),
    "no seed": (lambda x: bk.affine_step([x], [1.0], noise_weight=1.0), "seed must be given"),
    "float seed": (lambda x: x + bk.fold_in(1.5, 2), "seed must be an int"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_raise_while_they_are_traced(name: str) -> None:
    body, message = WRONG[name]
    fast, _ = compiled(body)
    with pytest.raises(Exception) as raised:  # noqa: PT011
        fast(state(3, 4))
    chain = [raised.value, raised.value.__cause__, raised.value.__context__]
    assert any(message in str(error) for error in chain), raised.value
    with pytest.raises((TypeError, ValueError), match=message):
        torch.compile(body, backend="eager")(state(3, 4))


def test_vmap_of_one_seed_raises_while_it_is_traced() -> None:
    rows = state(5, 3, 4)
    with pytest.raises(Exception) as raised:  # noqa: PT011
        compiled(torch.vmap(lambda x: bk.add_noise(x, 1.0, seed=1)))[0](rows)
    assert "seed must hold one seed per sample" in f"{raised.value} {raised.value.__cause__} {raised.value.__context__}"


def test_transforms_compile(same_bits: Bits) -> None:
    rows = state(5, 3, 4, dtype=F64)
    seeds = torch.arange(5)
    cases: list[tuple[Callable[..., Any], tuple[Tensor, ...]]] = [
        (torch.vmap(lambda x: bk.ddim_step(x, -x, a=1.5, b=0.2)), (rows,)),
        (torch.vmap(lambda x, seed: bk.add_noise(x, 0.5, seed=seed)), (rows, seeds)),
        (torch.func.grad(lambda x: bk.add_noise(x, 0.5, scale=0.3, seed=1).square().sum()), (rows,)),
        (lambda x: torch.func.jvp(lambda y: bk.ddim_step(y, y * y, a=1.5, b=0.2), (x,), (x,))[1], (rows,)),
    ]
    for body, arguments in cases:
        torch._dynamo.reset()
        same_bits(compiled(body)[0](*arguments), body(*arguments))


def test_a_graph_survives_a_change_of_backend(same_bits: Bits) -> None:
    fast, _ = compiled(BODIES["add_noise"])
    expected = BODIES["add_noise"](state(3, 4), 0.3, KEYS[1])
    for name in itertools.islice(itertools.cycle(["native", "reference"]), 4):
        with backend.use(name):
            same_bits(fast(state(3, 4), 0.3, KEYS[1]), expected)
