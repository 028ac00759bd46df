"""Exact steps beside the dispatcher: the same integers, notes and errors as on the long way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bicm_kernels as bk
from tests.support.ways import CONTEXTS, Bits, Op, Taken, agree, long_way

STEP = {"a": 0.98, "b": 0.03, "a_last": 0.97, "b_last": 0.04}
RATIO = (torch.tensor([24, 1]), torch.tensor([25, 1]))
WEIGHT = torch.tensor([0.3, -0.2], dtype=torch.float64)

OPS: dict[str, Op] = {
    "bdia_exact_step": lambda q, p, e, info: bk.bdia_exact_step(q, p, e, info, **STEP),
    "bdia_exact_step guided": lambda q, p, e, info: bk.bdia_exact_step(
        q, p, (e, -e), info, **STEP, gamma=(24, 25), guidance_scale=WEIGHT
    ),
    "bdia_exact_inverse_step": lambda q, p, e, info: bk.bdia_exact_inverse_step(q, p, e, info, **STEP, gamma=RATIO),
    "exact_affine_step": lambda q, p, e, info: bk.exact_affine_step(q, [p, e, e], [0.1, WEIGHT, 0.2], info),
    "exact_affine_step mixed": lambda q, p, e, info: bk.exact_affine_step(
        q, (e,), (0.1,), info, ratio=(3, RATIO[1]), fraction_bits=30
    ),
    "exact_affine_inverse_step": lambda q, p, e, info: bk.exact_affine_inverse_step(
        q, [e, (e, p.float())], [WEIGHT, 0.2], info, ratio=(1, 2), guidance_scale=2.0
    ),
    "fixed_point_decode": lambda q, p, e, info: bk.fixed_point_decode(q),
    "fixed_point_decode half": lambda q, p, e, info: bk.fixed_point_decode(q, fraction_bits=40, dtype=torch.bfloat16),
}
States = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture
def states() -> States:
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-(2**35), 2**35, (2, 3, 5, 4), generator=generator)
    return q, q.flip(0), torch.randn(q.shape, generator=generator), q.abs() % 7


def transposed(x: Tensor) -> Tensor:
    return x.transpose(1, 3).contiguous().transpose(1, 3)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("layout", [lambda x: x, transposed, lambda x: x.flatten(1)])
def test_plain_calls_take_it(
    name: str,
    layout: Op,
    states: States,
    taken: Taken,
    same_bits: Bits,
) -> None:
    laid = [layout(x) for x in states]
    ours, took = OPS[name](*laid), taken.pop()
    assert took == (name.split()[0], layout is not transposed or "decode" not in name)
    agree(ours, long_way(OPS[name], *laid), same_bits)


def test_a_ratio_of_1_returns_the_buffer_itself(states: States) -> None:
    assert OPS["bdia_exact_step"](*states)[1] is states[3]


@pytest.mark.parametrize("mark", [7, torch.tensor([3, 5])])
def test_overflow_is_noted(mark: Any, states: States, taken: Taken) -> None:
    q, _, e, info = states
    q[1, 0, 0, 0] = 2**63 - 1
    notes = []
    for way in (lambda op, *args: op(*args), long_way):
        overflow = torch.zeros(2, dtype=torch.int64)
        way(lambda x, y, o=overflow: bk.exact_affine_step(x, [y], [1.0], info, overflow=o, mark=mark), q, e.abs())
        notes.append(overflow)
    assert taken == [("exact_affine_step", True)]
    assert torch.equal(notes[0], notes[1])
    assert notes[0].tolist() == [0, 7 if isinstance(mark, int) else 5]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("kind", CONTEXTS)
def test_contexts_that_are_not_plain(
    name: str,
    kind: str,
    states: States,
    taken: Taken,
    same_bits: Bits,
) -> None:
    with CONTEXTS[kind]():
        ours = OPS[name](*states)
    assert not taken.pop()[1]
    expected = OPS[name](*states)
    assert taken.pop()[1]
    agree(ours, expected, same_bits)


WRONG: dict[str, Op] = {
    "derivative": lambda q, p, e, info: bk.bdia_exact_step(q, p, e.requires_grad_(), info, **STEP),
    "ratio": lambda q, p, e, info: bk.bdia_exact_step(q, p, e, info, **STEP, gamma=(0, 1)),
    "ratio beside a tensor": lambda q, p, e, info: bk.exact_affine_step(q, [e], [1.0], info, ratio=(0, RATIO[1])),
    "half a ratio": lambda q, p, e, info: bk.bdia_exact_step(q, p, e, info, **STEP, gamma=(1,)),
    "floats": lambda q, p, e, info: bk.exact_affine_step(q, [e], [1.0], info, ratio=(0.5, 1)),
    "state": lambda q, p, e, info: bk.exact_affine_step(e, [e], [1.0], info),
    "other states": lambda q, p, e, info: bk.exact_affine_step(q, [p.int()], [1.0], info),
    "int32 with a ratio": lambda q, p, e, info: bk.exact_affine_step(q.int(), [e], [1.0], info, ratio=(1, 2)),
    "integer eps": lambda q, p, e, info: bk.bdia_exact_step(q, p, p, info, **STEP),
    "buffer": lambda q, p, e, info: bk.exact_affine_step(q, [e], [1.0], info.int()),
    "buffer's shape": lambda q, p, e, info: bk.exact_affine_step(q, [e], [1.0], info[:1]),
    "bits": lambda q, p, e, info: bk.exact_affine_step(q, [e], [1.0], info, fraction_bits=63),
    "weights": lambda q, p, e, info: bk.exact_affine_step(q, [e, e], [1.0], info),
    "weights of a pair": lambda q, p, e, info: bk.exact_affine_step(q, [e, e], [1.0], info, guidance_scale=2.0),
    "pair": lambda q, p, e, info: bk.bdia_exact_step(q, p, (e, e), info, **STEP),
    "guidance": lambda q, p, e, info: bk.bdia_exact_step(q, p, e, info, **STEP, guidance_scale=2.0),
    "notes": lambda q, p, e, info: bk.exact_affine_step(q, [e], [1.0], info, overflow=torch.zeros(3).long()),
    "notes' dtype": lambda q, p, e, info: bk.exact_affine_step(q, [e], [1.0], info, overflow=torch.zeros(2)),
    "mark": lambda q, p, e, info: bk.exact_affine_step(q, [e], [1.0], info, overflow=torch.zeros(2).long(), mark=0),
    "decoded floats": lambda q, p, e, info: bk.fixed_point_decode(e),
    "decoded to integers": lambda q, p, e, info: bk.fixed_point_decode(q, dtype=torch.int64),
    "decoded with too many bits": lambda q, p, e, info: bk.fixed_point_decode(q, fraction_bits=63),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_those_of_the_long_way(name: str, states: States, taken: Taken) -> None:
    raised: list[Exception] = []
    for way in (WRONG[name], lambda *args: long_way(WRONG[name], *args)):
        with pytest.raises((TypeError, ValueError)) as caught:
            way(*states)
        raised.append(caught.value)
    assert {took for _, took in taken} <= {False}
    assert (type(raised[0]), str(raised[0])) == (type(raised[1]), str(raised[1]))
