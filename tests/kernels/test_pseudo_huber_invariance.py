"""The losses: a sample's bits do not depend on its batch, the threads or the instruction set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bicm_kernels as bk
from tests.support import instruction_sets
from tests.support.loss_calls import CODES, EVERY_KIND
from tests.support.tensors import BF16, F16, F32, F64, Bits, Threads, random


@pytest.mark.parametrize("options", EVERY_KIND[::3])
@pytest.mark.parametrize("shape", [(300, 64), (9, 5000), (3, 150_000), (5, 2, 50, 60)])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_sample_does_not_depend_on_its_batch(
    options: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype, same_bits: Bits, threads: Threads
) -> None:
    batch = shape[0]
    tensors = [random(*shape, dtype=dtype, seed=k) for k in range(3)]
    t, weight = torch.linspace(0.1, 80, batch), torch.linspace(0.5, 2, batch)

    def part(begin: int, end: int) -> list[Tensor]:
        inputs = [x[begin:end].detach().requires_grad_() for x in tensors]
        more = {**options, "reduction": "none", "weight": weight[begin:end]}
        value = bk.consistency_loss(*inputs[:2], t[begin:end], t[begin:end] / 2, inputs[2], **more)
        plain = bk.pseudo_huber(*inputs[:2], **more)
        return [value.detach(), plain.detach(), *torch.autograd.grad((value + plain).sum(), inputs)]

    whole = part(0, batch)
    for count in (1, 2, 3):
        with threads(count):
            for actual, expected in zip(part(0, batch), whole, strict=True):
                same_bits(actual, expected)
    for begin, end in [(0, 1), (batch - 1, batch), (batch // 2, batch // 2 + 1), (1, batch)]:
        for actual, expected in zip(part(begin, end), whole, strict=True):
            same_bits(actual, expected[begin:end])


@pytest.mark.parametrize("gradient", ["auto", "forward", "backward"])
@pytest.mark.parametrize("options", EVERY_KIND)
@pytest.mark.parametrize("shape", [(3, 5001), (300, 64), (2, 5, 6, 7), (256, 3, 32, 32)])
@pytest.mark.parametrize(("dtype", "other"), [(F16, F16), (BF16, BF16), (F32, F32), (F64, F64), (F32, BF16)])
def test_a_gradient_does_not_depend_on_which_others_are_needed(
    gradient: str,
    options: dict[str, Any],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    other: torch.dtype,
    same_bits: Bits,
    threads: Threads,
) -> None:
    """That of F alone, as training asks for it, goes from memory to memory in registers; with its sum, if squared."""
    F, target, x = (random(*shape, dtype=kind, seed=k) for k, kind in enumerate((dtype, other, other)))
    t, options = torch.linspace(0.1, 80, shape[0]), {**options, "gradient": gradient}

    def losses(F: Tensor, target: Tensor, x: Tensor) -> Tensor:
        return bk.pseudo_huber(F, target, **options) + bk.consistency_loss(x, F, t, None, target, **options)

    def value_and_gradient(needed: bool) -> list[Tensor]:
        inputs = [F.clone().requires_grad_(), *(y.clone().requires_grad_(needed) for y in (target, x))]
        value = losses(*inputs)
        return [value.detach(), torch.autograd.grad(value, inputs[0])[0]]

    with threads(1):  # large results are written with non-temporal stores
        for actual, expected in zip(value_and_gradient(False), value_and_gradient(True), strict=True):
            same_bits(actual, expected)


@pytest.mark.parametrize("weight", [1e-42, 1e-60, 1e39])
def test_squares_of_weights_outside_float32(each_backend: str, weight: float) -> None:
    """With the value or after it, of the prediction alone or of both: the slope is as accurate as its product."""
    scale = 2.0**-40 if weight > 1 else 2.0**40
    pred, target = (scale * random(2, 70, dtype=F32, seed=k) for k in range(2))
    for gradient in ("backward", "forward"):
        for needed in (False, True):
            inputs = [x.clone().requires_grad_(own) for x, own in ((pred, True), (target, needed))]
            loss = bk.pseudo_huber(*inputs, kind="squared", weight=weight, gradient=gradient)
            (found,) = torch.autograd.grad(loss, inputs[0])
            torch.testing.assert_close(found.double(), weight * (pred - target).double(), rtol=3e-7, atol=2.0**-149)


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_the_gradient_of_a_half_is_rounded_once_with_its_value(dtype: torch.dtype) -> None:
    """Autograd keeps none, but the op may be called."""
    pred, target = (random(3, 70, dtype=dtype, seed=k) for k in range(2))
    rest = None, None, CODES["squared"], 1
    _, (alone,) = torch.ops.bicm_kernels.pseudo_huber_with_gradients(1, pred, target, *rest)
    _, (both, _) = torch.ops.bicm_kernels.pseudo_huber_with_gradients(3, pred, target, *rest)
    assert torch.equal(alone, both) and torch.equal(alone, (2 * (pred.float() - target.float())).to(dtype))


DIGEST = """
import hashlib, itertools, torch, bicm_kernels as bk
def digest_all():
    digest = hashlib.sha256()
    def add(*tensors):
        for x in tensors:
            digest.update(x.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for dtype, shape in itertools.product(dtypes, [(1, 1), (3, 67), (5, 1025), (2, 140_003), (1000, 3, 32, 32)]):
        if len(shape) == 4 and dtype != torch.float32:
            continue
        x, F, target = (bk.normal(shape, seed=k, dtype=dtype).requires_grad_() for k in range(3))
        t = torch.linspace(0.1, 80, shape[0])
        for options in ({}, {"c": 0.0}, {"kind": "elementwise", "c": 0.03}, {"kind": "squared"}):
            value = bk.pseudo_huber(F, target, weight=t, **options)
            add(value, *torch.autograd.grad(value, [F]))
            value = bk.consistency_loss(x, F, t, t / 2, target, reduction="none", **options)
            add(value, *torch.autograd.grad(value.sum(), [x, F, target]))
            value = bk.consistency_loss(x, F, t, None, target, parameterization="cm", **options)
            add(value, *torch.autograd.grad(value, [F]))
            value = bk.consistency_loss(x.detach(), F, t, None, target.detach(), gradient="backward", **options)
            add(value, *torch.autograd.grad(value, [F]))
            value = bk.pseudo_huber(F, target.detach(), weight=t, **options)
            add(value, *torch.autograd.grad(value, [F]))
    return digest.hexdigest()
"""


@pytest.fixture(scope="module")
def best_digest() -> str:
    space: dict[str, Any] = {}
    exec(DIGEST, space)
    return str(space["digest_all"]())


@pytest.mark.parametrize("instructions", instruction_sets.EVERY)
def test_instruction_sets_and_threads_give_one_digest(python: Any, best_digest: str, instructions: str) -> None:
    instruction_sets.need(instructions)
    program = (
        DIGEST
        + "print(bk.backend.describe())\nfor n in (1, 2):\n    torch.set_num_threads(n)\n    print(digest_all())\n"
    )
    described, one, two = python(program, BICM_KERNELS_ISA=instructions).stdout.splitlines()
    assert described.startswith(f"cpu: native (C++, {instructions}")
    assert one == two == best_digest
