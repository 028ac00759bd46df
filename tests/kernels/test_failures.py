"""What fails for another reason than its arguments is no ValueError: CUDA's errors, sticky ones too, and no memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import bicm_kernels as bk
from tests.support.calls import CALLS, X, Y, changed, op_of
from tests.support.torch_versions import since

# As the kernels raise them: what crosses the stable ABI is a RuntimeError, whatever torch had raised.
ILLEGAL = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported"
NO_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB"
FAILURES: dict[str, tuple[Exception, type[Exception]]] = {
    "sticky": (RuntimeError(ILLEGAL), RuntimeError),
    "accelerator": (torch.AcceleratorError(ILLEGAL, 700), torch.AcceleratorError),
    "launch": (RuntimeError("CUDA error: too many resources requested for launch"), RuntimeError),
    "memory": (torch.OutOfMemoryError(NO_MEMORY), torch.OutOfMemoryError),
    "memory, across the ABI": (RuntimeError(NO_MEMORY), torch.OutOfMemoryError),
}


class Failing(TorchDispatchMode):
    """Every kernel raises."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "bicm_kernels":
            raise self.error
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("name", CALLS)
def test_every_op(name: str, failure: str) -> None:
    error, kind = FAILURES[failure]
    for call in CALLS[name]:
        with pytest.raises(kind) as raised, Failing(error):
            op_of(name)(**changed(call, lambda _, x: x.clone()))
        assert type(raised.value) is kind
        assert str(raised.value) == str(error)


LOSSES = {
    "scale_input": lambda x, y: bk.scale_input(x, 0.5),
    "denoise": lambda x, y: bk.denoise(x, y, 0.5, 0.1),
    "add_noise": lambda x, y: bk.add_noise(x, 0.5, seed=1),
    "noisy_pair": lambda x, y: bk.noisy_pair(x, 0.5, 1.0, seed=1, step=2)[0],
    "pseudo_huber": lambda x, y: bk.pseudo_huber(x, y, gradient="backward"),
    "pseudo_huber, kept": lambda x, y: 0.3 * bk.pseudo_huber(x, y),
    "consistency_loss": lambda x, y: bk.consistency_loss(x, y, 0.5, 0.1, y, gradient="backward"),
    "consistency_loss, kept": lambda x, y: 0.3 * bk.consistency_loss(x, y, 0.5, 0.1, y, gradient="forward"),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("name", LOSSES)
def test_every_derivative(name: str, failure: str) -> None:
    error, kind = FAILURES[failure]
    inputs = [x.clone().requires_grad_() for x in (X, Y)]
    value = LOSSES[name](*inputs).sum()
    with pytest.raises(kind) as raised, Failing(error):
        value.backward()
    assert type(raised.value) is kind


def test_a_check_of_the_kernels_is_a_value_error() -> None:
    refused = RuntimeError("merge, csrc/torch/tensors.cpp:1, bicm_kernels: more than 8 dimensions")
    with pytest.raises(ValueError, match=r"^more than 8 dimensions$"), Failing(refused):
        bk.ddim_step(X, Y, a=1.0, b=0.5)


@since("2.13", "its stable ABI returns a number instead of the reason")
def test_torch_gives_its_reason_across_the_stable_abi() -> None:
    huge = torch.zeros(1, 1).expand(2**24, 2**24)
    with pytest.raises(RuntimeError, match="can't allocate memory") as raised:
        bk.ddim_step(huge, huge, a=1.0, b=0.5)
    assert type(raised.value) is RuntimeError


def test_cuda_s_errors_are_given_in_torch_s_words() -> None:
    """The binding's own words would say that an argument is wrong."""
    text = (Path(__file__).parents[2] / "csrc" / "torch" / "cuda" / "cuda.h").read_text()
    assert "STD_CUDA_CHECK(launch" in text
    assert "bicm_kernels: " not in text


def test_wrong_arguments_stay_wrong_where_kernels_fail() -> None:
    x: Tensor = X[:2]
    with pytest.raises(ValueError, match="eps must have the shape of z"), Failing(RuntimeError(ILLEGAL)):
        bk.ddim_step(X, x, a=1.0, b=0.5)
