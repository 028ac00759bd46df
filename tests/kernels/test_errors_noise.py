"""Contract 6 for seeds, steps, samples, shapes and dtypes of noise."""

from __future__ import annotations

import torch

import bicm_kernels as bk
from tests.support.wrong_calls import IDS, Wrong, X, affine, check_messages, denoised, noisy, normal

KEYS: dict[str, Wrong] = {
    "float seed": (
        lambda: normal(seed=1.5),
        TypeError,
        ("seed must be an int or an int64 tensor", "1.5 (float)"),
    ),
    "generator": (
        lambda: normal(seed=torch.Generator().manual_seed(3)),
        TypeError,
        ("seed must be an int or an int64 tensor", "got a torch.Generator; pass its initial_seed()"),
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
        ("seed must be an int or an int64 tensor", "torch.int32; seed.long() makes one"),
    ),
    "seeds": (
        lambda: normal(seed=torch.arange(3)),
        ValueError,
        ("seed must be a 0-d or a (2,) tensor", "(3,)"),
    ),
    "shape": (
        lambda: bk.normal(4.0, seed=0),
        TypeError,
        ("shape must be a sequence of integers (B, ...), got 4.0 (float)",),
    ),
    "shape of words": (lambda: bk.uniform((2, "3"), seed=0), TypeError, ("shape must be", "(2, '3')")),
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
    "int32 sample ids": (lambda: normal(sample_id=IDS.int()), TypeError, ("torch.int32; sample_id.long() makes one",)),
    "array of sample ids": (
        lambda: affine(noise_weight=1.0, seed=1, sample_id=IDS.numpy()),
        TypeError,
        ("sample_id must be", "a ndarray", "; torch.as_tensor(sample_id, dtype=torch.int64) makes one"),
    ),
    "list of seeds": (lambda: noisy(seed=[0, 1]), TypeError, ("; torch.as_tensor(seed, dtype=torch.int64) makes one",)),
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


def test_wrong_calls(each_backend: str) -> None:
    check_messages(KEYS)
