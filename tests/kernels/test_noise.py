"""Contract 1: noise is a pure function of (seed, sample, step, element), and good noise."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import bicm_kernels as bk
from bicm_kernels import reference
from bicm_kernels.reference.noise import minus_two_log, normals_from_bits, uniform_from_bits

VECTORS = Path(__file__).with_name("vectors") / "noise.json"
SEEDS = (0, 1, -1, 2**63, 2**64 - 2, -(2**63), 0x0123456789ABCDEF)
HALVES = (torch.float16, torch.bfloat16)
Bits = Callable[[Tensor, Tensor], None]


# --- the mapping --------------------------------------------------------------------------------------------


def key_of(case: dict[str, Any]) -> dict[str, Any]:
    names = ("seed", "step", "sample_id")
    return {name: torch.tensor(case[name]) if isinstance(case[name], list) else case[name] for name in names}


def bits(x: Tensor) -> list[int]:
    return [number & 0xFFFFFFFF for number in x.view(torch.int32).flatten().tolist()]


def test_stored_vectors(each_backend: str) -> None:
    stored = json.loads(VECTORS.read_text())
    assert stored["version"] == bk.NOISE_VERSION == 1
    assert len(stored["cases"]) >= 19
    for case in stored["cases"]:
        for draw in (bk.normal, bk.uniform):
            assert bits(draw(case["shape"], **key_of(case), dtype=torch.float32)) == case[draw.__name__], case
    long = bk.normal((3, 100_003), seed=1, dtype=torch.float32)
    assert hashlib.sha256(long.numpy().tobytes()).hexdigest() == stored["sha256"]


# Random123's known answers for philox4x32 with ten rounds: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Salmon et al. 2011 in Python's integers, written apart from the library."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [q >> 32 ^ c[1] ^ k[0], q % 2**32, p >> 32 ^ c[3] ^ k[1], p % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return tuple(c)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert philox(counter, key) == expected
    words = reference.philox4x32([torch.tensor(x) for x in counter], [torch.tensor(x) for x in key])
    assert tuple(int(word) for word in words) == expected


def test_kernels_show_the_known_answers(each_backend: str) -> None:
    zeros, ones = KNOWN_ANSWERS[0][2], KNOWN_ANSWERS[1][2]
    u = bk.uniform((1, 4), seed=0, dtype=torch.float64)[0]
    assert u.tolist() == [float(np.float32(np.float32(r) + np.float32(0.5))) * 2.0**-32 for r in zeros]
    assert bk.fold_in(-1, -1) == (ones[1] & 0x7FFFFFFF) << 32 | ones[0]
    assert bk.fold_in(torch.tensor(-1), -1).item() == bk.fold_in(-1, -1)


@pytest.mark.parametrize("seed", SEEDS)
def test_counter_key_and_box_muller(each_backend: str, seed: int) -> None:
    step, sample_id, shape = 2**32 - 3, 2**31 + 5, (2, 3, 3)
    drawn = bk.normal(shape, seed=seed, step=step, sample_id=sample_id, dtype=torch.float64).flatten(1)
    for b, e in itertools.product(range(2), range(9)):
        r = philox((e // 4, 0, sample_id + b, step), (seed % 2**32, seed % 2**64 >> 32))
        first, second = (float(np.float32(r[2 * (e % 4 // 2) + i]) + np.float32(0.5)) * 2.0**-32 for i in (0, 1))
        turn = (math.cos, math.sin)[e % 2]
        exact = math.sqrt(-2 * math.log(first)) * turn(2 * math.pi * second)
        assert drawn[b, e].item() == pytest.approx(exact, rel=1e-6, abs=1e-6)


def test_ends_of_the_range() -> None:
    lowest, highest = torch.tensor([0]), torch.tensor([2**32 - 1])
    assert uniform_from_bits(lowest).item() == 2.0**-33
    assert uniform_from_bits(highest).item() == 1.0
    assert minus_two_log(torch.ones(1)).item() == 0.0
    tail, zero, *_ = normals_from_bits([lowest, highest, highest, lowest])
    assert 6.76 < tail.item() <= 6.77
    assert normals_from_bits([highest, lowest, lowest, lowest])[0].item() == 0.0
    assert abs(zero.item()) < 1e-5


# --- quality ------------------------------------------------------------------------------------------------

DRAWS = 10_000_000


@pytest.fixture(scope="module")
def normals() -> Tensor:
    return bk.normal((10, DRAWS // 10), seed=20_240_229, dtype=torch.float64).flatten()


@pytest.fixture(scope="module")
def uniforms() -> Tensor:
    return bk.uniform((10, DRAWS // 10), seed=20_240_229, dtype=torch.float64).flatten()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "law"), [("normals", "norm"), ("uniforms", "uniform")])
def test_kolmogorov_smirnov(name: str, law: str, request: pytest.FixtureRequest) -> None:
    from scipy import stats

    result = stats.kstest(request.getfixturevalue(name).numpy(), law)
    assert result.statistic < 1.63 / math.sqrt(DRAWS)  # the 1 % point
    assert result.pvalue > 0.01


def test_normal_moments(normals: Tensor) -> None:
    expected = {1: 0.0, 2: 1.0, 3: 0.0, 4: 3.0, 5: 0.0, 6: 15.0}
    spread = {1: 1.0, 2: 2.0, 3: 15.0, 4: 96.0, 5: 945.0, 6: 10170.0}  # variances of n^k
    power = torch.ones_like(normals)
    for k, mean in expected.items():
        power *= normals
        assert abs(power.mean().item() - mean) < 4 * math.sqrt(spread[k] / DRAWS), k


def test_uniform_moments_and_range(uniforms: Tensor) -> None:
    for k in range(1, 7):
        spread = math.sqrt((1 / (2 * k + 1) - 1 / (k + 1) ** 2) / DRAWS)
        assert abs(uniforms.pow(k).mean().item() - 1 / (k + 1)) < 4 * spread
    assert 0 < uniforms.min().item() < 1e-6
    assert 1 - 1e-6 < uniforms.max().item() <= 1


def test_tails(normals: Tensor) -> None:
    assert 5.0 < normals.abs().max().item() <= 6.77
    for level in (3.0, 4.0, 5.0):
        for sign in (1, -1):
            expected = DRAWS * math.erfc(level / math.sqrt(2)) / 2
            assert abs((sign * normals > level).sum().item() - expected) < 4 * math.sqrt(expected)


D = 65536
STREAMS: dict[str, Callable[[int], Tensor]] = {
    "samples": lambda i: bk.normal((1, D), seed=3, sample_id=i),
    "steps": lambda i: bk.normal((1, D), seed=3, step=i),
    "seeds": lambda i: bk.normal((1, D), seed=i),
    "high bits of seeds": lambda i: bk.normal((1, D), seed=i << 32),
    "single bits of seeds": lambda i: bk.normal((1, D), seed=1 << i),
    "fold_in": lambda i: bk.normal((1, D), seed=bk.fold_in(3, i)),
    "seeds against samples and steps": lambda i: bk.normal(
        (1, D), seed=i if i % 3 == 0 else 0, sample_id=i if i % 3 == 1 else 0, step=i if i % 3 == 2 else 0
    ),
    "uniform": lambda i: bk.uniform((1, D), seed=3, sample_id=i) - 0.5,
}


@pytest.mark.parametrize("name", STREAMS)
def test_streams_are_independent(name: str) -> None:
    streams = torch.cat([STREAMS[name](i) for i in range(48)]).double()
    for values in (streams, streams**2):
        correlation = torch.corrcoef(values) - torch.eye(48, dtype=torch.float64)
        assert correlation.abs().max().item() < 5.5 / math.sqrt(D)


@pytest.mark.parametrize("draw", ["normal", "uniform"])
def test_elements_of_a_sample_are_independent(draw: str) -> None:
    x = getattr(bk, draw)((1, 4 * 262_144), seed=17, dtype=torch.float64)[0]
    for values in (x, x**2):
        lanes = torch.corrcoef(values.view(-1, 4).T) - torch.eye(4, dtype=torch.float64)
        assert lanes.abs().max().item() < 5 / math.sqrt(262_144)
        centred = values - values.mean()
        for lag in (1, 2, 3, 4, 5, 8, 16, 32, 64, 1024):
            auto = (centred[lag:] * centred[:-lag]).mean() / centred.square().mean()
            assert abs(auto.item()) < 5 / math.sqrt(x.numel()), lag


def test_neighbouring_uniforms_fill_the_square() -> None:
    u = bk.uniform((1, 2_000_000), seed=23, dtype=torch.float64)[0]
    cells = ((u * 16).long().clamp(max=15)).view(-1, 2)
    counts = torch.bincount(cells[:, 0] * 16 + cells[:, 1], minlength=256).double()
    expected = cells.shape[0] / 256
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi_square - 255) < 4 * math.sqrt(2 * 255)


# --- one noise, however it is asked for ---------------------------------------------------------------------


@given(
    cuts=st.lists(st.integers(0, 9), max_size=3),
    inner=st.lists(st.integers(1, 9), max_size=3),
    sample_id=st.sampled_from([0, 1, 2**31, 2**32 - 10]),
    dtype=st.sampled_from([torch.float32, torch.float64, *HALVES]),
)
def test_any_split_of_a_batch(
    same_bits: Bits, cuts: list[int], inner: list[int], sample_id: int, dtype: torch.dtype
) -> None:
    key = {"seed": -5, "step": 9}
    bounds = [0, *sorted(cuts), 9]
    x = torch.linspace(-2, 3, 9 * math.prod(inner), dtype=torch.float64).to(dtype).reshape(9, *inner)
    sigma = torch.linspace(0, 1, 9)
    noisy = bk.add_noise(x, sigma, sample_id=sample_id, **key)
    for draw in (bk.normal, bk.uniform):
        whole = draw((9, *inner), sample_id=sample_id, dtype=dtype, **key)
        for begin, end in itertools.pairwise(bounds):
            size = (end - begin, *inner)
            same_bits(draw(size, sample_id=sample_id + begin, dtype=dtype, **key), whole[begin:end])
            ids = torch.arange(sample_id + begin, sample_id + end)
            same_bits(draw(size, sample_id=ids, dtype=dtype, **key), whole[begin:end])
    for begin, end in itertools.pairwise(bounds):
        part = bk.add_noise(x[begin:end], sigma[begin:end], sample_id=sample_id + begin, **key)
        same_bits(part, noisy[begin:end])


@pytest.mark.parametrize("shape", [(1,), (5, 1), (3, 63), (2, 1023), (2, 1025), (700, 64), (3, 50_001), (0, 4), (4, 0)])
def test_threads_and_backends_agree(shape: tuple[int, ...], same_bits: Bits, threads: Callable[[int], Any]) -> None:
    for draw, plain in ((bk.normal, reference.normal), (bk.uniform, reference.uniform)):
        expected = plain(shape, seed=4, step=2, sample_id=6)
        for count in (1, 2, 5):
            with threads(count):
                same_bits(draw(shape, seed=4, step=2, sample_id=6), expected)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float64])
def test_other_dtypes_are_the_float32_number_rounded_once(
    each_backend: str, same_bits: Bits, dtype: torch.dtype
) -> None:
    for draw in (bk.normal, bk.uniform):
        same_bits(draw((3, 1001), seed=8, dtype=dtype), draw((3, 1001), seed=8, dtype=torch.float32).to(dtype))


def test_default_dtype_is_torchs() -> None:
    assert bk.normal((1, 2), seed=0).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert bk.normal((1, 2), seed=0).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_noise_follows_the_logical_element(each_backend: str, same_bits: Bits, dtype: torch.dtype) -> None:
    base = torch.linspace(-1, 1, 6 * 8 * 10 * 12).to(dtype).reshape(6, 8, 10, 12)
    layouts = {
        "channels_last": base.to(memory_format=torch.channels_last),
        "transposed": base.transpose(2, 3).contiguous().transpose(2, 3),
        "samples last": base.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        "slice": torch.stack([base, base], dim=-1)[..., 1],
    }
    expected = bk.add_noise(base, 0.7, scale=0.3, seed=2, sample_id=5)
    n = bk.normal(base.shape, seed=2, sample_id=5)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    number = lambda value: torch.tensor(value, dtype=compute)  # noqa: E731
    same_bits(expected, (number(0.3) * base.to(compute) + number(0.7) * n.to(compute)).to(dtype))
    for name, x in layouts.items():
        noisy = bk.add_noise(x, 0.7, scale=0.3, seed=2, sample_id=5)
        same_bits(noisy, expected)
        assert noisy.stride() == torch.empty_like(x).stride(), name
        written = torch.empty_like(torch.stack([x, x]))[1] if name == "slice" else torch.empty_like(x)
        bk.affine_step([x], [0.3], noise_weight=0.7, seed=2, sample_id=5, out=written)
        same_bits(written, expected)


def test_forms_of_a_key(each_backend: str, same_bits: Bits) -> None:
    shape = (4, 3, 5)
    for draw in (bk.normal, bk.uniform):
        plain = draw(shape, seed=-7, step=3, sample_id=2)
        same_bits(draw(shape, seed=2**64 - 7, step=3, sample_id=2), plain)
        tensors = {"seed": torch.tensor(-7), "step": torch.tensor(3), "sample_id": torch.tensor(2)}
        same_bits(draw(shape, **tensors), plain)
        same_bits(draw(shape, seed=-7, step=torch.full((4,), 3), sample_id=torch.arange(2, 6)), plain)
        ids = torch.tensor([2, 99, 3, 99])[::2]
        same_bits(draw((2, 3, 5), seed=-7, step=3, sample_id=ids), plain[:2])
        shuffled = torch.tensor([4, 2, 5, 3])
        same_bits(draw(shape, seed=-7, step=3, sample_id=shuffled), plain[shuffled - 2])


def test_seed_and_step_per_sample(each_backend: str, same_bits: Bits) -> None:
    seeds, steps = torch.tensor([5, -6, 2**62]), torch.tensor([0, 4, 2**32 - 1])
    x, sigma = torch.linspace(-1, 1, 21).reshape(3, 7), torch.tensor([0.5, 1.0, 2.0])
    keys = list(zip(seeds.tolist(), steps.tolist(), strict=True))
    for draw in (bk.normal, bk.uniform):
        alone = [draw((1, 7), seed=seed, step=step) for seed, step in keys]
        same_bits(draw((3, 7), seed=seeds, step=steps), torch.cat(alone))
    noisy = [bk.add_noise(x[i : i + 1], sigma[i].item(), seed=s, step=t) for i, (s, t) in enumerate(keys)]
    same_bits(bk.add_noise(x, sigma, seed=seeds, step=steps), torch.cat(noisy))


@pytest.mark.parametrize("value", [-0.0, 0.0, math.inf, -math.inf, math.nan, 1e-45, 3.0])
def test_noise_of_weight_zero_is_not_added(each_backend: str, same_bits: Bits, value: float) -> None:
    x = torch.full((3, 200), value)
    weights = (0.0, -0.0, torch.tensor(0.0), torch.zeros(3), torch.zeros(3, requires_grad=True))
    for weight in weights:
        same_bits(bk.add_noise(x, weight, seed=1), x)
        same_bits(bk.affine_step([x], [1.0], noise_weight=weight, seed=1), x)
        same_bits(bk.denoised_step([x], [1.0], [1.0], x0_weight=0.0, noise_weight=weight, seed=1)[0], x + 0.0 * x)
    some = bk.add_noise(x, torch.tensor([0.0, 1.0, 0.0]), seed=1)
    same_bits(some[::2], x[::2])
    same_bits(some[1:2], x[1:2] + bk.normal((1, 200), seed=1, sample_id=1))


# --- fold_in ------------------------------------------------------------------------------------------------


def test_fold_in_is_one_function_of_ints_and_tensors(each_backend: str) -> None:
    numbers = [0, 1, 2, -1, 2**31, 2**32, 2**62, -(2**63), 2**63 - 1]
    pairs = list(itertools.product(numbers, numbers))
    expected = [bk.fold_in(seed, data) for seed, data in pairs]
    assert all(0 <= seed < 2**63 for seed in expected)
    assert len(set(expected)) == len(pairs)
    seeds, data = (torch.tensor(column) for column in zip(*pairs, strict=True))
    assert bk.fold_in(seeds, data).tolist() == expected
    assert bk.fold_in(seeds.view(-1, 1).expand(-1, 2)[:, 0], data).tolist() == expected
    for seed in numbers:
        row = [bk.fold_in(seed, datum) for datum in numbers]
        assert bk.fold_in(seed, torch.tensor(numbers)).tolist() == row
        assert bk.fold_in(torch.tensor(seed), torch.tensor(numbers)).tolist() == row
        assert [bk.fold_in(torch.tensor(seed), datum).item() for datum in numbers] == row
    assert bk.fold_in(2**64 - 1, 5) == bk.fold_in(-1, 5)
    assert bk.fold_in(torch.tensor([1, 2]), 2**64 - 1).tolist() == [bk.fold_in(1, -1), bk.fold_in(2, -1)]


def test_fold_in_does_not_collide() -> None:
    data = torch.arange(-100_000, 100_000)
    folded = torch.cat([bk.fold_in(seed, data) for seed in (0, 1, 2**40)])
    assert folded.min() >= 0
    assert folded.unique().numel() == folded.numel()
    ones = torch.stack([(folded >> bit & 1).double().mean() for bit in range(63)])
    assert (ones - 0.5).abs().max() < 5 * 0.5 / math.sqrt(folded.numel())


@pytest.mark.parametrize("kind", [int, np.int64, np.uint32])
def test_ids_past_the_last_one_are_named(each_backend: str, kind: type) -> None:
    with pytest.raises(ValueError, match=r"sample_id \+ B must be at most 2\*\*32, got 4294967295 \+ 2"):
        bk.normal((2, 3), seed=1, sample_id=kind(2**32 - 1))
