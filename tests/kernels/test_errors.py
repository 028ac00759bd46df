"""Contract 6: a wrong call raises what names the argument, what was given and what was expected."""

from __future__ import annotations

import warnings
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import bicm_kernels as bk
from bicm_kernels import reference
from bicm_kernels.ops import arguments
from tests.support.wrong_calls import BDIA, IDS, WIDE, Wrong, X, affine, check_messages, ddim, denoised, noisy, normal

TENSORS: dict[str, Wrong] = {
    "not a tensor": (lambda: ddim(z=[1.0, 2.0]), TypeError, ("z must be a tensor", "[1.0, 2.0] (list)")),
    "array": (lambda: ddim(eps=X.numpy()), TypeError, ("eps", "tensor", "a ndarray of shape (2, 3)")),
    "list of tensors": (lambda: ddim(z=[X, X]), TypeError, ("z must be a tensor, got a list of 2 (Tensor)",)),
    "object of tensors": (lambda: ddim(z=SimpleNamespace(sample=X)), TypeError, ("got a SimpleNamespace",)),
    "nothing": (lambda: ddim(eps=None), TypeError, ("eps", "None")),
    "integer state": (
        lambda: ddim(z=X.int()),
        TypeError,
        ("z must be float16, bfloat16, float32 or float64", "torch.int32"),
    ),
    "complex prediction": (
        lambda: ddim(eps=X.to(torch.complex64)),
        TypeError,
        ("eps must be", "torch.complex64"),
    ),
    "0-d": (lambda: ddim(z=torch.tensor(1.0)), ValueError, ("z must have a batch dimension", "0-d")),
    "shape": (lambda: ddim(eps=WIDE), ValueError, ("eps must have the shape of z, (2, 3), got (2, 4)",)),
    "broadcastable": (lambda: ddim(eps=X[:1]), ValueError, ("eps", "(2, 3), got (1, 3)")),
    "half of a pair": (
        lambda: ddim(eps=(X, WIDE), guidance_scale=2.0),
        ValueError,
        ("eps[1] must have the shape of z, (2, 3), got (2, 4)",),
    ),
    "stacked predictions": (
        lambda: ddim(eps=torch.cat([X, X])),
        ValueError,
        ("eps must have the shape of z, (2, 3), got (4, 3)", "eps.chunk(2)", "guidance_scale"),
    ),
    "stacked predictions of an affine step": (
        lambda: affine([X, torch.cat([X, X])], [1.0, 1.0]),
        ValueError,
        ("tensors[1] must have the shape of tensors[0]", "tensors[1].chunk(2)"),
    ),
    "rank": (lambda: ddim(eps=X[..., None]), ValueError, ("eps", "(2, 3), got (2, 3, 1)")),
    "device": (
        lambda: ddim(eps=X.to("meta")),
        ValueError,
        ("eps must be on the device of z, cpu, got meta",),
    ),
    "bdia shape": (
        lambda: bk.bdia_step(X, WIDE, X, **BDIA),
        ValueError,
        ("z must have the shape of z_last",),
    ),
    "bdia device": (lambda: bk.bdia_step(X, X, X.to("meta"), **BDIA), ValueError, ("eps", "z_last", "meta")),
    "inverse shape": (
        lambda: bk.bdia_inverse_step(X, X, WIDE, **BDIA),
        ValueError,
        ("eps must have the shape of z_next",),
    ),
    "inverse dtype": (
        lambda: bk.bdia_inverse_step(X, X.bool(), X, **BDIA),
        TypeError,
        ("z must be", "torch.bool"),
    ),
    "affine shape": (
        lambda: affine([X, WIDE], [1.0, 1.0]),
        ValueError,
        ("tensors[1] must have the shape of tensors[0], (2, 3), got (2, 4)",),
    ),
    "no tensors": (lambda: affine([], []), ValueError, ("tensors must hold 1 to 5 tensors, got 0",)),
    "six tensors": (
        lambda: affine([X] * 6, [1.0] * 6),
        ValueError,
        ("tensors must hold 1 to 5 tensors, got 6",),
    ),
    "denoised dtype": (lambda: denoised([X.long()]), TypeError, ("tensors[0] must be", "torch.int64")),
    "add_noise": (lambda: noisy(x=1.0), TypeError, ("x must be a tensor", "1.0 (float)")),
    "add_noise dtype": (lambda: noisy(x=X.int()), TypeError, ("x must be", "torch.int32")),
    "add_noise 0-d": (lambda: noisy(x=torch.tensor(1.0)), ValueError, ("x must have a batch dimension",)),
}

NUMBERS: dict[str, Wrong] = {
    "word": (
        lambda: ddim(a="one"),
        TypeError,
        ("a must be a float, a 0-d tensor or a (B,) tensor", "'one' (str)"),
    ),
    "none": (lambda: ddim(b=None), TypeError, ("b must be a float", "None")),
    "complex": (lambda: ddim(b=1j), TypeError, ("b must be a float", "1j (complex)")),
    "integer tensor": (
        lambda: ddim(a=torch.tensor(1)),
        TypeError,
        ("a must be a floating tensor", "torch.int64"),
    ),
    "length": (lambda: ddim(a=torch.ones(3)), ValueError, ("a must be a 0-d or a (2,) tensor", "(3,)")),
    "column": (lambda: ddim(a=torch.ones(2, 1)), ValueError, ("a must be a 0-d or a (2,) tensor", "(2, 1)")),
    "gamma": (lambda: bk.bdia_step(X, X, X, **BDIA, gamma=torch.ones(1, 1)), ValueError, ("gamma", "(1, 1)")),
    "a_last": (
        lambda: bk.bdia_inverse_step(X, X, X, **{**BDIA, "a_last": [1.0]}),
        TypeError,
        ("a_last", "[1.0] (list)"),
    ),
    "number on meta": (
        lambda: ddim(a=torch.ones(2, device="meta")),
        ValueError,
        ("a must be on cpu", "meta"),
    ),
    "few weights": (
        lambda: affine([X, X], [1.0]),
        ValueError,
        ("weights must be as many as the tensors, 2, got 1",),
    ),
    "many weights": (lambda: affine([X], [1.0, 2.0]), ValueError, ("weights", "1, got 2")),
    "weights not a list": (
        lambda: affine([X], 1.0),
        TypeError,
        ("weights must hold one weight per tensor", "1.0 (float); write [1.0]"),
    ),
    "weight": (lambda: affine([X, X], [1.0, "2"]), TypeError, ("weights[1] must be a float", "'2' (str)")),
    "noise_weight": (
        lambda: affine(noise_weight=None, seed=1),
        TypeError,
        ("noise_weight must be a float", "None"),
    ),
    "noise_weight length": (
        lambda: affine(noise_weight=torch.ones(5), seed=1),
        ValueError,
        ("noise_weight", "(5,)"),
    ),
    "x0_weights": (
        lambda: denoised(x0_weights=[1.0, 1.0]),
        ValueError,
        ("x0_weights must be as many", "1, got 2"),
    ),
    "x0_weights not a list": (lambda: denoised(x0_weights=1.0), TypeError, ("x0_weights", "1.0 (float)")),
    "x0_weight": (lambda: denoised(x0_weight=None), TypeError, ("x0_weight must be a float", "None")),
    "clip": (lambda: denoised(clip="1"), TypeError, ("clip must be a float", "'1' (str)")),
    "next_scale": (lambda: denoised(next_scale=torch.ones(3)), ValueError, ("next_scale", "(3,)")),
    "sigma": (
        lambda: noisy(sigma=torch.ones(3)),
        ValueError,
        ("sigma must be a 0-d or a (2,) tensor", "(3,)"),
    ),
    "sigma on meta": (
        lambda: noisy(X.clone().requires_grad_(), torch.ones(2, device="meta")),
        ValueError,
        ("sigma must be on cpu", "meta"),
    ),
    "denoised weights": (lambda: denoised([X, X]), ValueError, ("weights must be as many", "2, got 1")),
    "sigma dtype": (lambda: noisy(sigma=IDS), TypeError, ("sigma must be a floating tensor", "torch.int64")),
    "scale": (lambda: noisy(scale="1"), TypeError, ("scale must be a float", "'1' (str)")),
}

GUIDANCE: dict[str, Wrong] = {
    "pair without a scale": (
        lambda: ddim(eps=(X, X)),
        ValueError,
        ("guidance_scale", "eps_uncond, eps_cond", "None"),
    ),
    "scale without a pair": (lambda: ddim(guidance_scale=2.0), ValueError, ("guidance_scale", "eps", "2.0")),
    "three": (
        lambda: ddim(eps=(X, X, X), guidance_scale=2.0),
        ValueError,
        ("guidance_scale", "eps_uncond, eps_cond"),
    ),
    "pair of states": (
        lambda: ddim(z=(X, X), guidance_scale=2.0),
        TypeError,
        ("z must be a tensor", "tuple"),
    ),
    "pair first": (
        lambda: affine([(X, X), X], [1.0, 1.0], guidance_scale=2.0),
        TypeError,
        ("tensors[0]", "tuple"),
    ),
    "shapes": (lambda: ddim(eps=(X, WIDE), guidance_scale=2.0), ValueError, ("eps", "(2, 3), got (2, 4)")),
    "scale length": (
        lambda: ddim(eps=(X, X), guidance_scale=torch.ones(3)),
        ValueError,
        ("guidance_scale", "(3,)"),
    ),
    "scale type": (
        lambda: ddim(eps=(X, X), guidance_scale="2"),
        TypeError,
        ("guidance_scale must be a float", "'2'"),
    ),
}


Q = torch.zeros(2, 3, dtype=torch.int64)
ONE_TENSOR = "tensors: expected a sequence of tensors, got one tensor; write [x]"
STACK, STACKED_STATES = torch.zeros(2, 2, 3), torch.zeros(2, 2, 3, dtype=torch.int64)


def exact(tensors: Any = (X,), inverse: bool = False, **changes: Any) -> Any:
    op = bk.exact_affine_inverse_step if inverse else bk.exact_affine_step
    return op(Q, tensors, [1.0] * len(tensors), Q, **changes)


def bdia_exact(**changes: Any) -> Any:
    return bk.bdia_exact_step(Q, Q, X, Q, **{**BDIA, **changes})


SEQUENCES: dict[str, Wrong] = {
    "affine": (lambda: affine(X, [1.0, 1.0]), TypeError, (ONE_TENSOR,)),
    "affine, as many samples as weights": (lambda: affine(STACK, [1.0, 1.0]), TypeError, (ONE_TENSOR,)),
    "affine, guided": (lambda: affine(STACK, [1.0], guidance_scale=2.0), TypeError, (ONE_TENSOR,)),
    "affine, tensor weights": (lambda: affine(STACK, torch.ones(2)), TypeError, (ONE_TENSOR,)),
    "affine, out": (lambda: affine(STACK, [1.0, 1.0], out=X.clone()), TypeError, (ONE_TENSOR,)),
    "affine, noise": (lambda: affine(STACK, [1.0, 1.0], noise_weight=1.0, seed=1), TypeError, (ONE_TENSOR,)),
    "affine, grad": (lambda: affine(STACK.clone().requires_grad_(), [1.0, 1.0]), TypeError, (ONE_TENSOR,)),
    "affine, a parameter": (lambda: affine(torch.nn.Parameter(STACK), [1.0, 1.0]), TypeError, (ONE_TENSOR,)),
    "affine, a number": (
        lambda: affine(1.0, [1.0]),
        TypeError,
        ("tensors: expected a sequence of tensors", "1.0 (float)"),
    ),
    "denoised": (
        lambda: denoised(STACK, x0_weights=[1.0, 1.0], weights=[1.0, 1.0]),
        TypeError,
        (ONE_TENSOR,),
    ),
    "denoised, out": (
        lambda: denoised(out=STACK),
        TypeError,
        ("out: expected a sequence of tensors, got one tensor; write (out, x0)",),
    ),
    "denoised, three outs": (
        lambda: denoised(next_scale=1.0, out=torch.zeros(3, 2, 3)),
        TypeError,
        ("out: expected a sequence of tensors, got one tensor; write (out, x0, next)",),
    ),
    "exact": (lambda: exact(STACK), TypeError, (ONE_TENSOR,)),
    "exact, states": (lambda: exact(STACKED_STATES), TypeError, (ONE_TENSOR,)),
    "exact, inverse": (lambda: exact(STACK, inverse=True), TypeError, (ONE_TENSOR,)),
    "exact, out": (
        lambda: exact(ratio=(1, 2), out=STACKED_STATES),
        TypeError,
        ("out: expected a sequence of tensors, got one tensor; write (q, info)",),
    ),
    "exact, fraction": (
        lambda: exact(ratio=Fraction(9, 10)),
        TypeError,
        ("ratio must be a pair (n, m), the ratio n/m, got Fraction(9, 10) (Fraction); pass (9, 10)",),
    ),
    "exact, ratio": (lambda: exact(ratio=torch.tensor([9, 10])), TypeError, ("ratio must be a pair (n, m)",)),
    "bdia, gamma": (lambda: bdia_exact(gamma=torch.tensor([9, 10])), TypeError, ("gamma must be a pair (n, m)",)),
    "bdia, out": (lambda: bdia_exact(out=STACKED_STATES), TypeError, ("out: expected a sequence of tensors",)),
}


def test_a_tensor_is_no_sequence_for_the_reference_either() -> None:
    one = [1.0, 1.0]
    for call in (
        lambda: reference.affine_step(STACK, one),  # type: ignore[arg-type]
        lambda: reference.denoised_step(STACK, one, one, x0_weight=1.0),  # type: ignore[arg-type]
        lambda: reference.exact_affine_step(Q, STACK, one, Q),  # type: ignore[arg-type]
        lambda: reference.exact_affine_inverse_step(Q, STACK, one, Q),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match=r"tensors: expected a sequence of tensors, got one tensor; write \[x\]"):
            call()


def test_weights_may_be_one_tensor(each_backend: str) -> None:
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    weights = torch.tensor([[0.5, 2.0], [0.25, 1.0]])
    assert torch.equal(affine([x, y], weights[:, 0]), affine([x, y], [0.5, 0.25]))
    assert torch.equal(affine([x, y], weights), affine([x, y], [weights[0], weights[1]]))


TABLES = {"tensors": TENSORS, "numbers": NUMBERS, "guidance": GUIDANCE, "sequences": SEQUENCES}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_wrong_calls(each_backend: str, table: dict[str, Wrong]) -> None:
    check_messages(table)


WRAPPED: dict[str, Wrong] = {
    "tuple": (lambda: ddim(z=(X,)), TypeError, ("z must be a tensor, got a tuple of 1", "; pass its first element")),
    "tuple for a pair": (
        lambda: ddim(eps=(X,)),
        TypeError,
        ("eps must be a tensor, or a pair (eps_uncond, eps_cond) with guidance_scale", "; pass its first element"),
    ),
    "output": (lambda: bk.denoise(X, SimpleNamespace(sample=X), 1.0), TypeError, ("F must", "; pass its .sample")),
    "other output": (
        lambda: bk.consistency_loss(X, SimpleNamespace(n=1, logits=X), 1.0, target=X),
        TypeError,
        ("F must be a tensor, got a SimpleNamespace; pass its .logits",),
    ),
    "dict": (lambda: bk.denoise(X, {"n": 1, "out": X}, 1.0), TypeError, ("F must", "got a dict; pass its ['out']")),
    "array": (lambda: bk.pseudo_huber(X, X.numpy()), TypeError, ("target must be a tensor", "; torch.from_numpy")),
    "renoise": (lambda: bk.renoise(X, (X,), 1.0, 0.5, 0.1, seed=0), TypeError, ("F must", "; pass its first element")),
    "pair first": (
        lambda: affine([(X, X), X], [1.0, 1.0], guidance_scale=2.0),
        TypeError,
        ("tensors[0] must be a tensor, got a tuple of 2 (Tensor); a pair (eps_uncond, eps_cond) goes last",),
    ),
    "pair first without a scale": (lambda: affine([(X, X), X], [1.0, 1.0]), TypeError, ("goes last",)),
    "denoised, pair first": (
        lambda: denoised([(X, X), X], x0_weights=[1.0, 1.0], weights=[1.0, 1.0], guidance_scale=2.0),
        TypeError,
        ("tensors[0]", "goes last"),
    ),
}


def test_where_the_tensor_lies_is_told(each_backend: str) -> None:
    check_messages(WRAPPED)


@pytest.mark.parametrize("step", [affine, denoised])
def test_a_seed_without_a_weight_is_told_of_once(step: Any, monkeypatch: pytest.MonkeyPatch, each_backend: str) -> None:
    monkeypatch.setattr(arguments, "_unweighted", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(noise_weight=0.0, seed=1)
        step(noise_weight=torch.zeros(2), seed=1)
        step()
        assert not caught
        step(seed=1)
        step(seed=2)
    (told,) = caught
    assert f"{step.__name__}" in str(told.message) and "pass noise_weight=" in str(told.message)


def test_a_fraction_may_stand_for_a_number(each_backend: str) -> None:
    half, tracked = Fraction(1, 2), X.clone().requires_grad_()
    for z in (X + 1, tracked + 1):
        assert torch.equal(affine([z, X], [half, 1]), affine([z, X], [0.5, 1.0]))
        assert torch.equal(ddim(z, a=half), ddim(z, a=0.5))
        assert torch.equal(bk.denoise(z, z, half, sigma_data=half), bk.denoise(z, z, 0.5))
        assert torch.equal(noisy(z, half), noisy(z, 0.5))
        assert torch.equal(bk.pseudo_huber(z, X, c=half, weight=half), bk.pseudo_huber(z, X, c=0.5, weight=0.5))


def test_errors_do_not_show_their_explanation() -> None:
    with pytest.raises(ValueError, match="eps must have the shape") as raised:
        ddim(eps=WIDE)
    assert raised.value.__suppress_context__


@pytest.mark.parametrize("right", [1, True, 2.0, torch.tensor(1.0), torch.ones(2).half()])
def test_what_may_stand_for_a_number(each_backend: str, right: Any) -> None:
    import numpy as np

    assert ddim(a=right).shape == X.shape
    for number in (np.float32(1.5), np.float64(1.5), np.int64(2)):
        assert torch.equal(ddim(X + 1, a=number, b=0.0), (X + 1) * float(number))
    for seed in (3, 2**64 - 3):
        assert torch.equal(normal(seed=np.uint64(seed)), normal(seed=seed))
        assert torch.equal(noisy(seed=np.uint64(seed)), noisy(seed=seed))
        assert bk.fold_in(np.uint64(seed), IDS).equal(bk.fold_in(seed, IDS))
