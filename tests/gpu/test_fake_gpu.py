"""Calls and whole loops on tensors of a GPU that is not there: all results lie on it, and nothing asks it for a number.

PyTorch's fake tensors have a device and no values: whatever would wait for a GPU raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, unset_fake_temporarily

pytest.importorskip("diffusers", reason="needs the extra [diffusers]")

from calls import DTYPES, EXACT
from loops import FLOATS, opened

from bicm_kernels import backend
from tests.support import calls
from tests.support.diffusers_cases import CASES, Case, model_input, name_of, pair
from tests.support.gpu_comparison import WITH_NUMBERS

GPU = torch.device("cuda", 0)
#: Without a GPU no derivative is recorded on its tensors, and no part of them is taken.
CALLS = {name: call for name, call in EXACT.items() if name not in ("denoise backward", "every second")}
#: A level's place in the grid is told by where it lies, which is nowhere here.
LOOPS = {name: loop for name, loop in FLOATS.items() if name != "k-diffusion euler"}


@pytest.fixture
def fake() -> Iterator[Callable[..., Tensor]]:
    """A tensor on the GPU."""
    with backend.use("auto"), FakeTensorMode(allow_non_fake_inputs=True):
        yield lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=GPU)


@pytest.fixture(params=["auto", "triton"])
def each_fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU, and one whose Triton is forced: ops on the CPU raise there."""
    if request.param == "triton":
        pytest.importorskip("triton")
        monkeypatch.setattr(backend, "_devices", lambda: ["cpu", "cuda"])
    with backend.use(request.param), FakeTensorMode(allow_non_fake_inputs=True):
        yield


def on_the_gpu(results: Any) -> bool:
    return all(x.device == GPU for x in results)


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_calls(fake: Callable[..., Tensor], name: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    states = [fake(3, 67, dtype=dtype) for dtype in (dtypes[0], dtypes[0], dtypes[1], dtypes[1])]
    assert on_the_gpu(CALLS[name](states))


@pytest.mark.parametrize(("name", "k"), WITH_NUMBERS)
@pytest.mark.usefixtures("each_fake")
def test_numbers_on_the_cpu(name: str, k: int) -> None:
    call = calls.with_host_numbers(calls.CALLS[name][k], torch.float16, lambda x: x.to(GPU))
    where = {"device": GPU} if name in ("normal", "uniform") else {}
    assert on_the_gpu(calls.opened(calls.op_of(name)(**call, **where)))


@pytest.mark.parametrize("name", LOOPS)
def test_loops(fake: Callable[..., Tensor], name: str) -> None:
    assert on_the_gpu(opened(LOOPS[name](fake(3, 4, 8, 8))))


def test_waiting_is_seen(fake: Callable[..., Tensor]) -> None:
    with pytest.raises(DataDependentOutputException):
        fake(1).item()


@pytest.mark.parametrize("noise", ["generator", "keyed"])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_accelerated_schedulers(fake: Callable[..., Tensor], case: Case, noise: str) -> None:
    with unset_fake_temporarily():
        ours = pair(case, noise=noise)[1]
        timesteps = list(ours.timesteps)
    x = fake(2, 4, 8, 8)
    for t in timesteps:
        results = ours.step(model_input(ours, x, t).tanh(), t, x, return_dict=False, **case[2])
        assert on_the_gpu(results)
        x = results[0]
