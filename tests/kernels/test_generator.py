"""Torch's own noise drawn by the native library: its bits, the state it leaves, and torch where the bits differ."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor
from torch._subclasses import FakeTensorMode

import bicm_kernels as bk
from bicm_kernels import backend, generator_check
from tests.support import instruction_sets

Python = Callable[..., "subprocess.CompletedProcess[str]"]

ours = pytest.mark.skipif(not backend.draws_like_torch(), reason="torch.randn draws here")


def same(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and x.dtype == y.dtype and torch.equal(x.view(torch.uint8), y.view(torch.uint8))


@pytest.fixture
def twins() -> tuple[Generator, Generator]:
    return Generator().manual_seed(11), Generator().manual_seed(11)


@pytest.fixture
def fresh() -> Iterator[None]:
    """The comparison is made anew, and once more afterwards."""
    backend._draws_like_torch = None
    yield
    backend._draws_like_torch = None


def check(generator: Generator, twin: Generator, *shape: int) -> None:
    noise = bk.torch_randn(shape, generator=generator)
    assert same(noise, torch.randn(shape, generator=twin)), shape
    assert torch.equal(generator.get_state(), twin.get_state()), shape


@pytest.mark.parametrize("sizes", [range(101), (16384, 623, 624, 625, 1248, 20_001, 1023, 1025, 4000, 333_333)])
def test_the_bits_and_the_state_are_torchs(sizes: Sequence[int], twins: tuple[Generator, Generator]) -> None:
    for size in sizes:
        check(*twins, size)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63, 2**64 - 1, -1])
def test_every_seed_and_every_place_in_the_words(seed: int) -> None:
    generator, twin = Generator().manual_seed(seed), Generator().manual_seed(seed)
    for place in range(0, 640, 5):
        assert torch.equal(torch.rand(place, generator=generator), torch.rand(place, generator=twin))
        check(generator, twin, 3, 37)


def test_torchs_own_draws_in_between(twins: tuple[Generator, Generator]) -> None:
    others: list[Callable[[Generator], Tensor]] = [
        lambda g: torch.randn(3, generator=g),  # keeps half of a pair of normal numbers
        lambda g: torch.randint(0, 9, (7,), generator=g),
        lambda g: torch.randn(33, dtype=torch.float64, generator=g),
        lambda g: torch.randn(1, dtype=torch.bfloat16, generator=g),
        lambda g: torch.randperm(50, generator=g),
    ]
    for other in others * 3:
        assert torch.equal(*map(other, twins))
        check(*twins, 2, 4, 9, 9)


def test_the_default_generator() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        noise, after = [bk.torch_randn((4, 50)) for _ in range(3)], torch.rand(3)
        torch.manual_seed(5)
        assert all(same(x, torch.randn(4, 50)) for x in noise)
        assert torch.equal(after, torch.rand(3))


@pytest.mark.parametrize("shape", [(3, 16), (3, 2, 333), (3, 5), (4, 6), (1, 64), (3, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_generator_for_each_sample(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generators, twins = ([Generator().manual_seed(7 + i) for i in range(shape[0])] for _ in range(2))
    for kind in (list, tuple):
        noise = bk.torch_randn(shape, generator=kind(generators), dtype=dtype)
        expected = [torch.randn((1, *shape[1:]), generator=twin, dtype=dtype) for twin in twins]
        assert same(noise, torch.cat(expected))
        for generator, twin in zip(generators, twins, strict=True):
            assert torch.equal(generator.get_state(), twin.get_state())


def test_a_generator_that_is_given_twice(twins: tuple[Generator, Generator]) -> None:
    noise = bk.torch_randn((3, 40), generator=[twins[0]] * 3)
    assert same(noise, torch.cat([torch.randn((1, 40), generator=twins[1]) for _ in range(3)]))


@ours
def test_generators_of_which_one_is_not_known_draw_nothing() -> None:
    known, strange = Generator().manual_seed(1), Generator().manual_seed(2)
    state = strange.get_state()
    state.view(torch.int64)[1] = 1 << 32 | 300
    strange.set_state(state)
    before = known.get_state()
    assert backend.library.generator_normal((2, 64), [known, strange]) is None
    assert torch.equal(known.get_state(), before)


def test_another_number_of_generators() -> None:
    for count, shape in ((2, (3, 16)), (4, (3, 16)), (0, (3, 16)), (1, ())):
        with pytest.raises(ValueError, match=f"one for each of the samples of .*, got {count}"):
            bk.torch_randn(shape, generator=[Generator()] * count)


def test_a_state_that_was_kept(twins: tuple[Generator, Generator]) -> None:
    generator, twin = twins
    check(generator, twin, 100)
    state = generator.get_state()
    before = bk.torch_randn((1000,), generator=generator)
    copied = generator.clone_state()
    generator.set_state(state)
    assert same(before, bk.torch_randn((1000,), generator=generator))
    assert same(torch.randn(50, generator=copied), bk.torch_randn((50,), generator=generator))


@ours
def test_a_state_of_no_generator_is_left_alone() -> None:
    """Words left that do not go with the place of the next one: torch would not leave that."""
    generator = Generator().manual_seed(0)
    state = generator.get_state()
    state.view(torch.int64)[1] = 1 << 32 | 300
    generator.set_state(state)
    assert backend.library.generator_normal((64,), generator) is None
    assert torch.equal(generator.get_state(), state)


def test_threads_share_the_default_generator() -> None:
    """No number is drawn twice, and none is left out."""
    drawn: list[Tensor] = []

    def draw() -> None:
        for _ in range(40):
            drawn.append(bk.torch_randn((1024,)))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        threads = [threading.Thread(target=draw) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        torch.manual_seed(9)
        expected = [torch.randn(1024) for _ in range(160)]
    if backend.draws_like_torch():
        assert {x.numpy().tobytes() for x in drawn} == {x.numpy().tobytes() for x in expected}
    assert len({x.numpy().tobytes() for x in drawn}) == 160


# --- what is torch.randn itself -------------------------------------------------------------------------------------


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the native library drew, call by call."""
    seen: list[bool] = []
    library = backend.library

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(library, name)

        def generator_normal(self, shape: Sequence[int], generator: Generator | None) -> Tensor | None:
            result: Tensor | None = library.generator_normal(shape, generator)
            seen.append(result is not None)
            return result

    monkeypatch.setattr(backend, "library", Watched())
    return seen


@ours
def test_plain_draws_take_it(taken: list[bool]) -> None:
    for given in ({}, {"dtype": torch.float32}, {"device": "cpu"}, {"device": torch.device("cpu")}):
        bk.torch_randn((16,), **given)
        bk.torch_randn([2, 3, 4], generator=Generator(), **given)
        bk.torch_randn([2, 3, 6], generator=[Generator(), Generator()], **given)
        bk.torch_randn(torch.zeros(4, 4).shape, **given)
    assert taken == [True] * 16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype, taken: list[bool], twins: tuple[Generator, Generator]) -> None:
    assert same(
        bk.torch_randn((64,), generator=twins[0], dtype=dtype),
        torch.randn(64, generator=twins[1], dtype=dtype),
    )
    torch.set_default_dtype(torch.float64)
    try:
        assert bk.torch_randn((64,)).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert True not in taken


def test_calls_that_somebody_watches(taken: list[bool]) -> None:
    with FakeTensorMode():
        assert type(bk.torch_randn((64,))).__name__ == "FakeTensor"
    with torch.device("meta"):
        assert bk.torch_randn((64,)).is_meta
    assert bk.torch_randn((64,), device="meta").is_meta
    with torch.profiler.profile() as profile:
        bk.torch_randn((64,))
    assert any(event.name == "aten::randn" for event in profile.events())
    rows = torch.vmap(lambda x: x + bk.torch_randn((64,)), randomness="different")(torch.zeros(2, 64))
    assert not torch.equal(rows[0], rows[1])
    assert True not in taken


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_code_draws_as_torch_does() -> None:
    compiled = torch.compile(lambda x: x + bk.torch_randn((64,)), backend="aot_eager", fullgraph=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        drawn = compiled(torch.zeros(64))
        torch.manual_seed(3)
        assert same(drawn, torch.randn(64))


@pytest.mark.parametrize(
    ("shape", "given", "message"),
    [
        ((-1, 16), {}, "negative dimension -1"),
        (("a",), {}, "invalid combination of arguments"),
        ((64,), {"generator": 3}, "invalid combination of arguments"),
        ((64,), {"device": "no"}, "device type at start of device string: no"),
        ((2**40, 2**40), {}, "[Oo]verflow"),
    ],
)
def test_errors_are_torchs(shape: Sequence[Any], given: dict[str, Any], message: str) -> None:
    with pytest.raises((RuntimeError, TypeError), match=message):
        bk.torch_randn(shape, **given)


# --- the comparison -------------------------------------------------------------------------------------------------


def flip(x: Tensor, element: int) -> None:
    x.view(torch.int32)[element] ^= 1


def advance(generator: Generator) -> None:
    torch.rand(1, generator=generator)


FAULTS: dict[str, Callable[[Tensor, Generator], None]] = {
    "a bit of the first number": lambda x, _: flip(x, 0),
    "a bit of the last number of 625": lambda x, _: flip(x, -1) if x.numel() == 625 else None,
    "a bit beyond a thousand numbers": lambda x, _: flip(x, 4000) if x.numel() > 4000 else None,
    "a word too many": lambda _, generator: advance(generator),
    "a word too many after 5000": lambda x, generator: advance(generator) if x.numel() == 5000 else None,
    "the sign of zero": lambda x, _: x.copy_(torch.where(x == 0, -x, x)),
}


@ours
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.usefixtures("fresh")
def test_a_fault_gives_torchs_numbers(
    fault: str, monkeypatch: pytest.MonkeyPatch, twins: tuple[Generator, Generator]
) -> None:
    library = backend.library

    class Faulty:
        instruction_set = library.instruction_set

        @staticmethod
        def generator_normal(shape: Sequence[int], generator: Generator) -> Tensor:
            result: Tensor = library.generator_normal(shape, generator)
            FAULTS[fault](result, generator)
            return result

    monkeypatch.setattr(backend, "library", Faulty)
    check(*twins, 5000)
    assert not backend.draws_like_torch()
    assert "torch_randn is torch.randn" in backend.describe()


@ours
@pytest.mark.usefixtures("fresh")
def test_a_first_draw_that_is_watched_decides_nothing() -> None:
    with FakeTensorMode():
        bk.torch_randn((64,))
    assert backend._draws_like_torch is None
    bk.torch_randn((64,))
    assert backend._draws_like_torch


def temper(words: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    words = words ^ (words >> 11)
    words = words ^ ((words << 7) & 0x9D2C5680)
    words = words ^ ((words << 15) & 0xEFC60000)
    return words ^ (words >> 18)


def test_hard_cases_are_what_they_claim() -> None:
    """The words become the ends of the range among others, and torch draws them from the generator that holds them."""
    bits = temper(np.array(generator_check.HARD, dtype=np.int64)) & 0xFFFFFF
    radii, angles = bits.reshape(2, 2, 8).swapaxes(0, 1).reshape(2, 16)
    assert {0, 0xFFFFFF} <= set(radii)
    assert {0, 0xFFFFFF} <= set(angles)
    generator = generator_check.hard_generator()
    assert generator is not None
    assert torch.equal(torch.rand(32, generator=generator), torch.from_numpy(bits).float() / 2**24)
    u = bits.reshape(2, 2, 8) / 2**24
    radius, angle = np.sqrt(-2 * np.log(1 - u[:, 0])), 2 * np.pi * u[:, 1]
    exact = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(32)
    generator = generator_check.hard_generator()
    assert np.allclose(torch.randn(32, generator=generator).numpy(), exact, rtol=0, atol=1e-6)


SETS = """
import torch, bicm_kernels as bk
print(bk.backend.describe())
for size in (16, 17, 625, 5000, 16384):
    g, h = torch.Generator().manual_seed(size), torch.Generator().manual_seed(size)
    for _ in range(3):
        assert torch.equal(bk.torch_randn((size,), generator=g), torch.randn(size, generator=h))
    assert torch.equal(g.get_state(), h.get_state())
"""


@pytest.mark.parametrize("instructions", instruction_sets.EVERY)
def test_every_instruction_set_gives_torchs_numbers(python: Python, instructions: str) -> None:
    instruction_sets.need(instructions)
    described = python(SETS, BICM_KERNELS_ISA=instructions).stdout.strip()
    assert ("torch_randn is torch.randn" not in described) == (instructions in instruction_sets.DRAW_LIKE_TORCH)


SWITCHED = """
import torch, bicm_kernels as bk
from bicm_kernels import backend
print(backend.describe())
library = backend.library
class Spy:
    instruction_set = staticmethod(library.instruction_set)
    def generator_normal(self, *arguments):
        print("drawn")
        return library.generator_normal(*arguments)
backend.library = Spy()
g, h = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
assert torch.equal(bk.torch_randn((625,), generator=g), torch.randn(625, generator=h))
assert torch.equal(g.get_state(), h.get_state())
"""


@ours
@pytest.mark.parametrize("drawer", [None, "native", "torch"])
def test_the_environment_may_leave_it_to_torch(python: Python, drawer: str | None) -> None:
    described, *drawn = python(SWITCHED, BICM_KERNELS_GENERATOR=drawer).stdout.splitlines()
    switched = drawer == "torch"
    assert ("; torch_randn is torch.randn (BICM_KERNELS_GENERATOR=torch)" in described) is switched
    assert drawn == ([] if switched else ["drawn"])


def test_torch_in_its_baseline(python: Python) -> None:
    """A torch that takes another way to the numbers: the comparison finds out, and they are torch's all the same."""
    described = python(SETS, ATEN_CPU_CAPABILITY="default").stdout.strip()
    assert described.endswith("; torch_randn is torch.randn)")


def test_the_reference_is_torch(twins: tuple[Generator, Generator]) -> None:
    with backend.use("reference"):
        check(*twins, 100)
        assert not backend.draws_like_torch()
