"""Contract 6: a wrong call raises what names the argument, what was given and what was expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import bicm_kernels as bk

X = torch.zeros(2, 3)
WIDE = torch.zeros(2, 4)
IDS = torch.arange(2)
BDIA = {"a": 1.0, "b": 0.5, "a_last": 1.0, "b_last": 0.5}
DENOISED: dict[str, Any] = {"x0_weights": [1.0], "weights": [1.0], "x0_weight": 1.0}


def ddim(z: Any = X, eps: Any = X, **changes: Any) -> Any:
    return bk.ddim_step(z, eps, **{"a": 1.0, "b": 0.5, **changes})


def affine(tensors: Any = (X,), weights: Any = (1.0,), **changes: Any) -> Any:
    return bk.affine_step(tensors, weights, **changes)


def denoised(tensors: Any = (X,), **changes: Any) -> Any:
    numbers = {**DENOISED, **changes}
    return bk.denoised_step(tensors, numbers.pop("x0_weights"), numbers.pop("weights"), **numbers)


def noisy(x: Any = X, sigma: Any = 1.0, **changes: Any) -> Any:
    return bk.add_noise(x, sigma, **{"seed": 1, **changes})


def normal(shape: Any = (2, 3), **changes: Any) -> Any:
    return bk.normal(shape, **{"seed": 1, **changes})


# What was called, the exception, and words that its message must hold.
Wrong = tuple[Callable[[], Any], type[Exception], tuple[str, ...]]

TENSORS: dict[str, Wrong] = {
    "not a tensor": (lambda: ddim(z=[1.0, 2.0]), TypeError, ("z must be a tensor", "[1.0, 2.0] (list)")),
    "array": (lambda: ddim(eps=X.numpy()), TypeError, ("eps", "tensor", "ndarray")),
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
        ("weights must hold one weight per tensor", "1.0 (float)"),
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

KEYS: dict[str, Wrong] = {
    "float seed": (
        lambda: normal(seed=1.5),
        TypeError,
        ("seed must be an int or an int64 tensor", "1.5 (float)"),
    ),
    "word": (lambda: normal(seed="1"), TypeError, ("seed must be an int", "'1' (str)")),
    "no seed": (lambda: normal(seed=None), ValueError, ("seed must be given",)),
    "large seed": (
        lambda: normal(seed=2**64),
        ValueError,
        ("seed must be in [-2**63, 2**64), got 18446744073709551616",),
    ),
    "small seed": (
        lambda: normal(seed=-(2**63) - 1),
        ValueError,
        ("seed must be in", "-9223372036854775809"),
    ),
    "int32 seeds": (
        lambda: normal(seed=IDS.int()),
        TypeError,
        ("seed must be an int or an int64 tensor", "torch.int32"),
    ),
    "seeds": (
        lambda: normal(seed=torch.arange(3)),
        ValueError,
        ("seed must be a 0-d or a (2,) tensor", "(3,)"),
    ),
    "negative step": (lambda: normal(step=-1), ValueError, ("step must be in [0, 2**32), got -1",)),
    "large step": (lambda: normal(step=2**32), ValueError, ("step must be in [0, 2**32), got 4294967296",)),
    "float step": (lambda: normal(step=0.5), TypeError, ("step must be an int", "0.5 (float)")),
    "steps": (
        lambda: normal(step=torch.arange(5)),
        ValueError,
        ("step must be a 0-d or a (2,) tensor", "(5,)"),
    ),
    "negative sample": (
        lambda: normal(sample_id=-1),
        ValueError,
        ("sample_id must be in [0, 2**32), got -1",),
    ),
    "wrap": (
        lambda: normal(sample_id=2**32 - 1),
        ValueError,
        ("sample_id + B must be at most 2**32", "4294967295 + 2"),
    ),
    "wrap beside tensors": (
        lambda: normal(seed=torch.tensor(1), sample_id=2**32 - 1),
        ValueError,
        ("sample_id + B must be at most 2**32", "4294967295 + 2"),
    ),
    "sample ids": (lambda: normal(sample_id=IDS.float()), TypeError, ("sample_id", "torch.float32")),
    "seeds and a sample": (
        lambda: normal(seed=IDS, sample_id=1),
        ValueError,
        ("sample_id must be left at 0", "seed"),
    ),
    "seeds and samples": (
        lambda: normal(seed=IDS, sample_id=IDS),
        ValueError,
        ("sample_id must be left at 0", "seed"),
    ),
    "uniform": (lambda: bk.uniform((2, 3), seed=1, step=-1), ValueError, ("step must be in", "-1")),
    "add_noise seed": (lambda: noisy(seed=2**64), ValueError, ("seed must be in", "18446744073709551616")),
    "add_noise float seed": (lambda: noisy(seed=1.0), TypeError, ("seed must be an int", "1.0 (float)")),
    "add_noise wrap": (lambda: noisy(sample_id=2**32 - 1), ValueError, ("sample_id + B", "4294967295 + 2")),
    "add_noise wrap beside tensors": (
        lambda: noisy(sigma=torch.ones(2), sample_id=2**32 - 1),
        ValueError,
        ("sample_id + B", "4294967295 + 2"),
    ),
    "affine step": (lambda: affine(noise_weight=1.0, seed=1, step=-1), ValueError, ("step must be in", "-1")),
    "affine seeds": (
        lambda: affine(noise_weight=1.0, seed=IDS, sample_id=3),
        ValueError,
        ("sample_id", "seed"),
    ),
    "affine without seed": (
        lambda: affine(noise_weight=0.5),
        ValueError,
        ("seed must be given", "noise_weight=0.5"),
    ),
    "denoised without seed": (
        lambda: denoised(noise_weight=torch.ones(2)),
        ValueError,
        ("seed must be given",),
    ),
    "denoised seed": (
        lambda: denoised(noise_weight=1.0, seed=0.5),
        TypeError,
        ("seed must be an int", "0.5"),
    ),
    "fold_in float": (lambda: bk.fold_in(1.5, 2), TypeError, ("seed must be an int", "1.5 (float)")),
    "fold_in data": (lambda: bk.fold_in(1, 2**64), ValueError, ("data must be in [-2**63, 2**64)",)),
    "fold_in data beside a tensor": (
        lambda: bk.fold_in(IDS, 2**64),
        ValueError,
        ("data must be in [-2**63, 2**64)",),
    ),
    "fold_in tensor": (lambda: bk.fold_in(X[:, 0], 1), TypeError, ("seed must be an int", "torch.float32")),
    "fold_in lengths": (
        lambda: bk.fold_in(IDS, torch.arange(3)),
        ValueError,
        ("data must be a 0-d or a (2,) tensor", "(3,)"),
    ),
    "fold_in rank": (lambda: bk.fold_in(IDS[:, None], 1), ValueError, ("seed must be a 0-d or a", "(2, 1)")),
    "no batch": (lambda: normal(()), ValueError, ("shape must have a batch dimension",)),
    "integer noise": (lambda: normal(dtype=torch.int64), TypeError, ("dtype must be float16", "torch.int64")),
    "complex noise": (
        lambda: bk.uniform((2,), seed=1, dtype=torch.complex64),
        TypeError,
        ("dtype", "torch.complex64"),
    ),
}


def check_messages(table: dict[str, Wrong]) -> None:
    """Every call of the table raises its exception with its words."""
    failures = []
    for name, (wrong, kind, words) in table.items():
        try:
            given = wrong()
        except Exception as error:
            if type(error) is kind and all(word in str(error) for word in words) and len(str(error)) < 400:
                continue
            failures.append(f"{name}: {type(error).__name__}: {error}")
        else:
            failures.append(f"{name}: returned {given}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("table", [TENSORS, NUMBERS, GUIDANCE, KEYS], ids=["tensors", "numbers", "guidance", "keys"])
def test_wrong_calls(each_backend: str, table: dict[str, Wrong]) -> None:
    check_messages(table)


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
