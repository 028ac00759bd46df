"""The step ops beside the dispatcher: the same results, and no call that is watched, recorded or transformed."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import bicm_kernels as bk
from bicm_kernels import backend
from tests.support.ways import (
    CONTEXTS,
    COUNTED,
    LAYOUTS,
    SWITCHED,
    TENSORS,
    Bits,
    Counter,
    Op,
    Taken,
    agree,
    long_way,
    opened,
)

BDIA = {"a": 1.013, "b": -0.21, "a_last": 0.971, "b_last": 0.13, "gamma": 0.9}
KEY = {"seed": 2**64 - 5, "step": 2, "sample_id": 3}
SEEDS = {"seed": torch.tensor([3, -4]), "step": torch.tensor(7)}
PER_SAMPLE, ALONE = torch.tensor([0.7, -0.2], dtype=torch.float64), torch.tensor(0.3)
DENOISED = {"x0_weights": [1.2, -2.1], "weights": (0.3, 0.1), "x0_weight": 0.8}
LEVELS = {"t": 1.5, "u": 0.4}

# Every op, called with a state and an output of the network.
OPS: dict[str, Op] = {
    "ddim_step": lambda x, y: bk.ddim_step(x, y, a=0.9, b=-0.1),
    "ddim_step guided": lambda x, y: bk.ddim_step(x, (y, x), a=0.9, b=-0.1, guidance_scale=2.5),
    "ddim_step per sample": lambda x, y: bk.ddim_step(x, [y, x], a=PER_SAMPLE, b=ALONE, guidance_scale=PER_SAMPLE),
    "bdia_step": lambda x, y: bk.bdia_step(x, y, x, **BDIA),
    "bdia_inverse_step": lambda x, y: bk.bdia_inverse_step(x, y, (x, y), **BDIA, guidance_scale=0.0),
    "affine_step": lambda x, y: bk.affine_step([x, y, x, y, x], (0.9, 0.1, 0.2, -0.3, 1e-3)),
    "affine_step noisy": lambda x, y: bk.affine_step((x, y), [0.9, PER_SAMPLE], noise_weight=0.3, **KEY),
    "affine_step seeds": lambda x, y: bk.affine_step(
        [x, (y, x)], [ALONE, 1.0], noise_weight=PER_SAMPLE, guidance_scale=2.0, **SEEDS
    ),
    "denoised_step": lambda x, y: bk.denoised_step([x, y], **DENOISED),
    "denoised_step all": lambda x, y: bk.denoised_step(
        (x, (y, x)), **DENOISED, clip=ALONE, next_scale=0.6, noise_weight=0.2, guidance_scale=1.5, **KEY
    ),
    "gaussian_step": lambda x, y: bk.gaussian_step([x, y], [0.9, -0.1], std=0.3, **KEY),
    "gaussian_step seeds": lambda x, y: bk.gaussian_step(
        [x, (y, x)], (ALONE, 1.0), std=PER_SAMPLE.abs(), guidance_scale=2.0, reduction="sum", **SEEDS
    ),
    "add_noise": lambda x, y: bk.add_noise(x, 0.7, scale=PER_SAMPLE, **KEY),
    "scale_input": lambda x, y: bk.scale_input(x, PER_SAMPLE, sigma_data=0.4),
    "denoise": lambda x, y: bk.denoise(x, y, **LEVELS),
    "denoise scaled": lambda x, y: bk.denoise(x, y, PER_SAMPLE + 1, parameterization="cm", scaled=True),
    "renoise": lambda x, y: bk.renoise(x, y, **LEVELS, sigma=0.3, next_sigma=PER_SAMPLE, **KEY),
}


@pytest.fixture
def states() -> tuple[Tensor, Tensor]:
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    return x, x.flip(0).sin()


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("grad", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_plain_calls_take_it(
    name: str, grad: Callable[[], Any], states: tuple[Tensor, Tensor], taken: Taken, same_bits: Bits
) -> None:
    dtypes = [(torch.float32, torch.float32), (torch.bfloat16, torch.float16), (torch.float64, torch.float32)]
    with grad():
        for layout in LAYOUTS.values():
            for dtype, network in dtypes:
                x, y = layout(states[0].to(dtype)), layout(states[1].to(network))
                ours = OPS[name](x, y)
                assert taken.pop() == (name.split()[0], True)
                agree(ours, long_way(OPS[name], x, y), same_bits)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("place", [0, 1])
def test_tensors_that_are_not_plain(
    name: str, kind: str, place: int, states: tuple[Tensor, Tensor], taken: Taken, same_bits: Bits
) -> None:
    tensors = [*states]
    tensors[place] = TENSORS[kind](tensors[place])
    ours = OPS[name](*tensors)
    takes_one = name in ("add_noise", "scale_input")
    assert [took for _, took in taken] == [takes_one and place == 1]
    theirs = long_way(OPS[name], *tensors)
    for actual, expected in zip(opened(ours), opened(theirs), strict=True):
        assert type(actual) is type(expected)
        if expected is not None:
            same_bits(actual.detach(), expected.detach())
            assert actual.requires_grad == expected.requires_grad


@pytest.mark.parametrize("name", OPS)
def test_tensors_without_elements(name: str, states: tuple[Tensor, Tensor], taken: Taken, same_bits: Bits) -> None:
    tensors = [x[:, :0] for x in states]
    agree(OPS[name](*tensors), long_way(OPS[name], *tensors), same_bits)
    assert not any(took for _, took in taken)


@pytest.mark.parametrize(
    "number", [ALONE.clone().requires_grad_(), 1, np.float64(0.5), torch.tensor([0.5])[0]._neg_view()]
)
def test_numbers_that_are_not_plain(number: Any, states: tuple[Tensor, Tensor], taken: Taken, same_bits: Bits) -> None:
    def op(x: Tensor, y: Tensor) -> Tensor:
        return bk.ddim_step(x, y, a=number, b=0.5)

    same_bits(op(*states).detach(), long_way(op, *states).detach())
    assert taken == [("ddim_step", False)]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("kind", CONTEXTS)
def test_contexts_that_are_not_plain(
    name: str, kind: str, states: tuple[Tensor, Tensor], taken: Taken, same_bits: Bits
) -> None:
    with CONTEXTS[kind]():
        ours = OPS[name](*states)
    assert taken
    assert not any(took for _, took in taken)
    agree(ours, OPS[name](*states), same_bits)
    assert taken[-1][1]


def test_who_watches_sees_the_op(states: tuple[Tensor, Tensor]) -> None:
    with Counter() as counter:
        bk.ddim_step(*states, a=0.9, b=0.1)
    assert counter.seen == ["bicm_kernels::ddim_step"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        bk.ddim_step(*states, a=0.9, b=0.1)
    assert "bicm_kernels::ddim_step" in {event.key for event in profile.key_averages()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that tracing is deprecated, in a class that depends on torch's version
        traced = torch.jit.trace(lambda x, y: bk.ddim_step(x, y, a=0.9, b=0.1), states)
    assert "bicm_kernels::ddim_step" in str(traced.graph)
    graph = make_fx(lambda x, y: bk.ddim_step(x, y, a=0.9, b=0.1))(*states)
    assert "bicm_kernels.ddim_step" in graph.code


def test_an_execution_trace_sees_the_op(states: tuple[Tensor, Tensor], tmp_path: Path, taken: Taken) -> None:
    path = tmp_path / "trace.json"
    observer = torch.profiler.ExecutionTraceObserver().register_callback(str(path))
    observer.start()
    bk.ddim_step(*states, a=0.9, b=0.1)
    observer.stop()
    observer.unregister_callback()
    assert "bicm_kernels::ddim_step" in path.read_text()
    assert taken == [("ddim_step", False)]


@pytest.mark.parametrize("overload", ["ddim_step", "ddim_step.tensor"])
def test_an_implementation_from_python_replaces_ours(overload: str, states: tuple[Tensor, Tensor]) -> None:
    number = 0.1 if overload == "ddim_step" else ALONE
    expected = bk.ddim_step(*states, a=0.9, b=number)
    with torch.library._scoped_library("bicm_kernels", "IMPL") as library, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that another one is replaced
        library.impl(overload, lambda tensors, *rest: torch.full_like(tensors[0], 7.0), "CPU")
        assert (bk.ddim_step(*states, a=0.9, b=number) == 7.0).all()
    assert torch.equal(bk.ddim_step(*states, a=0.9, b=number), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("value", "off"), [("0", True), ("1", False), ("cuda", False), (None, False)])
def test_it_can_be_switched_off(value: str | None, off: bool, python: Callable[..., Any]) -> None:
    python(SWITCHED.format(off=off), BICM_KERNELS_DIRECT=value, BICM_KERNELS_BACKEND="native")


@pytest.mark.parametrize("value", ["no", "", "CUDA"])
def test_the_switch_takes_three_values(value: str, python: Callable[..., Any]) -> None:
    done = python("import bicm_kernels", check=False, BICM_KERNELS_DIRECT=value)
    assert f"BICM_KERNELS_DIRECT: expected 0, 1 or cuda, got {value!r}" in done.stderr


def test_fake_and_meta_tensors(states: tuple[Tensor, Tensor], taken: Taken) -> None:
    with FakeTensorMode() as mode:
        fake = bk.ddim_step(*(mode.from_tensor(x) for x in states), a=0.9, b=0.1)
    assert fake.shape == states[0].shape
    meta = bk.ddim_step(*(x.to("meta") for x in states), a=0.9, b=0.1)
    assert meta.is_meta and meta.shape == states[0].shape
    assert taken == [("ddim_step", False)] * 2


def test_transforms(states: tuple[Tensor, Tensor], taken: Taken, same_bits: Bits) -> None:
    def op(x: Tensor, y: Tensor) -> Tensor:
        return bk.ddim_step(x, y, a=0.9, b=0.1)

    plain = op(*states)
    assert taken.pop() == ("ddim_step", True)
    same_bits(torch.func.vmap(op)(*(x[:, None] for x in states))[:, 0], plain)
    same_bits(torch.func.grad(lambda x: op(x, states[1]).sum())(states[0]), torch.full_like(plain, 0.9))
    same_bits(torch.func.jvp(op, states, states)[1], plain)
    assert {took for _, took in taken} == {False}


def test_compiled_code_never_asks(states: tuple[Tensor, Tensor], taken: Taken, same_bits: Bits) -> None:
    def op(x: Tensor, y: Tensor) -> Tensor:
        return bk.affine_step([x, y], [0.9, 0.1]) + bk.denoise(x, y, 1.5, 0.4)

    expected = op(*states)
    taken.clear()
    torch._dynamo.reset()
    same_bits(torch.compile(op, backend="aot_eager", fullgraph=True)(*states), expected)
    assert not taken


WRONG: dict[str, Op] = {
    "shape": lambda x, y: bk.ddim_step(x, y[:1], a=0.9, b=0.1),
    "dim": lambda x, y: bk.ddim_step(torch.tensor(1.0), torch.tensor(1.0), a=0.9, b=0.1),
    "dtype": lambda x, y: bk.ddim_step(x.int(), y, a=0.9, b=0.1),
    "no tensor": lambda x, y: bk.ddim_step(x, 3.0, a=0.9, b=0.1),
    "no number": lambda x, y: bk.ddim_step(x, y, a="0.9", b=0.1),
    "too many numbers": lambda x, y: bk.ddim_step(x, y, a=torch.ones(3), b=0.1),
    "integer tensor": lambda x, y: bk.ddim_step(x, y, a=torch.ones(2).int(), b=0.1),
    "pair without guidance": lambda x, y: bk.ddim_step(x, (y, y), a=0.9, b=0.1),
    "guidance without pair": lambda x, y: bk.ddim_step(x, y, a=0.9, b=0.1, guidance_scale=2.0),
    "three of a pair": lambda x, y: bk.ddim_step(x, (y, y, y), a=0.9, b=0.1, guidance_scale=2.0),
    "pair elsewhere": lambda x, y: bk.ddim_step((x, x), y, a=0.9, b=0.1, guidance_scale=2.0),
    "weights": lambda x, y: bk.affine_step([x, y], [0.9]),
    "weights of a pair": lambda x, y: bk.affine_step([x, y], [0.9], guidance_scale=2.0),
    "six tensors": lambda x, y: bk.affine_step([x] * 6, [0.9] * 6),
    "no tensors": lambda x, y: bk.affine_step([], []),
    "no weights": lambda x, y: bk.affine_step([x], None),
    "weight of no noise": lambda x, y: bk.affine_step([x], [0.9], noise_weight=0.1),
    "nan of no noise": lambda x, y: bk.affine_step([x], [0.9], noise_weight=float("nan")),
    "no noise weight": lambda x, y: bk.affine_step([x], [0.9], noise_weight=None, seed=1),
    "seed": lambda x, y: bk.affine_step([x], [0.9], noise_weight=0.1, seed=2**64),
    "bool seed": lambda x, y: bk.affine_step([x], [0.9], noise_weight=0.1, seed=torch.tensor(True)),
    "step": lambda x, y: bk.affine_step([x], [0.9], noise_weight=0.1, seed=1, step=2**32),
    "sample": lambda x, y: bk.affine_step([x], [0.9], noise_weight=0.1, seed=1, sample_id=2**32 - 1),
    "sample beside seeds": lambda x, y: bk.affine_step(
        [x], [0.9], noise_weight=0.1, seed=torch.ones(2).long(), sample_id=1
    ),
    "x0 weights": lambda x, y: bk.denoised_step([x, y], [0.9], [0.1, 0.2], x0_weight=0.5),
    "no x0 weight": lambda x, y: bk.denoised_step([x, y], [0.9, 0.1], [0.1, 0.2], x0_weight=None),
    "level": lambda x, y: bk.denoise(x, y, None, 0.4),
    "scale of 0-d": lambda x, y: bk.scale_input(torch.tensor(1.0), 2.0),
    "noise of 0-d": lambda x, y: bk.add_noise(torch.tensor(1.0), 2.0, seed=1),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_those_of_the_long_way(name: str, states: tuple[Tensor, Tensor], taken: Taken) -> None:
    raised: list[Exception] = []
    for way in (WRONG[name], lambda *args: long_way(WRONG[name], *args)):
        with pytest.raises((TypeError, ValueError)) as caught:
            way(*states)
        raised.append(caught.value)
    assert {took for _, took in taken} <= {False}
    assert (type(raised[0]), str(raised[0])) == (type(raised[1]), str(raised[1]))


@pytest.mark.slow
def test_nothing_is_kept(states: tuple[Tensor, Tensor]) -> None:
    x, y = states
    weights, tensors = [0.9, PER_SAMPLE], [x, (y, x)]
    kept = [x, y, PER_SAMPLE, weights, tensors, torch.float32, *COUNTED]
    before = [sys.getrefcount(one) for one in kept]
    for _ in range(1000):
        bk.affine_step(tensors, weights, guidance_scale=2.0, noise_weight=PER_SAMPLE, **SEEDS)
        bk.denoised_step(tensors, weights, weights, x0_weight=0.2, guidance_scale=2.0)
        with pytest.raises(ValueError, match="guidance"):
            bk.affine_step(tensors, weights)
    assert all(after < count + 50 for after, count in zip(map(sys.getrefcount, kept), before, strict=True))


@pytest.mark.parametrize("name", ["ddim_step", "bdia_step", "denoised_step", "renoise"])
def test_large_tensors(name: str, threads: Callable[[int], Any], taken: Taken, same_bits: Bits) -> None:
    x = torch.randn(2, 2**19 + 7, generator=torch.Generator().manual_seed(0))
    with threads(2):
        ours = OPS[name](x, x.neg())
    assert taken.pop()[1]
    agree(ours, long_way(OPS[name], x, x.neg()), same_bits)


def test_other_backends_have_none() -> None:
    assert backend.direct is not None
    with backend.use("reference"):
        assert backend.direct is None
    assert backend.direct is not None
