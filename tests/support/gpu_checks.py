"""Checks of calls past the dispatcher on GPUs that are not there; each runs in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_leaves, tree_map_with_path

import bicm_kernels as bk
from benchmarks.fake_gpu import FakeGpus
from bicm_kernels import backend
from bicm_kernels.ops.noise import NORMAL, UNIFORM
from tests.support.calls import CALLS, changed, op_of, opened
from tests.support.ways import CONTEXTS, LAYOUTS, TENSORS, Spy, long_way

Check = Callable[[FakeGpus], None]
CHECKS: dict[str, Check] = {}

#: The launcher of each op.
LAUNCHERS = {
    **dict.fromkeys(("ddim_step", "bdia_step", "bdia_inverse_step", "affine_step", "add_noise"), "multistep"),
    **dict.fromkeys(("denoised_step", "scale_input", "denoise", "renoise"), "multistep"),
    **dict.fromkeys(("exact_affine_step", "exact_affine_inverse_step", "bdia_exact_step"), "reversible"),
    **dict.fromkeys(("bdia_exact_inverse_step", "fixed_point_encode"), "reversible"),
    "fixed_point_decode": "fixed_point_decode",
    "noisy_pair": "noisy_pair",
    "gaussian_step": "gaussian",
    "pseudo_huber": "pseudo_huber",
    "consistency_loss": "pseudo_huber",
}
#: Of a sampler's steps, which have further layouts and dtypes.
STEPS = {
    "ddim_step": lambda x, y: bk.ddim_step(x, (y, x), a=0.9, b=-0.1, guidance_scale=2.5),
    "affine_step": lambda x, y: bk.affine_step([x, y, x], (0.9, 0.1, 0.2), noise_weight=0.3, seed=5, step=2),
    "denoised_step": lambda x, y: bk.denoised_step([x, y], [1.2, -2.1], (0.3, 0.1), x0_weight=0.8, next_scale=0.6),
    "gaussian_step": lambda x, y: bk.gaussian_step([x, y], [0.9, -0.1], std=0.3, seed=7),
    "scale_input": lambda x, y: bk.scale_input(x, 0.7),
}
DTYPES = ((torch.float32, torch.float32), (torch.bfloat16, torch.float16), (torch.float64, torch.float32))
HOST, OTHER = -1, 1


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def calls() -> list[tuple[str, dict[str, Any]]]:
    """Every call that bypasses the dispatcher on the CPU."""
    every = [(name, {k: x for k, x in call.items() if k != "out"}) for name in LAUNCHERS for call in CALLS[name]]
    found = [(name, call) for name, call in every if is_direct(name, call)]
    assert {name for name, _ in found} == {*LAUNCHERS}
    return found


def is_direct(name: str, call: dict[str, Any]) -> bool:
    taken: list[tuple[str, bool]] = []
    kept, backend.direct = backend.direct, Spy(taken)
    try:
        op_of(name)(**changed(call, lambda _, x: x.clone()))
    finally:
        backend.direct = kept
    direct = any(took for _, took in taken)
    assert direct or LAUNCHERS[name] == "pseudo_huber", name  # whose numbers may be tensors on the long way alone
    return direct


def same(actual: Tensor, expected: Tensor) -> bool:
    return actual.dtype == expected.dtype and torch.equal(actual, expected)


def expected_of(name: str, call: Any) -> list[Tensor]:
    """The results of the dispatcher's kernels, on the CPU."""
    return opened(long_way(lambda: op_of(name)(**changed(call, lambda _, x: x.clone()))))


def switched_on(gpus: FakeGpus) -> None:
    assert backend.library.use_launchers(gpus.launchers())
    bk.scale_input(torch.ones(1, 1), 0.0)  # looks for implementations


@check
def every_op(gpus: FakeGpus) -> None:
    """One launch on the tensors' GPU, the bits of the CPU, results on the GPU."""
    switched_on(gpus)
    for name, call in calls():
        for gpu in (0, 1):
            gpus.clear()
            gpus.current = gpu
            moved = changed(call, lambda _, x, gpu=gpu: gpus.put(x, gpu))
            found = opened(op_of(name)(**moved))
            loss = LAUNCHERS[name] == "pseudo_huber"  # its results are allocated by the stable ABI, on the CPU's device
            assert gpus.launched == [(LAUNCHERS[name], -1 if loss else gpu)], (name, gpus.launched)
            for actual, wanted in zip(found, expected_of(name, call), strict=True):
                assert same(actual, wanted), name
                assert loss or gpus.lies_on(actual) == gpu
                assert actual.stride() == wanted.stride()


@check
def overflow_is_noted(gpus: FakeGpus) -> None:
    switched_on(gpus)
    q = torch.full((2, 3), 2**62)
    notes = torch.zeros(2, dtype=torch.int64)
    on_gpu = gpus.put(notes)
    bk.exact_affine_step(gpus.put(q), [gpus.put(q)], [1e6], gpus.put(q * 0), overflow=on_gpu, mark=3)
    long_way(lambda: bk.exact_affine_step(q, [q], [1e6], q * 0, overflow=notes, mark=3))
    assert notes.tolist() == [3, 3]
    assert torch.equal(on_gpu, notes)
    assert gpus.launched == [("reversible", 0)]


@check
def layouts_and_dtypes(gpus: FakeGpus) -> None:
    switched_on(gpus)
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    for name, step in STEPS.items():
        for layout in LAYOUTS.values():
            for dtypes in DTYPES:
                gpus.clear()
                given = [layout(y.to(dtype)) for y, dtype in zip((x, x.sin()), dtypes, strict=True)]
                found = opened(step(*map(gpus.put, given)))
                assert gpus.launched == [(LAUNCHERS[name], 0)]
                for actual, wanted in zip(found, opened(long_way(step, *given)), strict=True):
                    assert same(actual, wanted)
                    assert actual.stride() == wanted.stride()


@check
def draws(gpus: FakeGpus) -> None:
    """In place, so on any GPU; seeds on the GPU and on the CPU."""
    switched_on(gpus)
    for row, name in ((NORMAL, "normal"), (UNIFORM, "uniform")):
        for seed in (5, torch.tensor(5), torch.tensor([4, 0, 9])):
            for gpu in (0, OTHER):
                gpus.clear()
                on_gpu = gpus.put(seed, gpu) if isinstance(seed, Tensor) else seed
                found = row.call(gpus.put(torch.empty(3, 67), gpu), on_gpu, 2, 0)
                wanted = long_way(lambda name=name, seed=seed: op_of(name)((3, 67), seed=seed, step=2))
                assert same(found, wanted)
                assert gpus.launched == [("noise", gpu)]
        gpus.clear()
        row.call(gpus.put(torch.empty(3, 67)), torch.tensor(5), torch.tensor(2), 0)
        assert gpus.launched == [("noise", 0)]
        row.call(gpus.put(torch.empty(3, 67)), torch.tensor([4, 0, 9]), 2, 0)
        assert gpus.launched == [("noise", 0)]


@check
def numbers_on_the_cpu(gpus: FakeGpus) -> None:
    """0-d tensors on the CPU beside tensors on a GPU are read here."""
    switched_on(gpus)
    for name, call in calls():
        gpus.clear()

        def number(at: str, x: Tensor) -> Tensor:
            stays = x.dim() > 1 or any(word in at for word in ("overflow", "mask"))
            return x if stays else x.flatten()[0].clone()

        numbers = changed(call, number)
        found = opened(op_of(name)(**changed(numbers, lambda _, x: gpus.put(x) if x.dim() else x)))
        assert [launcher for launcher, _ in gpus.launched] == [LAUNCHERS[name]], name
        for actual, wanted in zip(found, expected_of(name, numbers), strict=True):
            assert same(actual, wanted)


def places(call: Any) -> list[tuple[str, Tensor]]:
    found: list[tuple[str, Tensor]] = []
    tree_map_with_path(lambda path, x: found.append((keystr(path), x)) if isinstance(x, Tensor) else None, call)
    return found


@check
def tensors_on_two_devices(gpus: FakeGpus) -> None:
    """Not taken, wherever the other one stands; but for a number on the CPU. The results are the dispatcher's."""
    switched_on(gpus)
    for name, call in calls():
        if LAUNCHERS[name] == "pseudo_huber":
            continue  # whose tensors are of torch's C++, which says that all are on the CPU
        for data, alone in ((0, HOST), (0, OTHER), (HOST, 0)):
            for place, x in places(call):
                if data == 0 and alone == HOST and x.dim() == 0:
                    continue
                gpus.clear()

                def move(at: str, y: Tensor, place: str = place, data: int = data, alone: int = alone) -> Tensor:
                    gpu = alone if at == place else data
                    return y.clone() if gpu == HOST else gpus.put(y, gpu)

                moved = changed(call, move)
                if len([y for _, y in places(call) if y.dim() or data == HOST]) < 2:
                    continue
                found = opened(op_of(name)(**moved))
                assert gpus.launched == [], (name, place, data, alone)
                assert all(map(same, found, expected_of(name, call)))


@check
def another_gpu_than_the_current_one(gpus: FakeGpus) -> None:
    """The dispatcher's, because torch would make the results on the current one."""
    switched_on(gpus)
    for name, call in calls():
        if LAUNCHERS[name] == "pseudo_huber":
            continue
        gpus.clear()
        moved = changed(call, lambda _, x: gpus.put(x, OTHER))
        found = opened(op_of(name)(**moved))
        assert gpus.launched == []
        assert all(gpus.lies_on(x) == HOST for x in found if x is not moved.get("info")), name
        assert all(map(same, found, expected_of(name, call)))


@check
def who_watches(gpus: FakeGpus) -> None:
    switched_on(gpus)
    for name, call in dict(calls()).items():  # one call of each op
        for kind, context in CONTEXTS.items():
            if kind == "forward mode" and "overflow" in call:
                continue  # an error: nothing could record that it is written to
            gpus.clear()
            moved = changed(call, lambda _, x: gpus.put(x))
            with context():
                op_of(name)(**moved)
            assert gpus.launched == [], (name, kind)
    x = gpus.put(torch.ones(2, 3))
    torch.func.vmap(lambda y: bk.ddim_step(y[None], y[None], a=0.9, b=0.1))(x)
    assert gpus.launched == []


@check
def tensors_that_are_not_plain(gpus: FakeGpus) -> None:
    switched_on(gpus)
    x = torch.randn(2, 3, 5, 4)
    for kind, make in TENSORS.items():
        for name, step in STEPS.items():
            gpus.clear()
            step(make(gpus.put(x)), gpus.put(x))
            assert gpus.launched == [], (name, kind)
    with torch.no_grad():
        bk.ddim_step(gpus.put(x).requires_grad_(), gpus.put(x), a=0.9, b=0.1)
    assert gpus.launched == [("multistep", 0)]


@check
def what_fails(gpus: FakeGpus) -> None:
    """A launch or an allocation that fails is left to the dispatcher, and the next call is taken again."""
    switched_on(gpus)
    for name, call in calls():
        for fault in ("allocation", LAUNCHERS[name]):
            loss = LAUNCHERS[name] == "pseudo_huber"
            gpus.clear()
            gpus.fails = {fault}
            moved = changed(call, lambda _, x: gpus.put(x))
            found = opened(op_of(name)(**moved))
            assert loss or all(gpus.lies_on(x) == HOST for x in found if x is not moved.get("info"))
            assert all(map(same, found, expected_of(name, call))), (name, fault)
            assert len(gpus.launched) == (fault != "allocation" or loss)
            gpus.clear()
            op_of(name)(**changed(call, lambda _, x: gpus.put(x)))
            assert len(gpus.launched) == 1


@check
def other_threads_run(gpus: FakeGpus) -> None:
    """A launch may wait for room in the GPU's queue, which another thread may have to make."""
    import ctypes

    switched_on(gpus)
    holds = ctypes.cast(ctypes.pythonapi.PyGILState_Check, ctypes.c_void_p)
    gpus.library.ask_for_lock(holds)
    kind = dict(type(gpus.own)._fields_)["multistep"]
    gpus.own.multistep = ctypes.cast(gpus.library.launch_nothing, kind)
    x = gpus.put(torch.ones(2, 3))
    bk.ddim_step(x, x, a=0.9, b=0.1)
    assert gpus.library.was_held() == 0


@check
def all_tensors_are_released(gpus: FakeGpus) -> None:
    import sys

    switched_on(gpus)
    for name, call in calls():
        gpus.clear()
        moved = changed(call, lambda _, x: gpus.put(x))
        tensors = [x for x in tree_leaves(moved) if isinstance(x, Tensor)]
        op_of(name)(**moved)
        before = [sys.getrefcount(x) for x in tensors]
        for fault in ("", "", "allocation", LAUNCHERS[name]):
            gpus.fails = {fault}
            op_of(name)(**moved)
        assert [sys.getrefcount(x) for x in tensors] == before, name
