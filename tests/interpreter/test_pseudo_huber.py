"""Pseudo-Huber losses from the Triton kernels: value and derivatives within 1e-6 of the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bits import random
from torch import Tensor

import bicm_kernels
from bicm_kernels import backend, reference

pytest.importorskip("triton")

from bicm_kernels.triton_kernels import OPS, counter
from bicm_kernels.triton_kernels.pseudo_huber import CHUNK, RESIDENT

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
PAIRS = [(F32, F32), (F64, F64), (F16, F16), (BF16, BF16), (F32, BF16), (F16, F64)]
KINDS, REDUCTIONS = ("vector", "elementwise", "squared"), ("mean", "sum", "none")
PARAMETERIZATIONS = ("bcm", "cm", "edm")
# What rounding of a gradient to its dtype allows, relative; the interpreter truncates to bfloat16.
ROUNDING = {F16: 2.0**-11, BF16: 2.0**-7, F32: 0.0, F64: 0.0}
WEIGHT = torch.tensor([0.5, 2.0, 0.0])


def close(actual: Tensor, expected: Tensor, rounding: float = 0.0) -> None:
    """Relative to the largest number: a residual that cancels keeps the rounding of what it was made of."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected).abs()
    allowed = rounding * expected.abs() + 1e-6 * expected.abs().max() if expected.numel() else error
    assert bool((error <= allowed).all()), float(error.max())


def exact(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_()


def check(name: str, states: list[Tensor], named: list[str], call: tuple[Any, ...], options: dict[str, Any]) -> None:
    """An op and its derivative against the reference in float64."""
    loss, sums = OPS[name](*states, *call)
    wide = [exact(x) for x in states]
    expected = getattr(reference, name)(**dict(zip(named, wide, strict=True)), **options)
    close(loss, expected.detach())
    assert loss.dtype == (F64 if F64 in [x.dtype for x in states] else F32)
    upstream = torch.full(loss.shape, 1024.0, dtype=loss.dtype)
    wanted = torch.autograd.grad(expected, wide, upstream.double())
    for needs in (1, 2 ** len(states) - 1):
        got = OPS[f"{name}_backward"](upstream, sums, needs, *states, *call)
        assert len(got) == needs.bit_count()
        for x, gradient, value in zip(states, got, wanted, strict=False):
            assert gradient.dtype == x.dtype
            assert gradient.stride() == torch.empty_like(x).stride()
            close(gradient, value, ROUNDING[x.dtype])


def check_both(name: str, states: list[Tensor], call: tuple[Any, ...]) -> None:
    """Value and gradients at once: the bits of a pass forward and one backward."""
    loss, sums = OPS[name](*states, *call)
    for needs in (1, 2 ** len(states) - 1):
        found, gradients = OPS[f"{name}_with_gradients"](needs, *states, *call)
        assert torch.equal(found, loss)
        upstream = torch.ones_like(loss)
        for a, b in zip(gradients, OPS[f"{name}_backward"](upstream, sums, needs, *states, *call), strict=True):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()


@pytest.mark.parametrize("reduction", range(3))
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_value_and_gradients_at_once(kind: int, reduction: int) -> None:
    c = None if kind == 2 else 0.2
    sizes = [7, 1025, RESIDENT, RESIDENT + 1] if reduction == 0 else [33]
    for dtypes in ((F32, F32), (F32, BF16), (F64, F64)):
        for size in sizes if dtypes[1] == F32 else [33]:
            states = [random((3, size), dtypes[k > 0], k) for k in range(3)]
            t = torch.tensor([0.5, 2.0, 70.0])
            check_both("pseudo_huber", states[:2], (WEIGHT, c, kind, reduction))
            check_both("consistency_loss", states, (t, None, WEIGHT, c, 0.5, 0.002, 0, 1, kind, reduction))
    strided = [random((3, 4, 5, 6), seed=k).to(memory_format=torch.channels_last) for k in range(2)]
    check_both("pseudo_huber", strided, (WEIGHT, c, kind, reduction))
    check_both("pseudo_huber", [strided[0], strided[1][..., :1].expand(3, 4, 5, 6)], (WEIGHT, c, kind, reduction))
    for shape in ((0, 5), (2, 0)):
        loss, (gradient,) = OPS["pseudo_huber_with_gradients"](1, random(shape), random(shape), None, c, kind, 1)
        assert gradient.shape == shape
        # The mean over no elements is no number; there is none where there are no samples.
        assert torch.isnan(loss) if kind == 1 and shape == (2, 0) else loss == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtypes", PAIRS[::2], ids=str)
def test_weights_of_elements(dtypes: tuple[torch.dtype, torch.dtype], kind: str) -> None:
    shape, c, t = (3, 5, 7), None if kind == "squared" else 0.2, torch.tensor([0.5, 2.0, 70.0])
    states = [random(shape, dtypes[k > 0], k) for k in range(3)]
    weight = random(shape, seed=7).abs() * (random(shape, seed=8) > 0)
    options = {"c": c, "weight": weight, "kind": kind}
    check("pseudo_huber", states[:2], ["pred", "target"], (weight, c, KINDS.index(kind), 0), options)
    check_both("pseudo_huber", states[:2], (weight, c, KINDS.index(kind), 1))
    options["weight"] = weight = weight[:, :1].expand(shape)
    call = (t, None, weight, c, 0.5, 0.002, 0, 0, KINDS.index(kind), 2)
    check("consistency_loss", states, ["F", "target", "x"], call, options | {"t": t, "reduction": "none"})


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_elements_in_two_chunks(kind: str) -> None:
    states, c = [random((1, CHUNK + 9), seed=k) for k in range(2)], None if kind == "squared" else 0.2
    weight = random((1, CHUNK + 9), seed=7).abs()
    options = {"c": c, "weight": weight, "kind": kind}
    check("pseudo_huber", states, ["pred", "target"], (weight, c, KINDS.index(kind), 0), options)


def test_squares_beyond_float32_at_once() -> None:
    for scale in (1e-36, 1e-20, 1e20, 1e35):
        states = [random((2, 300)) * scale, random((2, 300), seed=1) * scale]
        check_both("pseudo_huber", states, (None, 0.1, 0, 2))


def test_gradients_are_scaled() -> None:
    for dtype in (F16, F32, F64):
        x, upstream = random((3, 1100), dtype), torch.tensor([1.0, 0.3, -2.0])
        for factor in (upstream, torch.tensor(0.7), torch.tensor(1.0)):
            kept, product = x.clone(), x.to(F32 if dtype == F16 else dtype)
            OPS["scale_gradients_"](factor, [kept])
            assert torch.equal(kept, (product * factor.reshape(-1, 1).to(product.dtype)).to(dtype))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_pseudo_huber(dtypes: tuple[torch.dtype, torch.dtype], kind: str, reduction: str) -> None:
    states = [random((3, 5, 7), dtypes[0]), random((3, 5, 7), dtypes[1], 1)]
    cs: tuple[Any, ...] = (None,)
    if kind != "squared":
        cs = (None if kind == "vector" else 0.3, 0.0, torch.tensor([0.1, 0.0, 2.0]))
    for c in cs if dtypes == (F32, F32) else cs[-1:]:
        options = {"c": c, "weight": WEIGHT, "kind": kind, "reduction": reduction}
        call = (WEIGHT, c, KINDS.index(kind), REDUCTIONS.index(reduction))
        check("pseudo_huber", states, ["pred", "target"], call, options)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtypes", PAIRS[:5:2], ids=str)
def test_consistency_loss(
    dtypes: tuple[torch.dtype, torch.dtype], kind: str, parameterization: str, scaled: bool
) -> None:
    states = [random((3, 5, 7), dtypes[1]), random((3, 5, 7), dtypes[0], 1), random((3, 5, 7), dtypes[0], 2)]
    t, u = torch.tensor([0.5, 2.0, 70.0]), torch.tensor(0.3) if parameterization == "bcm" else None
    codes = (PARAMETERIZATIONS.index(parameterization), int(scaled), KINDS.index(kind), 0)
    c = None if kind == "squared" else 0.2
    options = {"t": t, "u": u, "c": c, "kind": kind, "parameterization": parameterization, "weight": WEIGHT}
    options |= {"scaled": scaled}
    check("consistency_loss", states, ["F", "target", "x"], (t, u, WEIGHT, c, 0.5, 0.002, *codes), options)


@pytest.mark.parametrize(
    ("batch", "elements"),
    [(1, 1), (2, 8), (2, 1023), (1, 1025), (2, 1025), (1, CHUNK), (1, CHUNK + 1), (2, CHUNK + 77)],
)
def test_sizes(batch: int, elements: int) -> None:
    states = [random((batch, elements)), random((batch, elements), seed=1)]
    for kind, c, reduction in (("vector", None, "none"), ("elementwise", 0.3, "mean"), ("squared", None, "mean")):
        options = {"c": c, "kind": kind, "reduction": reduction}
        call = (None, c, KINDS.index(kind), REDUCTIONS.index(reduction))
        check("pseudo_huber", states, ["pred", "target"], call, options)


@pytest.mark.parametrize("scale", [1e-36, 1e-25, 1e-17, 1e17, 1e25, 1e35])
@pytest.mark.parametrize("ratio", [0.0, 1e-3, 1.0, 1e3])
def test_squares_beyond_float32(scale: float, ratio: float) -> None:
    """Of residuals and of c."""
    c = ratio * scale
    states = [random((2, 300)) * scale, random((2, 300), seed=1) * scale]
    check("pseudo_huber", states, ["pred", "target"], (None, c, 0, 2), {"c": c, "reduction": "none"})


@pytest.mark.parametrize(("batch", "elements"), [(3, 40), (300, 3), (2, CHUNK + 1), (0, 5), (2, 0)])
def test_a_launch_counts_its_own_programs(batch: int, elements: int) -> None:
    """From where the launch before it ended, whatever its grid was."""
    for _ in range(2):
        for reduction in range(3):
            call = (random((batch, elements)), random((batch, elements), seed=1), None, None, 0, reduction)
            OPS["pseudo_huber"](*call)
            if batch < 300:
                OPS["pseudo_huber_with_gradients"](1, *call)
            word, begun = counter.begin(torch.device("cpu"), 0)
            assert word == begun


def test_an_aborted_launch_leaves_nothing() -> None:
    """The programs that counted before it broke off are not those of the next launch."""
    shape, begun = (3, 2 * CHUNK), counter.begin(torch.device("cpu"), 6)[1]
    counter.begin(torch.device("cpu"), 0)[0].fill_(begun + 5)  # all but one of its six
    x, y = random(shape), random(shape, seed=1)
    loss, _ = OPS["pseudo_huber"](x, y, None, None, 0, 0)
    torch.testing.assert_close(loss, reference.pseudo_huber(x, y), rtol=1e-6, atol=0)


def test_a_sample_does_not_know_its_batch() -> None:
    states = [random((40, 37)), random((40, 37), seed=1)]
    whole, sums = OPS["pseudo_huber"](*states, None, None, 0, 2)
    for place in (0, 7, 39):
        one, sum_ = OPS["pseudo_huber"](*[x[place : place + 1] for x in states], None, None, 0, 2)
        assert torch.equal(one, whole[place : place + 1])
        assert torch.equal(sum_, sums[place : place + 1])


def test_layouts() -> None:
    x = random((3, 4, 5, 6)).to(memory_format=torch.channels_last)
    y = random((3, 4, 5, 13), seed=1)[..., ::2][..., :6]
    check("pseudo_huber", [x, y], ["pred", "target"], (None, None, 0, 0), {})


def test_nothing_and_equal_tensors() -> None:
    x = random((3, 5))
    for kind, c in ((0, 0.0), (1, 0.0)):
        loss, sums = OPS["pseudo_huber"](x, x, None, c, kind, 0)
        assert loss == 0
        assert OPS["pseudo_huber_backward"](torch.ones(()), sums, 1, x, x, None, c, kind, 0)[0].abs().max() == 0
    empty = torch.empty(0, 5)
    assert torch.isnan(OPS["pseudo_huber"](empty, empty, None, None, 0, 0)[0])
    assert OPS["pseudo_huber"](empty, empty, None, None, 0, 1)[0] == 0
    assert OPS["pseudo_huber"](empty, empty, None, None, 0, 2)[0].shape == (0,)
    hollow = torch.empty(2, 0)
    assert OPS["pseudo_huber"](hollow, hollow, None, None, 0, 2)[0].tolist() == [0, 0]


def test_the_public_functions_run_on_the_kernels() -> None:
    F, target, x = (random((3, 5, 7), seed=k) for k in range(3))
    t = torch.tensor([0.5, 2.0, 7.0])
    expected = reference.consistency_loss(x, exact(F), t, None, target)
    with backend.use("triton"):
        F.requires_grad_()
        loss = bicm_kernels.consistency_loss(x, F, t, None, target)
        loss.backward()
    close(loss.detach(), expected.detach())
    wide = exact(F)
    (gradient,) = torch.autograd.grad(reference.consistency_loss(x, wide, t, None, target), wide)
    close(F.grad, gradient)
    kept = F.detach().requires_grad_()
    with backend.use("triton"):
        (3.0 * bicm_kernels.consistency_loss(x, kept, t, None, target, gradient="forward")).backward()
    close(kept.grad, 3.0 * gradient)


def test_wrong_arguments_raise() -> None:
    x = torch.zeros(3, 4)
    for call in (
        (x, x[:2], None, None, 0, 0),
        (x, x, None, 0.1, 2, 0),
        (x, x, None, None, 1, 0),
        (x, x, None, -1.0, 0, 0),
    ):
        with pytest.raises(RuntimeError, match="bicm_kernels: "):
            OPS["pseudo_huber"](*call)
