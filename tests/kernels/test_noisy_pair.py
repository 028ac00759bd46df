"""noisy_pair: one noise at two levels, the generator-augmented mix, derivatives, tracing, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import bicm_kernels as bk
from bicm_kernels import reference

Bits = Callable[[Tensor, Tensor], None]
MASK = torch.tensor([True, False, True, False])
LEVELS = torch.tensor([0.3, 0.0, 2.0, 0.9], dtype=torch.float64)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(4, 1), (4, 3, 5, 7), (4, 1025), (4, 0)])
def test_two_levels_of_one_noise(shape: tuple[int, ...], dtype: torch.dtype, same_bits: Bits) -> None:
    x, x_hat = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    levels = torch.tensor([0.0, 0.1, 2.0, 80.0]), torch.tensor(0.5)
    key: dict[str, Any] = {"seed": 3, "step": 1, "sample_id": 5}
    for actual, level in zip(bk.noisy_pair(x, *levels, **key), levels, strict=True):
        same_bits(actual, bk.add_noise(x, level, **key))
    mixed = torch.where(MASK.reshape(-1, *[1] * (x.dim() - 1)), x_hat, x)
    for actual, level in zip(bk.noisy_pair(x, *levels, x_hat=x_hat, mask=MASK, **key), levels, strict=True):
        same_bits(actual, bk.add_noise(mixed, level, **key))
    given: dict[str, Any] = {"x_hat": x_hat, "mask": MASK, "sigma_data": 0.7, **key}
    for actual, expected in zip(
        bk.noisy_pair(x, *levels, **given), reference.noisy_pair(x, *levels, **given), strict=True
    ):
        same_bits(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scaled_as_networks_take_them(dtype: torch.dtype, same_bits: Bits) -> None:
    """Without a rounding to a half between them, scaling inside is scaling afterwards."""
    x, levels = random(4, 3, 7, dtype=dtype), (torch.tensor([0.0, 0.1, 2.0, 80.0]), 0.5)
    plain, scaled = bk.noisy_pair(x, *levels, seed=3, step=1), bk.noisy_pair(x, *levels, seed=3, step=1, sigma_data=0.7)
    for noisy, actual, level in zip(plain, scaled, levels, strict=True):
        same_bits(actual, bk.scale_input(noisy, level, sigma_data=0.7))


@pytest.mark.parametrize("layout", [lambda x: x.transpose(1, 2), lambda x: x[:, ::2], lambda x: x[:, :1].expand_as(x)])
def test_layouts(layout: Callable[[Tensor], Tensor], same_bits: Bits) -> None:
    x, x_hat = layout(random(4, 6, 5)), layout(random(4, 6, 5, seed=1))
    ours, plain = (m.noisy_pair(x, 0.5, 2.0, seed=1, step=2, x_hat=x_hat, mask=MASK) for m in (bk, reference))
    for actual, expected in zip(ours, plain, strict=True):
        same_bits(actual, expected)
        assert actual.stride() == torch.empty_like(x).stride()


def test_batch_invariance(same_bits: Bits) -> None:
    x, x_hat = random(4, 5000), random(4, 5000, seed=1)
    whole = bk.noisy_pair(x, 0.5, 2.0, seed=1, step=2, x_hat=x_hat, mask=MASK)
    for b in range(4):
        one = slice(b, b + 1)
        alone = bk.noisy_pair(x[one], 0.5, 2.0, seed=1, step=2, sample_id=b, x_hat=x_hat[one], mask=MASK[one])
        for all_samples, sample in zip(whole, alone, strict=True):
            same_bits(all_samples[one], sample)


def test_gradients() -> None:
    x, x_hat = (random(4, 3, dtype=torch.float64, seed=k).requires_grad_() for k in range(2))
    low, high = (torch.tensor(v, dtype=torch.float64).requires_grad_() for v in (0.5, 2.0))
    key: dict[str, Any] = {"seed": 1, "step": 2}
    check = torch.autograd.gradcheck
    assert check(lambda x: bk.noisy_pair(x, 0.5, 2.0, **key), (x,), check_batched_grad=True)
    assert check(lambda x, y: bk.noisy_pair(x, 0.5, 2.0, x_hat=y, mask=MASK, **key), (x, x_hat))
    assert check(lambda x, y, a, b: bk.noisy_pair(x, a, b, x_hat=y, mask=MASK, **key), (x, x_hat, low, high))
    data = {"sigma_data": 0.7, "x_hat": x_hat, "mask": MASK, **key}
    assert check(lambda x: bk.noisy_pair(x, LEVELS, 2.0, **data), (x,), check_batched_grad=True)
    assert check(lambda y: bk.noisy_pair(x, LEVELS, 2.0, **data | {"x_hat": y}), (x_hat,))
    assert check(lambda a, s: bk.noisy_pair(x, a, 2.0, **data | {"sigma_data": s}), (low, high))
    assert torch.autograd.gradgradcheck(lambda x, y: bk.noisy_pair(x, 0.5, 2.0, x_hat=y, mask=MASK, **key), (x, x_hat))


def test_tracing(same_bits: Bits) -> None:
    x, x_hat = random(4, 3), random(4, 3, seed=1)

    def body(x: Tensor, low: float, high: float, step: int) -> tuple[Tensor, Tensor]:
        return bk.noisy_pair(x, low, high, seed=1, step=step, x_hat=x_hat, mask=MASK)

    compiled = torch.compile(body, fullgraph=True, backend="aot_eager")
    for k in range(3):
        for actual, expected in zip(compiled(x, 0.5 + k, 2.0 + k, k), body(x, 0.5 + k, 2.0 + k, k), strict=True):
            same_bits(actual, expected)


@pytest.mark.parametrize("sigma_data", [None, 0.7])
@pytest.mark.parametrize("infinite", [float("inf"), float("nan")])
def test_a_row_that_the_mask_leaves_out_has_gradient_0(infinite: float, sigma_data: float | None) -> None:
    """As in eager: whatever the upstream gradient is there, such as where a loss overflows in float16."""
    x, x_hat = torch.zeros(4, 3, requires_grad=True), torch.zeros(4, 3, requires_grad=True)
    given: dict[str, Any] = {"x_hat": x_hat, "mask": MASK, "sigma_data": sigma_data}
    low, high = bk.noisy_pair(x, 0.5, 2.0, seed=1, step=2, **given)
    upstream = torch.full((4, 3), infinite)
    found = torch.autograd.grad([low, high], [x, x_hat], [upstream, upstream])
    for gradient, chosen in zip(found, (~MASK, MASK), strict=True):
        assert (gradient[~chosen] == 0).all()
        assert not gradient[chosen].isfinite().any()


# --- what the network generates ---------------------------------------------------------------------------------------

FORMS: list[dict[str, Any]] = [{}, {"parameterization": "cm", "sigma_min": 0.01}, {"parameterization": "edm"}]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", [MASK, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_generated(
    each_backend: str, dtype: torch.dtype, mask: Tensor | None, form: dict[str, Any], same_bits: Bits
) -> None:
    """The pair of a sample that `denoise` makes of the noisy one (GC Alg. 1), bit by bit where no half rounds it."""
    x, F = random(4, 3, 41, dtype=dtype), random(4, 3, 41, dtype=dtype, seed=1)
    low, key = LEVELS, {"seed": 3, "step": 1, "sample_id": 5}
    for data in (0.5, torch.tensor([0.4, 0.5, 0.6, 0.7])):
        x_hat = bk.denoise(bk.add_noise(x, low, **key), F, low, sigma_data=data, **form)
        chosen = torch.ones(4, dtype=torch.bool) if mask is None else mask
        expected = bk.noisy_pair(x, low, 2.0, x_hat=x_hat, mask=chosen, sigma_data=data, **key)
        found = bk.noisy_pair(x, low, 2.0, F=F, mask=mask, sigma_data=data, **form, **key)
        for actual, wanted in zip(found, expected, strict=True):
            same_bits(actual, wanted)
    x_hat = bk.denoise(bk.add_noise(x, low, **key), F, low, **form)
    chosen = torch.ones(4, dtype=torch.bool) if mask is None else mask
    for actual, wanted in zip(
        bk.noisy_pair(x, low, 2.0, F=F, mask=mask, **form, **key),
        bk.noisy_pair(x, low, 2.0, x_hat=x_hat, mask=chosen, **key),
        strict=True,
    ):
        same_bits(actual, wanted)


@pytest.mark.parametrize("network", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(4, 1), (4, 6, 5), (4, 1025), (4, 0), (0, 3)])
def test_generated_as_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, network: torch.dtype, same_bits: Bits
) -> None:
    x, F = random(*shape, dtype=dtype), random(*shape, dtype=network, seed=1)
    layouts = [lambda x: x] if len(shape) < 3 else [lambda x: x, lambda x: x.transpose(1, 2), lambda x: x[:, ::2]]
    levels = (LEVELS[: shape[0]], 2.0)
    for k, layout in enumerate(layouts):
        given: dict[str, Any] = {"F": layouts[k - 1](F) if k != 2 else layout(F), "mask": MASK[: shape[0]]}
        if given["F"].shape != layout(x).shape:
            given["F"] = layout(F)
        given |= {"sigma_data": 0.7, "seed": 3, "step": 1, "sample_id": torch.arange(shape[0])}
        ours, plain = (module.noisy_pair(layout(x), *levels, **given) for module in (bk, reference))
        for actual, expected in zip(ours, plain, strict=True):
            same_bits(actual, expected)
            assert actual.stride() == torch.empty_like(layout(x)).stride()


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.float16)])
def test_outputs_of_some_samples(each_backend: str, dtypes: tuple[torch.dtype, torch.dtype], same_bits: Bits) -> None:
    """A network's outputs of some samples, and their places, give what all outputs and a mask give."""
    x, F = random(4, 3, 41, dtype=dtypes[0]), random(2, 3, 41, dtype=dtypes[1], seed=1)
    key: dict[str, Any] = {"seed": 3, "step": 1, "sample_id": 5, "sigma_data": 0.5}
    for places in ([1, -1, 0, -1], [-1, -5, -1, -1], [1, 1, 1, 0]):
        at = torch.tensor(places)
        expected = bk.noisy_pair(x, LEVELS, 2.0, F=F[at.clamp(min=0)], mask=at >= 0, **key)
        for found in (
            bk.noisy_pair(x, LEVELS, 2.0, F=F, mask=at, **key),
            bk.noisy_pair(x, LEVELS, 2.0, F=F.transpose(1, 2).clone().transpose(1, 2), mask=at, **key),
            bk.noisy_pair(x, LEVELS, 2.0, F=F, mask=at.repeat_interleave(2)[::2], **key),
        ):
            for actual, wanted in zip(found, expected, strict=True):
                same_bits(actual, wanted)
    alone = bk.noisy_pair(x[2:3], LEVELS[2], 2.0, F=F, mask=torch.tensor([1]), **key | {"sample_id": 7})
    together = bk.noisy_pair(x, LEVELS, 2.0, F=F, mask=torch.tensor([-1, -1, 1, -1]), **key)
    for actual, wanted in zip(alone, together, strict=True):
        same_bits(actual, wanted[2:3])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_places_in_a_graph(backend: str, same_bits: Bits) -> None:
    x, F, at = random(3, 5), random(2, 5, seed=1), torch.tensor([1, -1, 0])

    def body(F: Tensor, at: Tensor, low: float) -> tuple[Tensor, Tensor]:
        return bk.noisy_pair(x, low, 2 * low, F=F, mask=at, seed=1, step=2)

    compiled = torch.compile(body, fullgraph=True, backend=backend)
    for outputs, places in ((F, at), (random(4, 5, seed=2), at + 1)):
        for actual, expected in zip(compiled(outputs, places, 0.5), body(outputs, places, 0.5), strict=True):
            same_bits(actual, expected)


@pytest.mark.slow
def test_the_derivative_of_placed_outputs_in_a_graph(same_bits: Bits) -> None:
    x, F, at = random(3, 5), random(2, 5, seed=1).requires_grad_(), torch.tensor([1, -1, 0])

    def body(F: Tensor) -> Tensor:
        return bk.noisy_pair(x, 0.5, 2.0, F=F, mask=at, seed=1, step=2)[1].square().sum()

    compiled = torch.compile(body, fullgraph=True, backend="aot_eager")
    ours, eager = (torch.autograd.grad(f(F), F)[0] for f in (compiled, body))
    same_bits(ours, eager)


def test_places_out_of_range_and_their_derivatives() -> None:
    x, F = random(3, 5, dtype=torch.float64), random(2, 5, dtype=torch.float64, seed=1).requires_grad_()
    key: dict[str, Any] = {"seed": 3, "step": 1}
    at = torch.tensor([1, -1, 0])
    assert torch.autograd.gradcheck(lambda F: bk.noisy_pair(x, 0.5, 2.0, F=F, mask=at, **key), (F,))
    with pytest.raises(ValueError, match="mask must hold places below 2, the number of samples in F, got 2"):
        bk.noisy_pair(x, 0.5, 2.0, F=F.detach(), mask=at + 1, **key)
    with pytest.raises(ValueError, match=r"F must have shape \(N, 5\) and a sample"):
        bk.noisy_pair(x, 0.5, 2.0, F=F[:0].detach(), mask=-at.abs(), **key)
    with pytest.raises(ValueError, match=r"mask must have shape \(3,\)"):
        bk.noisy_pair(x, 0.5, 2.0, F=F.detach(), mask=at[:2], **key)
    with pytest.raises(TypeError, match="mask must be a bool tensor"):
        bk.noisy_pair(x, 0.5, 2.0, x_hat=x, mask=at, **key)


def test_generated_rows_alone_are_read() -> None:
    x, F = random(4, 9), torch.full((4, 9), float("nan"))
    F[0], F[2] = 1.0, 2.0
    low, high = bk.noisy_pair(x, 0.5, 2.0, F=F, mask=MASK, seed=1, step=2)
    assert low.isfinite().all()
    assert high.isfinite().all()


def test_generated_gradients_and_tracing(same_bits: Bits) -> None:
    key: dict[str, Any] = {"seed": 1, "step": 2, "mask": MASK, "sigma_data": 0.5}
    x, F = (random(4, 3, dtype=torch.float64, seed=k).requires_grad_() for k in range(2))
    low = LEVELS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, F: bk.noisy_pair(x, 0.5, 2.0, F=F, **key), (x, F))
    assert torch.autograd.gradcheck(lambda a: bk.noisy_pair(x, a, 2.0, F=F, **key), (low + 0.1,))
    x, F = random(4, 3), random(4, 3, seed=1)

    def body(x: Tensor, F: Tensor, low: float, step: int) -> tuple[Tensor, Tensor]:
        return bk.noisy_pair(x, low, 2.0 + low, seed=1, step=step, F=F, mask=MASK, sigma_data=0.5)

    torch._dynamo.reset()
    compiled = torch.compile(body, fullgraph=True, backend="aot_eager")
    for k in range(3):
        for actual, expected in zip(compiled(x, F, 0.5 + k, k), body(x, F, 0.5 + k, k), strict=True):
            same_bits(actual, expected)


X = torch.ones(4, 3)
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x_hat": X}, ValueError, "x_hat and mask go together"),
    ({"x_hat": X, "mask": MASK.float()}, TypeError, "mask must be a bool tensor"),
    ({"x_hat": X, "mask": MASK[:2]}, ValueError, r"mask must have shape \(4,\)"),
    ({"x_hat": X[:, :1], "mask": MASK}, ValueError, "x_hat must have the shape of x"),
    ({"x_hat": X.double(), "mask": MASK}, TypeError, "x_hat must have the dtype of x"),
    ({"sigma_high": torch.ones(3)}, ValueError, "sigma_high must be a 0-d or a "),
    ({"sigma_data": torch.ones(3)}, ValueError, "sigma_data must be a 0-d or a "),
    ({"sigma_data": "1"}, TypeError, "sigma_data must be a float"),
    ({"F": X, "x_hat": X, "mask": MASK}, ValueError, "x_hat and F exclude one another"),
    ({"F": X[:, :1]}, ValueError, "F must have the shape of x"),
    ({"F": X.long()}, TypeError, "F must be float16"),
    ({"F": X, "mask": MASK.float()}, TypeError, "mask must be a bool tensor"),
    ({"F": X, "parameterization": "v"}, ValueError, "parameterization must be one of bcm, cm, edm"),
    ({"F": X, "sigma_min": "0"}, TypeError, "sigma_min must be a float"),
    ({"sample_id": -1}, ValueError, "sample_id must be in"),
]


@pytest.mark.parametrize(("wrong", "error", "words"), WRONG)
def test_errors(wrong: dict[str, Any], error: type[Exception], words: str, each_backend: str) -> None:
    with pytest.raises(error, match=words):
        bk.noisy_pair(X, **{"sigma_low": 0.5, "sigma_high": 2.0, "seed": 0, "step": 0, **wrong})


@pytest.mark.parametrize("module", [bk, reference])
def test_the_step_must_be_given(module: Any) -> None:
    with pytest.raises(TypeError, match="step"):
        module.noisy_pair(X, 0.5, 2.0, seed=0)
