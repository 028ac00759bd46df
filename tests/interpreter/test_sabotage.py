"""The comparisons themselves: each of these faults, planted in a Triton kernel, must be seen."""

# mypy: allow-untyped-defs

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from bits import assert_same, random

from bicm_kernels import reference

pytest.importorskip("triton")

import triton
import triton.language as tl

from bicm_kernels.triton_kernels import OPS, counter, multistep, noise, operands, pseudo_huber
from bicm_kernels.triton_kernels.philox import philox

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SHAPE = (2, 1100)
KEY = (17, 3, 5)


@triton.jit
def swapped_words(x0, x1, x2, x3, k0, k1):
    return philox(x0, x1, x3, x2, k0, k1)


@triton.jit
def next_quad(x0, x1, x2, x3, k0, k1):
    return philox(x0 + 1, x1, x2, x3, k0, k1)


@triton.jit
def short_tail(elements, batch, blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INDEX: tl.constexpr):
    return operands.locate(elements - 1, batch, blocks, ROWS, COLUMNS, INDEX)


@triton.jit
def contracted(tiles, weights, TERMS: tl.constexpr):
    """A product that is not rounded before it is added."""
    y = weights[0] * tiles[0]
    for k in tl.static_range(1, TERMS):
        y = (y.to(tl.float64) + weights[k].to(tl.float64) * tiles[k].to(tl.float64)).to(tl.float32)
    return y


def check_noise() -> None:
    out = torch.full(SHAPE, 7.0)
    OPS["normal"](out, *KEY)
    assert_same(out, reference.normal(SHAPE, seed=KEY[0], step=KEY[1], sample_id=KEY[2]))


def check_step() -> None:
    x, y = random(SHAPE), random(SHAPE, seed=1)
    out = torch.full(SHAPE, 7.0)
    OPS["ddim_step.out"]([x, y], [0.973, -0.241], 0.0, out=out)
    assert_same(out, reference.ddim_step(x, y, a=0.973, b=-0.241))


SEEDS = itertools.count()  # memory that is used again must not hold the right sums


def check_loss() -> None:
    x, y = (random((3, 2 * pseudo_huber.CHUNK), seed=next(SEEDS)) for _ in range(2))
    loss, _ = OPS["pseudo_huber"](x, y, None, None, 0, 0)
    torch.testing.assert_close(loss, reference.pseudo_huber(x, y), rtol=1e-6, atol=0)


def counts_too_early(*_: object) -> tuple[torch.Tensor, int]:
    """A word that is past its beginning: the last program but one takes itself for the last."""
    return torch.ones((), dtype=torch.int64), 0


Fault = tuple[Callable[[], None], ModuleType, str, object]
FAULTS: dict[str, Fault] = {
    "swapped words of the counter": (check_noise, noise, "philox", swapped_words),
    "the next quad": (check_noise, noise, "philox", next_quad),
    "a short tail of noise": (check_noise, noise, "locate", short_tail),
    "a short tail of a step": (check_step, multistep, "locate", short_tail),
    "a contracted product": (check_step, multistep, "fold", contracted),
    "a sum that is not there yet": (check_loss, counter, "begin", counts_too_early),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check, module, name, replacement = FAULTS[fault]
    check()
    monkeypatch.setattr(module, name, replacement)
    with pytest.raises(AssertionError):
        check()
