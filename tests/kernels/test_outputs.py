"""Outputs that the caller gives: written exactly, over an input exactly or apart from all, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import bicm_kernels as bk
from bicm_kernels import backend
from bicm_kernels.ops import outputs
from tests.support.multistep_calls import ARGUMENTS, OPS, as_tensors, call, operands
from tests.support.tensors import BF16, F32, F64, LAYOUTS, Bits, random
from tests.support.wrong_calls import WIDE, Wrong, X, affine, check_messages, ddim, denoised

MEMORY = torch.zeros(64)


def named(x: Tensor, *, scale: float | None = 0.5, **options: Any) -> bk.DenoisedStep:
    return bk.denoised_step([x], [2.0], [0.5], x0_weight=0.25, next_scale=scale, **options)


def vmapped(x: Tensor) -> bk.DenoisedStep:
    found = torch.vmap(named)(x[None])
    assert type(found) is bk.DenoisedStep
    return found


WAYS: dict[str, Callable[[Tensor], Any]] = {
    "eager": named,
    "out": lambda x: named(x, out=[torch.empty_like(x) for _ in range(3)]),
    "compiled": lambda x: torch.compile(named, fullgraph=True, backend="eager")(x),
    "vmap": lambda x: bk.DenoisedStep(*(y[0] for y in vmapped(x))),
    "requires grad": lambda x: named(x.clone().requires_grad_()),
    "per sample": lambda x: named(x, clip=torch.tensor([9.0, 9.0])),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_denoised_step_is_a_named_tuple(each_backend: str, way: str) -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    found = WAYS[way](x)
    assert type(found) is bk.DenoisedStep and found._fields == ("out", "x0", "next")
    assert torch.equal(found.out, x) and torch.equal(found.x0.reshape(2, 2), 2 * x)
    assert torch.equal(found.next.reshape(2, 2), 0.5 * x)
    out, x0, scaled = found
    assert out is found[0] is found.out and x0 is found.x0 and scaled is found.next


def test_a_denoised_step_without_a_scale_has_no_next(each_backend: str) -> None:
    x = torch.ones(1, 2)
    assert named(x, scale=None).next is None
    assert named(x, scale=None, out=(x, torch.empty_like(x))).out is x


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", [F32, BF16, F64])
@pytest.mark.parametrize("kind", ["floats", "per sample"])
def test_out(each_backend: str, name: str, dtype: torch.dtype, kind: str, same_bits: Bits) -> None:
    numbers = OPS[name][1] if kind == "floats" else as_tensors(OPS[name][1], ARGUMENTS["per sample"])
    for layout in ("contiguous", "channels_last", "sliced", "transposed"):
        tensors = [LAYOUTS[layout](x) for x in operands(name, (4, 3, 9, 14), dtype, dtype)]
        plain = call(name, tensors, numbers)
        several = len(plain) > 1
        apart = tuple(LAYOUTS["cut out"](torch.zeros_like(x)) for x in plain)
        targets = [apart]
        for k in range(len(tensors)):
            targets.append((tensors[k], *apart[1:]))
        if several:
            targets.append((apart[0], tensors[0], apart[2]))
            targets.append((tensors[1], tensors[0], apart[2]))
            for k in range(len(plain)):
                targets.append(tuple(apart[i] if i == k else torch.zeros_like(x) for i, x in enumerate(plain)))
        for target in targets:
            inputs = [x.clone(memory_format=torch.preserve_format) for x in tensors]
            outs = tuple(
                inputs[places[0]] if (places := [i for i, x in enumerate(tensors) if x is y]) else y for y in target
            )
            results = call(name, inputs, {**numbers, "out": outs if several else outs[0]})
            for result, out, expected in zip(results, outs, plain, strict=True):
                assert result is out
                same_bits(out, expected)


def test_out_of_a_step_without_next(same_bits: Bits) -> None:
    x = random(2, 30)
    expected = bk.denoised_step([x], [0.5], [0.25], x0_weight=1.0, clip=0.3)
    outs = (torch.empty_like(x), x)
    results = bk.denoised_step([x], [0.5], [0.25], x0_weight=1.0, clip=0.3, out=outs)
    assert len(results) == 3
    assert results[2] is None
    for actual, wanted in zip(outs, expected[:2], strict=True):
        same_bits(actual, wanted)


@pytest.mark.parametrize("weight", [0.5, torch.tensor([0.5, 0.25])], ids=["float", "per sample"])
def test_autograd_notices_what_is_written(each_backend: str, weight: Any) -> None:
    w, x = torch.ones(2, 3, requires_grad=True), torch.ones(2, 3)
    product = (w * x).sum()
    bk.affine_step([x], [weight], out=x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    outs = [torch.empty(2, 3) for _ in range(3)]
    bk.denoised_step([torch.ones(2, 3)], [weight], [0.5], x0_weight=0.5, next_scale=2.0, out=outs)
    assert all(out._version for out in outs)
    q, overflow = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    exact = [torch.empty_like(q), torch.empty_like(q)]
    bk.exact_affine_step(q, [x], [weight], q.clone(), ratio=(1, 2), overflow=overflow, out=(exact[0], exact[1]))
    assert all(out._version for out in (*exact, overflow))
    with torch.inference_mode():
        y = torch.ones(2, 3)
        assert bk.affine_step([y], [0.5], out=y) is y  # such tensors have no version


def test_a_weight_is_not_written_to_while_it_is_read() -> None:
    x, seeds = torch.ones(2, 3), torch.tensor([3, 4])
    with backend.use("native"):
        for run in (
            lambda: bk.affine_step([x], [x[:, 0]], out=x),
            lambda: bk.affine_step([x], [x[0, 0]], out=x),
            lambda: bk.ddim_step(x, x.clone(), a=x[1, 2], b=0.5, out=x),
        ):
            with pytest.raises(ValueError, match="out must not share memory with a tensor of weights"):
                run()
        weights = torch.tensor([0.5, 2.0])
        assert bk.affine_step([x], [weights], noise_weight=weights, seed=seeds, out=x) is x


def test_more_dimensions_than_the_kernels_know_are_refused() -> None:
    many = torch.ones([2] + [1] * 70, requires_grad=True)
    for run in (
        lambda: bk.scale_input(many.detach(), 1.0),
        lambda: bk.add_noise(torch.empty([0] * 100), 1.0, seed=1),
        lambda: bk.affine_step([many.detach()], [0.5], out=torch.empty_like(many)),
        lambda: bk.denoise(many, torch.ones_like(many), 1.0),
    ):
        with backend.use("native"), pytest.raises(ValueError, match="more than 64 dimensions"):
            run()


def test_an_empty_gradient_has_the_dtype_that_is_asked_for() -> None:
    numbers = [torch.tensor(0.5, dtype=torch.float64)] * 3
    found = torch.ops.bicm_kernels.denoise_gradient(torch.ones(2, 0, 3), *numbers, False, False, True, torch.float16)
    assert (found.dtype, found.shape) == (torch.float16, (2, 0, 3))


def test_out_of_an_empty_batch(each_backend: str) -> None:
    z, outs = torch.empty(0, 3), tuple(torch.empty(0, 3) for _ in range(3))
    assert bk.ddim_step(z, z, a=1.0, b=0.5, out=outs[0]) is outs[0]
    results = bk.denoised_step([z], [1.0], [1.0], x0_weight=0.5, next_scale=2.0, out=outs)
    assert all(result is out for result, out in zip(results, outs, strict=True))


def test_out_may_interleave_with_an_input(each_backend: str, same_bits: Bits) -> None:
    memory = random(4, 6, 10, 2)
    slices = {
        "columns": (memory[..., 0], memory[..., 1]),
        "rows": (memory[:, ::2], memory[:, 1::2]),
        "halves of samples": (memory[:, :3], memory[:, 3:]),
        "samples": (memory[::2], memory[1::2]),
        "corners": (memory[:, :, :5], memory[:, :, 5:]),
    }
    for z, out in slices.values():
        expected = bk.ddim_step(z.clone(), z.clone(), a=1.5, b=0.25)
        before = z.clone()
        bk.ddim_step(z, z, a=1.5, b=0.25, out=out)
        same_bits(out.contiguous(), expected.contiguous())
        same_bits(z, before)


def test_out_keeps_its_own_layout(each_backend: str, same_bits: Bits) -> None:
    z = random(2, 3, 8, 9)
    for layout in ("channels_last", "transposed", "sliced", "samples last"):
        out = LAYOUTS[layout](torch.zeros_like(z))
        bk.ddim_step(z, z, a=1.5, b=0.25, out=out)
        same_bits(out, bk.ddim_step(z, z, a=1.5, b=0.25))


def view(offset: int, *strides: int) -> Tensor:
    return MEMORY.as_strided((2, 3), strides, offset)


OUTS: dict[str, Wrong] = {
    "not a tensor": (lambda: ddim(out=1.0), TypeError, ("out must be a tensor", "1.0 (float)")),
    "shape": (lambda: ddim(out=WIDE), ValueError, ("out must have the shape of z, (2, 3), got (2, 4)",)),
    "dtype": (
        lambda: ddim(out=X.double()),
        TypeError,
        ("out must have the dtype of z, torch.float32, got torch.float64",),
    ),
    "dtype of the network": (
        lambda: ddim(eps=X.half(), out=X.half()),
        TypeError,
        ("out", "torch.float32", "torch.float16"),
    ),
    "integers": (lambda: ddim(out=X.int()), TypeError, ("out must be float16", "torch.int32")),
    "device": (
        lambda: ddim(out=X.to("meta")),
        ValueError,
        ("out must be on the device of z, cpu, got meta",),
    ),
    "affine": (lambda: affine(out=WIDE), ValueError, ("out must have the shape of tensors[0]",)),
    "itself": (
        lambda: ddim(out=torch.zeros(1, 3).expand(2, 3)),
        ValueError,
        ("out must not overlap itself",),
    ),
    "itself, finely": (
        lambda: ddim(out=view(0, 2, 1)),
        ValueError,
        ("out must not overlap itself", "(2, 1)"),
    ),
    "shifted": (
        lambda: ddim(view(0, 3, 1), out=view(1, 3, 1)),
        ValueError,
        ("out must be exactly z or disjoint",),
    ),
    "transposed": (lambda: ddim(view(0, 3, 1), out=view(0, 1, 2)), ValueError, ("out must be exactly z",)),
    "prediction": (
        lambda: ddim(eps=view(0, 8, 1), out=view(2, 8, 1)),
        ValueError,
        ("out must be exactly eps",),
    ),
    "other width": (
        lambda: ddim(eps=MEMORY[:3].view(torch.bfloat16).view(2, 3), out=MEMORY[:6].view(2, 3)),
        ValueError,
        ("out must be exactly eps",),
    ),
    "one out for two": (lambda: denoised(out=(X,)), ValueError, ("out must hold (out, x0)", "1")),
    "two outs for three": (
        lambda: denoised(next_scale=1.0, out=(X, X)),
        ValueError,
        ("out must hold (out, x0), and next", "2"),
    ),
    "three outs for two": (lambda: denoised(out=(X, X, X)), ValueError, ("out must hold (out, x0)", "3")),
    "x0": (
        lambda: denoised(out=(X, WIDE)),
        ValueError,
        ("x0 must have the shape of tensors[0], (2, 3), got (2, 4)",),
    ),
    "next": (
        lambda: denoised(next_scale=1.0, out=(X, X.clone(), X.double())),
        TypeError,
        ("next must have the dtype of tensors[0]", "torch.float64"),
    ),
    "empty next": (
        lambda: denoised(next_scale=1.0, out=(X, X.clone(), torch.empty(0))),
        ValueError,
        ("next must have the shape of tensors[0], (2, 3), got (0,)",),
    ),
    "outs share": (
        lambda: denoised(out=(view(0, 3, 1),) * 2),
        ValueError,
        ("out", "x0", "must not share memory"),
    ),
    "outs overlap": (
        lambda: denoised(out=(view(0, 3, 1), view(2, 3, 1))),
        ValueError,
        ("must not share memory",),
    ),
}


def test_wrong_outputs(each_backend: str) -> None:
    check_messages(OUTS)


def test_nothing_is_written_by_a_wrong_call(each_backend: str) -> None:
    out = torch.full((2, 3), 7.0)
    for changes in ({"eps": WIDE}, {"a": torch.ones(3)}, {"eps": (X, X)}, {"b": "1"}):
        with pytest.raises((TypeError, ValueError)):
            ddim(**changes, out=out)
    assert (out == 7).all()


def interleaved() -> tuple[Tensor, Tensor]:
    """A state, and a place for the result between its rows, in another order."""
    memory = random(8, 8)
    return memory[:4, :4], memory[:4, 4:].T


def test_an_output_interleaved_in_another_order_is_refused_by_the_kernels() -> None:
    z, out = interleaved()
    before = out.clone()
    with pytest.raises(ValueError, match="out overlaps a tensor"):
        ddim(z, z, out=out)
    assert torch.equal(out, before)


def test_an_output_interleaved_in_another_order_is_right_in_the_reference(same_bits: Bits) -> None:
    z, out = interleaved()
    expected = ddim(z.clone(), z.clone())
    with bk.backend.use("reference"):
        assert ddim(z, z, out=out) is out
    same_bits(out.contiguous(), expected)


def test_large_tensors_are_explained_without_their_size_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "_bytes", None)
    memory = torch.zeros(2**24 + 64)
    with pytest.raises(ValueError, match="out must be exactly z or disjoint"):
        ddim(memory[:-3].view(1, -1), memory[3:].view(1, -1).clone(), out=memory[3:].view(1, -1))
    with bk.backend.use("reference"):
        ddim(memory.view(2, -1), memory.view(2, -1), out=torch.empty(2, 2**23 + 32))
