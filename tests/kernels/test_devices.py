"""Tensors of one call lie on one device; only a number may stay on the CPU. Nothing else gives a result."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import keystr, tree_flatten, tree_leaves, tree_map_with_path, tree_unflatten

import bicm_kernels as bk
from bicm_kernels import backend
from bicm_kernels.ops.checks import FLOATING
from tests.support.calls import CALLS, EVERY, WITHOUT, changed, given, op_of, opened, takes_tensors, with_host_numbers
from tests.support.overloads import SAMPLES, overload_of

META, GPU = torch.device("meta"), torch.device("cuda", 0)
#: What draws into a new tensor, whose device it is told.
DRAWING = ("normal", "uniform")

Move = Callable[[Tensor], Tensor]


def places(call: Any) -> list[str]:
    """Where a call has tensors."""
    found: list[str] = []
    tree_map_with_path(lambda path, x: found.append(keystr(path)) if isinstance(x, Tensor) else None, call)
    return found


def devices(call: Any) -> set[torch.device]:
    """Where the tensors lie that cannot be read from the host."""
    tensors = [x for x in tree_leaves(call) if isinstance(x, Tensor)]
    return {x.device for x in tensors if x.dim() or x.device.type != "cpu"}


def test_the_table_has_every_op_and_every_tensor_that_it_takes() -> None:
    public = {name for name in bk.__all__ if inspect.isfunction(getattr(bk, name))}
    assert public == {*CALLS, *WITHOUT}
    for name in CALLS:
        assert given(name) == takes_tensors(name), name


def split_calls(name: str, k: int, device: torch.device, here: Move, there: Move) -> Iterator[tuple[str, Any]]:
    """A call with one tensor on another device, then with all but one there; the last with all of them there."""
    call = CALLS[name][k]
    for data in (torch.device("cpu"), device):
        for place in places(call):
            alone, rest = (there, here) if data.type == "cpu" else (here, there)
            moved = changed(
                call, lambda at, x, place=place, alone=alone, rest=rest: (alone if at == place else rest)(x)
            )
            yield f"{place}, the others on {data}", moved | ({"device": data} if name in DRAWING else {})
    yield "all there", changed(call, lambda _, x: there(x)) | ({"device": device} if name in DRAWING else {})
    numbers = changed(call, lambda _, x: there(x) if x.dim() else here(x))
    yield "numbers here", numbers | ({"device": device} if name in DRAWING else {})


def check(name: str, k: int, device: torch.device, here: Move, there: Move, expected: list[Tensor]) -> None:
    """Every split call is refused, or gives results of the expected form where its tensors lie."""
    assert expected
    for what, call in split_calls(name, k, device, here, there):
        found = devices(call) | ({call["device"]} if name in DRAWING else set())
        if len(found) > 1:
            with pytest.raises(ValueError, match=f"cpu|{device.type}|device"):
                raise AssertionError(f"{what}: {op_of(name)(**call)}")
            continue
        for actual, wanted in zip(opened(op_of(name)(**call)), expected, strict=True):
            assert {actual.device} == (found or {torch.device("cpu")}), what
            assert (actual.shape, actual.dtype, actual.stride()) == (wanted.shape, wanted.dtype, wanted.stride()), what


def results(name: str, k: int) -> list[Tensor]:
    return opened(op_of(name)(**changed(CALLS[name][k], lambda _, x: x.clone())))


@pytest.mark.parametrize(("name", "k"), EVERY)
def test_meta_tensors(each_backend: str, name: str, k: int) -> None:
    check(name, k, META, torch.clone, lambda x: x.to("meta"), results(name, k))


def on_the_gpu(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=GPU)


@pytest.mark.parametrize(("name", "k"), EVERY)
def test_fake_tensors(name: str, k: int) -> None:
    """A GPU that is not there: whatever asks for a value, or waits, raises."""
    expected = results(name, k)
    with backend.use("auto"), FakeTensorMode() as mode:
        check(name, k, GPU, mode.from_tensor, on_the_gpu, expected)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize(("name", "k"), [case for case in EVERY if case[0] != "fold_in"])
def test_numbers_on_the_cpu_beside_a_gpu(name: str, k: int, dtype: torch.dtype) -> None:
    expected = opened(op_of(name)(**with_host_numbers(CALLS[name][k], dtype, torch.clone)))
    with backend.use("auto"), FakeTensorMode(allow_non_fake_inputs=True):
        call = with_host_numbers(CALLS[name][k], dtype, on_the_gpu) | ({"device": GPU} if name in DRAWING else {})
        for actual, wanted in zip(opened(op_of(name)(**call)), expected, strict=True):
            assert (actual.device, actual.shape, actual.dtype) == (GPU, wanted.shape, wanted.dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "k"), EVERY)
def test_compiled(name: str, k: int) -> None:
    torch._dynamo.reset()
    for what, call in split_calls(name, k, META, torch.clone, lambda x: x.to("meta")):
        if len(devices(call) | ({call["device"]} if name in DRAWING else set())) < 2:
            continue
        leaves, form = tree_flatten(call)
        fast = torch.compile(lambda *x, form=form: op_of(name)(**tree_unflatten(x, form)), backend="eager")
        with pytest.raises((TypeError, ValueError), match=r"cpu|meta|device"):
            raise AssertionError(f"{what}: {fast(*leaves)}")


@pytest.mark.parametrize("name", SAMPLES)
def test_every_overload(name: str) -> None:
    for *positional, keywords in SAMPLES[name]:
        call = [positional, keywords]
        for place in places(call):
            args, named = changed(call, lambda at, x, place=place: x.detach().to("meta") if at == place else x.detach())
            if len(devices([args, named])) < 2:
                continue
            with pytest.raises(RuntimeError, match="bicm_kernels: "):
                raise AssertionError(f"{place}: {overload_of(name)(*args, **named)}")
        args, named = changed(call, lambda _, x: x.detach().to("meta"))
        made = overload_of(name)(*args, **named)
        assert all(x.is_meta for x in tree_leaves(made) if isinstance(x, Tensor))
