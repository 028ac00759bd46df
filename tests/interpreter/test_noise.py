"""Keyed noise from the Triton kernels: Random123's vectors, and the reference bit for bit."""

import pytest
import torch
from bits import assert_same

import bicm_kernels as bk
from bicm_kernels import backend, reference

triton = pytest.importorskip("triton")

from bicm_kernels.triton_kernels import OPS, operands  # noqa: E402
from bicm_kernels.triton_kernels.philox import philox  # noqa: E402

tl = triton.language
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (5,), (2, 3, 5, 7), (2, 1025), (9, 2), (1, 2048)]


@triton.jit
def four_words(out, x0, x1, x2, x3, k0, k1):
    r0, r1, r2, r3 = philox(
        tl.load(x0).to(tl.uint32),
        tl.load(x1).to(tl.uint32),
        tl.load(x2).to(tl.uint32),
        tl.load(x3).to(tl.uint32),
        tl.load(k0).to(tl.uint32),
        tl.load(k1).to(tl.uint32),
    )
    tl.store(out, r0.to(tl.int64))
    tl.store(out + 1, r1.to(tl.int64))
    tl.store(out + 2, r2.to(tl.int64))
    tl.store(out + 3, r3.to(tl.int64))


@pytest.mark.parametrize(
    ("counter_and_key", "expected"),
    [
        ([0] * 6, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 6, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_random123s_known_answers(counter_and_key: list[int], expected: list[int]) -> None:
    out = torch.empty(4, dtype=torch.int64)
    four_words[(1,)](out, *(torch.tensor([word]) for word in counter_and_key))
    assert out.tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["normal", "uniform"])
def test_noise_is_the_references(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    out = torch.empty(shape, dtype=dtype)
    OPS[name](out, 11, 3, 5)
    expected = getattr(reference, name)(shape, seed=11, step=3, sample_id=5, dtype=dtype)
    assert_same(out, expected.contiguous())


KEYS = {
    "negative seed": (-7, 0, 0),
    "large seed": (2**63 - 1, 2**32 - 1, 2**32 - 3),
    "seed of 32 bits": (3_000_000_000, 2_999_999_999, 3_000_000_001),
    "0-d tensors": (torch.tensor(-9), torch.tensor(4), torch.tensor(2**31)),
    "seeds per sample": (torch.tensor([3, -4, 2**40]), 7, 0),
    "ids of the samples": (5, 7, torch.tensor([2**32 - 1, 0, 9])),
    "everything per sample": (5, torch.tensor([1, 2, 2**31]), torch.tensor([9, 9, 9])),
    "every other id": (5, 0, torch.arange(6)[::2]),
    "one id for all": (5, 0, torch.tensor([8]).expand(3)),
}


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_every_kind_of_key(key: tuple[int | torch.Tensor, ...]) -> None:
    seed, step, sample_id = key
    out = torch.empty(3, 2, 5)
    OPS["normal.tensor"](out, seed, step, sample_id)
    expected = reference.normal((3, 2, 5), seed=seed, step=step, sample_id=sample_id)
    assert_same(out, expected.contiguous())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_noise_follows_the_logical_index_in_any_layout(dtype: torch.dtype) -> None:
    expected = reference.normal((2, 3, 4, 5), seed=1, dtype=dtype)
    layouts = [
        torch.empty(2, 3, 4, 5, dtype=dtype).to(memory_format=torch.channels_last),
        torch.empty(5, 4, 3, 2, dtype=dtype).permute(3, 2, 1, 0),
        torch.empty(2, 6, 4, 5, dtype=dtype)[:, ::2],
        torch.empty(2, 3, 4, 11, dtype=dtype)[..., 1::2],
    ]
    for out in layouts:
        OPS["normal"](out, 1, 0, 0)
        assert torch.equal(out, expected)


def test_a_batch_is_its_samples() -> None:
    whole = torch.empty(40, 3)
    OPS["normal"](whole, 2, 0, 100)
    part = torch.empty(7, 3)
    OPS["normal"](part, 2, 0, 120)
    assert torch.equal(whole[20:27], part)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)], ids=str)
def test_nothing_to_draw(shape: tuple[int, ...]) -> None:
    memory = torch.full((4, 4), 7.0)
    out = memory[tuple(slice(size) for size in shape)] if len(shape) == 2 else memory[0, :0]
    assert out.shape == shape
    assert OPS["normal"](out, 2, 0, 0) is None
    assert (memory == 7.0).all()


def test_indices_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operands, "WIDE", 1)
    out = torch.empty(2, 6, 4, 5)[:, ::2]
    OPS["normal"](out, 1, 0, 0)
    assert torch.equal(out, reference.normal((2, 3, 4, 5), seed=1))


SEEDS = [torch.tensor(3), torch.tensor([1, -2, 2**62]), torch.arange(600).flip(0) - 300, torch.arange(6)[::2]]


@pytest.mark.parametrize("seed", SEEDS, ids=lambda x: str(tuple(x.shape)))
@pytest.mark.parametrize("data", [torch.tensor(-1), torch.tensor(2**40 + 5)], ids=["-1", "2**40+5"])
def test_fold_in_is_the_references(seed: torch.Tensor, data: torch.Tensor) -> None:
    assert torch.equal(OPS["fold_in"](seed, data), reference.fold_in(seed, data))
    assert torch.equal(OPS["fold_in"](data, seed), reference.fold_in(data, seed))
    assert torch.equal(OPS["fold_in"](seed, seed), reference.fold_in(seed, seed))


@pytest.mark.parametrize(
    ("out", "key"),
    [
        (torch.zeros(1).expand(3), (1, 0, 0)),
        (torch.zeros(3, dtype=torch.int32), (1, 0, 0)),
        (torch.zeros(()), (1, 0, 0)),
        (torch.zeros(3), (1, -1, 0)),
        (torch.zeros(3), (1, 2**32, 0)),
        (torch.zeros(3), (1, 0, 2**32 - 2)),
        (torch.zeros(3), (torch.zeros(3), 0, 0)),
        (torch.zeros(3), (torch.zeros(2, dtype=torch.int64), 0, 0)),
    ],
)
def test_wrong_arguments_raise(out: torch.Tensor, key: tuple[int | torch.Tensor, ...]) -> None:
    with pytest.raises(RuntimeError, match="bicm_kernels: "):
        OPS["normal"](out, *key)


@pytest.mark.parametrize("sample_id", [2**32, -1])
def test_ids_of_no_samples_are_checked_too(sample_id: int) -> None:
    """As by the native library; the largest id is one also where no sample has it."""
    with pytest.raises(RuntimeError, match="sample_id must be in"):
        OPS["normal"](torch.empty(0, 4), 1, 0, sample_id)
    assert OPS["normal"](torch.empty(0, 4), 1, 0, 2**32 - 1) is None


def test_the_public_function_names_an_id_out_of_range_of_an_empty_batch() -> None:
    with backend.use("triton"), pytest.raises(ValueError, match=r"sample_id must be in \[0, 2\*\*32\), got 4294967296"):
        bk.normal((0, 4), seed=1, sample_id=2**32)
