"""What a kernel must satisfy, as functions of the kernel, so that the checks themselves can be tested."""

from __future__ import annotations

from collections.abc import Callable

import bicm_emulator
import numpy as np

from . import model
from .model import Problem
from .tensors import Tensor, same_bits, to_bits

# Random123's known-answer vectors for philox4x32-10: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]

Philox = Callable[[int, np.ndarray], np.ndarray]
Draw = Callable[..., None]
Run = Callable[[Problem], None]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def signed(seed: int) -> int:
    return seed - 2**64 if seed >= 2**63 else seed


def check_known_answers(philox: Philox) -> None:
    for counter, key, result in KNOWN_ANSWERS:
        low, high = words(key)
        got = philox(signed(high << 32 | low), np.array([words(counter)], np.uint32))
        assert got.tolist() == [words(result)]


def keys_of(batch: int, key: dict[str, object]) -> list[tuple[int, int, int]]:
    """(seed, sample, step) of every sample."""

    def at(value: object, b: int) -> int:
        return int(value if np.ndim(value) == 0 else np.asarray(value)[b])

    counted = key.get("counts", True)
    return [
        (
            at(key["seed"], b) % 2**64,
            at(key.get("sample", 0), b) + (b if counted else 0),
            at(key.get("step", 0), b),
        )
        for b in range(batch)
    ]


def check_uniform(draw: Draw, out: Tensor, **key: object) -> None:
    """The bits are those of the specification, and nothing beside the tensor was written."""
    shape = out.bits.shape
    elements = np.arange(int(np.prod(shape[1:])), dtype=np.int64)
    draw(out.argument, distribution="uniform", **key)
    for b, (seed, sample, step) in enumerate(keys_of(shape[0], key)):
        expected = to_bits(model.uniforms(seed, sample, step, elements).reshape(shape[1:]), out.dtype)
        assert same_bits(out.bits[b], expected, out.dtype)
    assert out.guards_intact()


def check_normal(draw: Draw, out: Tensor, **key: object) -> None:
    """Every float32 number is within a few ulp of Box-Muller's, and nothing beside the tensor was written."""
    shape = out.bits.shape
    elements = np.arange(int(np.prod(shape[1:])), dtype=np.int64)
    draw(out.argument, distribution="normal", **key)
    for b, (seed, sample, step) in enumerate(keys_of(shape[0], key)):
        expected = model.normals(seed, sample, step, elements).reshape(shape[1:])
        error = np.abs(out.values[b] - expected)
        assert np.all(error <= 1e-6 * np.maximum(np.abs(expected), 0.1))
    assert out.guards_intact()


def check_step(run: Run, problem: Problem) -> None:
    """Every output has the bits of the NumPy model, and nothing beside the outputs was written."""
    expected = problem.expected()
    before = [tensor.fresh() for tensor in problem.outputs]
    unchanged = [(x, x.fresh()) for x in problem.operands if all(x is not out for out in problem.outputs)]
    run(problem)
    for tensor, bits, old in zip(problem.outputs, expected, before, strict=True):
        assert same_bits(tensor.bits, bits, tensor.dtype)
        assert tensor.guards_intact(old)
    for tensor, old in unchanged:
        assert np.array_equal(tensor.memory, old.memory)


def targets() -> list[str]:
    return [*bicm_emulator.instruction_sets(), "cuda"]
