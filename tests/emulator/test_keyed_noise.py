"""Keyed noise: the specification's bits from every target, however the work is split, wherever it goes."""

from itertools import pairwise

import bicm_emulator
import numpy as np
import pytest

from . import model
from .checks import check_normal, check_uniform, targets
from .tensors import DTYPES, LAYOUTS, Tensor

SIZES = [1, 2, 3, 4, 5, 63, 64, 65, 1023, 1024, 1025, 4099]
KEYS = {
    "zero": {"seed": 0},
    "large": {"seed": -0x123456789ABCDEF, "step": 2**32 - 1, "sample": 2**32 - 4},
    "per sample": {
        "seed": np.array([5, 2**40, -1], np.int64),
        "step": np.array([1, 0, 9], np.int64),
        "sample": np.array([3, 3, 2**32 - 1], np.int64),
        "counts": False,
    },
    "0-d arrays": {
        "seed": np.array(11, np.int64),
        "step": np.array(2, np.int64),
        "sample": np.array(6, np.int64),
    },
    "every second": {"seed": np.arange(6, dtype=np.int64)[::2], "counts": False},
}


def draw_with(target: str, **more: object):
    return lambda out, **key: bicm_emulator.noise(target, out, **key, **more)


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS.keys())
@pytest.mark.parametrize("size", SIZES)
def test_bits_and_values(target: str, size: int, key: dict[str, object]) -> None:
    check_uniform(draw_with(target), Tensor.empty((3, size), "float32"), **key)
    check_normal(draw_with(target), Tensor.empty((3, size), "float32"), **key)


def drawn(target: str, shape: tuple[int, ...], dtype: str, layout: str, offset: int, **options: object) -> Tensor:
    out = Tensor.empty(shape, dtype, layout, offset)
    bicm_emulator.noise(target, out.argument, seed=77, step=3, sample=9, **options)
    assert out.guards_intact()
    return out


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_wherever_the_tensor_lies(target: str, layout: str, dtype: str, distribution: str) -> None:
    for shape in [(2, 3, 5, 7), (3, 17, 61), (2, 1025), (1, 4, 16, 16), (4, 1), (3,), (2, 1, 3, 1, 2)]:
        plain = drawn("scalar", shape, dtype, "contiguous", 0, distribution=distribution)
        for offset in (0, 1, 2, 4):
            for options in ({}, {"streams": True}, {"merge": False}):
                other = drawn(target, shape, dtype, layout, offset, distribution=distribution, **options)
                assert np.array_equal(other.bits, plain.bits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dtype_is_a_rounding(target: str, dtype: str) -> None:
    exact = drawn(target, (2, 3001), "float32", "contiguous", 0)
    rounded = drawn(target, (2, 3001), dtype, "contiguous", 0)
    assert np.array_equal(rounded.bits, Tensor.of(exact.values, dtype).bits)


@pytest.mark.parametrize("target", bicm_emulator.instruction_sets())
def test_any_split_into_units(target: str) -> None:
    shape = (3, 5000)
    units = 3 * 5
    whole = drawn(target, shape, "float32", "contiguous", 0)
    rng = np.random.default_rng(0)
    for _ in range(10):
        cuts = [0, *sorted(rng.integers(0, units + 1, 4).tolist()), units]
        spans = list(pairwise(cuts))
        rng.shuffle(spans)
        split = drawn(target, shape, "float32", "contiguous", 0, units=[tuple(span) for span in spans])
        assert np.array_equal(split.bits, whole.bits)


GRIDS = [(1, 1, 1), (1, 1, 32), (2, 3, 7), (7, 1, 64), (1, 9, 33), (64, 5, 256), (3, 2, 1024)]


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_any_grid(device: bicm_emulator.Device, grid: tuple[int, int, int], backwards: bool) -> None:
    for dtype in DTYPES:
        for layout in ("contiguous", "padded to 16 bytes", "permuted"):
            shape = (4, 3, 19, 11)
            plain = drawn("scalar", shape, dtype, "contiguous", 0)
            device.x, device.y, device.threads = grid
            device.backwards = backwards
            assert np.array_equal(drawn("cuda", shape, dtype, layout, 0).bits, plain.bits)


@pytest.mark.parametrize("processors", [1, 3, 200])
def test_the_planned_grid_covers_the_data(device: bicm_emulator.Device, processors: int) -> None:
    device.processors = processors
    for shape in [(1, 1), (1, 40_000), (700, 3), (70_000, 1), (33, 1027)]:
        assert np.array_equal(
            drawn("cuda", shape, "float32", "contiguous", 0).bits,
            drawn(targets()[-2], shape, "float32", "contiguous", 0).bits,
        )


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,), (2, 0, 3)])
def test_nothing_to_draw(target: str, device: bicm_emulator.Device, shape: tuple[int, ...]) -> None:
    launches = device.launches
    bicm_emulator.noise(target, np.empty(shape, np.float32), seed=1)
    assert device.launches == launches


def test_an_error_of_the_runtime_comes_back(device: bicm_emulator.Device) -> None:
    device.fails = True
    with pytest.raises(RuntimeError, match="returned an error"):
        bicm_emulator.noise("cuda", np.empty((1, 4), np.float32), seed=1)


def test_a_grid_that_no_gpu_accepts_is_an_error(device: bicm_emulator.Device) -> None:
    device.threads = 2048
    with pytest.raises(RuntimeError, match="returned an error"):
        bicm_emulator.noise("cuda", np.empty((1, 4), np.float32), seed=1)


class TestBeyond32Bits:
    """A sample of 2^35 elements, with all rows in the same memory: counters and addresses need 64 bits."""

    SHAPE = (1, 2**25, 1024)
    ROW = 2**24 + 12345
    FIRST = ROW * 1024  # above 2^34, so the quad is above 2^32

    def expected(self) -> np.ndarray:
        elements = np.arange(self.FIRST, self.FIRST + 1024, dtype=np.int64)
        return model.uniforms(3, 2, 1, elements)

    def overlaid(self, row: np.ndarray) -> np.ndarray:
        return np.lib.stride_tricks.as_strided(row, self.SHAPE, (0, 0, 4))

    @pytest.mark.parametrize("target", bicm_emulator.instruction_sets())
    def test_cpu(self, target: str) -> None:
        row = np.zeros(1024, np.float32)
        unit = (self.ROW, self.ROW + 1)
        bicm_emulator.noise(target, self.overlaid(row), seed=3, step=1, sample=2, distribution="uniform", units=[unit])
        assert np.array_equal(row, self.expected())

    def test_cuda_strided(self, device: bicm_emulator.Device) -> None:
        row = np.zeros(1024, np.float32)
        device.threads = 256
        device.x = 2**27
        device.from_block = self.FIRST // 256
        device.until_block = device.from_block + 4
        bicm_emulator.noise("cuda", self.overlaid(row), seed=3, step=1, sample=2, distribution="uniform")
        assert np.array_equal(row, self.expected())

    def test_cuda_dense(self, device: bicm_emulator.Device) -> None:
        row = np.zeros(1024, np.float32)
        device.threads = 256
        device.x = 2**25
        device.from_block = self.ROW
        device.until_block = self.ROW + 1

        class Far:
            """A dense tensor of which only one row exists."""

            __array_interface__ = {  # noqa: RUF012
                "version": 3,
                "shape": self.SHAPE,
                "typestr": "<f4",
                "data": (row.ctypes.data - 4 * self.FIRST, False),
            }

        bicm_emulator.noise("cuda", np.asarray(Far()), seed=3, step=1, sample=2, distribution="uniform")
        assert np.array_equal(row, self.expected())
