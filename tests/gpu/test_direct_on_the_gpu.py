"""Calls that bypass the dispatcher on a GPU, BICM_KERNELS_DIRECT=cuda: its bits, streams, devices, graphs, errors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from calls import CALLS, DTYPES, EXACT, NOT_DIRECT, SHAPES, Results, on_another_stream, some_op_took, states
from torch import Tensor

import bicm_kernels as bk
from bicm_kernels import backend
from tests.support.calls import CALLS as OP_CALLS
from tests.support.calls import EVERY, changed, op_of, opened, with_host_numbers
from tests.support.ways import CONTEXTS, LAYOUTS, TENSORS, Spy, Taken, long_way

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu

SameBits = Callable[[Tensor, Tensor], None]
IMAGES = (4, 3, 32, 32)
DRAWING = ("normal", "uniform")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[Taken]:
    """The calls that the library's functions are asked for, and whether they take them."""
    monkeypatch.setattr(backend, "_switch", "cuda")
    with backend.use("native"):
        assert backend.running("cuda") == "native", backend.describe()
        assert backend.cuda_is_direct, backend.describe()
        bk.scale_input(torch.ones(1, 1, device="cuda"), 0.0)  # looks for implementations
        calls: Taken = []
        monkeypatch.setattr(backend, "direct", Spy(calls))
        yield calls


def agree(actual: Results, expected: Results, same_bits: SameBits) -> None:
    for x, y in zip(actual, expected, strict=True):
        assert (x.device, x.stride()) == (y.device, y.stride())
        same_bits(x.cpu(), y.cpu())


def call_of(name: str, k: int, device: str) -> Callable[[], list[Tensor]]:
    """An op's call on a device, without tensors to write to but its notes, which are new every time."""
    call = {key: x for key, x in OP_CALLS[name][k].items() if key != "out"}
    where = {"device": device} if name in DRAWING else {}
    return lambda: opened(op_of(name)(**changed(call, lambda _, x: x.to(device, copy=True)), **where))


@pytest.mark.parametrize(("name", "k"), EVERY)
def test_every_op(taken: Taken, same_bits: SameBits, name: str, k: int) -> None:
    """Taken where the same call is taken on the CPU."""
    call_of(name, k, "cpu")()
    on_the_cpu = taken.copy()
    taken.clear()
    results = call_of(name, k, "cuda")()
    assert taken == on_the_cpu
    agree(results, long_way(call_of(name, k, "cuda")), same_bits)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_the_dispatchers_bits(
    taken: Taken, same_bits: SameBits, name: str, dtypes: tuple[torch.dtype, torch.dtype], shape: tuple[int, ...]
) -> None:
    inputs = states(shape, dtypes, "cuda")
    results = CALLS[name](inputs)
    assert some_op_took(taken) == (name not in NOT_DIRECT)
    agree(results, long_way(CALLS[name], inputs), same_bits)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(taken: Taken, same_bits: SameBits, layout: str) -> None:
    def step(x: Tensor, y: Tensor) -> Results:
        return tuple(bk.denoised_step([x, y], [1.2, -2.1], [0.3, 0.1], x0_weight=0.8, next_scale=0.6))

    given = [LAYOUTS[layout](x[:2, :, :5, :4].clone()) for x in states(IMAGES, DTYPES["mixed"], "cuda")[1:3]]
    results = step(*given)
    assert taken == [("denoised_step", True)]
    agree(results, long_way(step, *given), same_bits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "k"), EVERY)
def test_numbers_on_the_cpu(
    taken: Taken, same_bits: SameBits, request: pytest.FixtureRequest, name: str, k: int, dtype: torch.dtype
) -> None:
    given = {key: x for key, x in OP_CALLS[name][k].items() if key != "out"}
    call = with_host_numbers(given, dtype, lambda x: x.to("cuda"))

    def run() -> list[Tensor]:
        notes = changed(call, lambda at, x: x.clone() if "overflow" in at else x)
        return opened(op_of(name)(**notes, **({"device": "cuda"} if name in DRAWING else {})))

    expected = long_way(run)
    request.getfixturevalue("no_synchronisation")
    results = run()
    torch.cuda.set_sync_debug_mode("default")
    agree(tuple(results), tuple(expected), same_bits)


@pytest.mark.parametrize("name", CALLS)
def test_another_stream(taken: Taken, same_bits: SameBits, name: str) -> None:
    """The inputs come late: a launch on the wrong stream would read them too early."""
    inputs = states(IMAGES, DTYPES["float32"], "cuda")
    expected = long_way(CALLS[name], inputs)
    results = on_another_stream(CALLS[name], inputs)
    agree(results, expected, same_bits)


def test_memory_that_is_freed_is_not_taken_too_early(taken: Taken, same_bits: SameBits) -> None:
    """Results belong to the stream that they are made on: another one does not get their memory."""
    x = states(IMAGES, DTYPES["float32"], "cuda")[1]
    expected = bk.ddim_step(x, x, a=0.5, b=0.25)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        kept = bk.ddim_step(x, x, a=0.5, b=0.25)
        for _ in range(5):
            bk.ddim_step(x, x, a=7.0, b=7.0)
    others = [bk.ddim_step(x, x, a=9.0, b=9.0) for _ in range(5)]
    torch.cuda.synchronize()
    assert all(took for _, took in taken)
    same_bits(kept.cpu(), expected.cpu())
    for other in others:
        same_bits(other.cpu(), bk.ddim_step(x.cpu(), x.cpu(), a=9.0, b=9.0))


@pytest.mark.parametrize("name", [name for name in CALLS if name != "fold_in"])
def test_captured_and_replayed(taken: Taken, same_bits: SameBits, name: str) -> None:
    inputs = states(IMAGES, DTYPES["mixed"], "cuda")
    expected = long_way(CALLS[name], inputs)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        CALLS[name](inputs)
    torch.cuda.synchronize()
    before = len(taken)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = CALLS[name](inputs)
    assert taken[before:] == taken[:before]
    for _ in range(3):
        for x in captured:
            x.zero_()
        graph.replay()
        agree(captured, expected, same_bits)


def test_the_first_call_of_all_is_captured(taken: Taken, same_bits: SameBits) -> None:
    """With a key on the device, whose step advances between replays."""
    x, step = states(IMAGES, DTYPES["float32"], "cuda")[1], torch.zeros((), dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = bk.add_noise(x, 0.3, seed=5, step=step)
        step.add_(1)
    for k in range(3):
        graph.replay()
        same_bits(captured.cpu(), bk.add_noise(x.cpu(), 0.3, seed=5, step=k))
    assert taken[0] == ("add_noise", True)


@two_gpus
@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("name", CALLS)
def test_another_device(taken: Taken, same_bits: SameBits, name: str, current: int) -> None:
    """Taken on the current device alone, but for what writes to a given tensor; the right result on both."""
    expected = long_way(CALLS[name], states(IMAGES, DTYPES["float32"], "cuda:0"))
    with torch.cuda.device(current):
        results = CALLS[name](states(IMAGES, DTYPES["float32"], "cuda:1"))
        assert torch.cuda.current_device() == current
    for actual, wanted in zip(results, expected, strict=True):
        assert actual.device == torch.device("cuda:1")
        same_bits(actual.cpu(), wanted.cpu())
    if name in EXACT and name not in NOT_DIRECT:
        assert any(took for _, took in taken) == (current == 1 or name in DRAWING)


@two_gpus
def test_tensors_on_two_devices(taken: Taken) -> None:
    x = torch.ones(2, 3, device="cuda:0")
    with pytest.raises(ValueError, match="cuda"):
        bk.ddim_step(x, x.to("cuda:1"), a=0.5, b=1.0)
    assert not any(took for _, took in taken)


def test_a_tensor_on_the_cpu_is_an_error(taken: Taken) -> None:
    x = torch.ones(2, 3, device="cuda")
    for call in (
        lambda: bk.ddim_step(x, x.cpu(), a=0.5, b=1.0),
        lambda: bk.ddim_step(x.cpu(), x.cpu(), a=torch.tensor(0.5, device="cuda"), b=1.0),
        lambda: bk.noisy_pair(x, 0.5, 1.0, seed=1, step=0, x_hat=x, mask=torch.tensor([True, False])),
    ):
        with pytest.raises(ValueError, match=r"cpu|cuda|device"):
            call()
    assert not any(took for _, took in taken)


@pytest.mark.parametrize("kind", CONTEXTS)
def test_who_watches(taken: Taken, same_bits: SameBits, kind: str) -> None:
    x, y = states(IMAGES, DTYPES["float32"], "cuda")[1:3]
    context = nullcontext() if kind == "default device" else CONTEXTS[kind]()
    with torch.device("cuda") if kind == "default device" else context:
        results = bk.bdia_step(x, y, x, a=0.9, b=0.1, a_last=0.9, b_last=0.1)
    assert taken == [("bdia_step", False)]
    same_bits(results.cpu(), bk.bdia_step(*(z.cpu() for z in (x, y, x)), a=0.9, b=0.1, a_last=0.9, b_last=0.1))


@pytest.mark.parametrize("kind", [kind for kind in TENSORS if kind != "without memory"])
def test_tensors_that_are_not_plain(taken: Taken, kind: str) -> None:
    x = TENSORS[kind](torch.ones(2, 3, device="cuda"))
    bk.ddim_step(x, x, a=0.9, b=0.1)
    assert taken == [("ddim_step", False)]


def test_transforms_and_compiled_code(taken: Taken, same_bits: SameBits) -> None:
    def op(x: Tensor, y: Tensor) -> Tensor:
        return bk.ddim_step(x, y, a=0.9, b=0.1)

    x, y = states(IMAGES, DTYPES["float32"], "cuda")[1:3]
    plain = op(x, y)
    assert taken.pop() == ("ddim_step", True)
    same_bits(torch.func.vmap(op)(x[:, None], y[:, None])[:, 0].cpu(), plain.cpu())
    torch._dynamo.reset()
    same_bits(torch.compile(op, backend="aot_eager")(x, y).cpu(), plain.cpu())
    assert not any(took for _, took in taken)


def test_a_call_after_an_error(taken: Taken, same_bits: SameBits) -> None:
    x = states(IMAGES, DTYPES["float32"], "cuda")[1]
    endless = torch.zeros(1, 1, device="cuda").expand(1, 2**44)
    for wrong, error in (
        (lambda: bk.ddim_step(endless, endless, a=0.9, b=0.1), RuntimeError),
        (lambda: bk.ddim_step(x, x[:1], a=0.9, b=0.1), ValueError),
    ):
        with pytest.raises(error) as caught:
            wrong()
        with pytest.raises(error) as theirs:
            long_way(wrong)
        assert type(caught.value) is type(theirs.value)
        taken.clear()
        results = bk.ddim_step(x, x, a=0.9, b=0.1)
        assert taken == [("ddim_step", True)]
        same_bits(results.cpu(), bk.ddim_step(x.cpu(), x.cpu(), a=0.9, b=0.1))


def test_no_memory_is_left_behind(taken: Taken) -> None:
    inputs = states(IMAGES, DTYPES["float32"], "cuda")
    for _ in range(2):
        before = torch.cuda.memory_allocated()
        for call in CALLS.values():
            call(inputs)
    assert torch.cuda.memory_allocated() == before


def test_threads_with_their_own_streams(taken: Taken, same_bits: SameBits) -> None:
    x = states(IMAGES, DTYPES["float32"], "cuda")[1]
    results: dict[int, Tensor] = {}
    torch.cuda.synchronize()

    def run(k: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            z = x.clone()
            for i in range(200):
                z = bk.affine_step([z, x], [0.5, 0.1 * k], noise_weight=0.1, seed=k, step=i)
            results[k] = z
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(took for _, took in taken)
    for k, result in results.items():
        z: Any = x.cpu()
        for i in range(200):
            z = bk.affine_step([z, x.cpu()], [0.5, 0.1 * k], noise_weight=0.1, seed=k, step=i)
        same_bits(result.cpu(), z)
