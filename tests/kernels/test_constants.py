"""Numbers that become tensors are kept: nothing that a caller does may be seen in another call."""

from __future__ import annotations

import torch
from torch._subclasses import FakeTensorMode

import bicm_kernels as bk
from bicm_kernels.ops import arguments


def levels(value: float) -> torch.Tensor:
    """A denoised sample whose sigma_data is a number beside a tensor of levels."""
    return bk.denoise(torch.ones(2, 3), torch.ones(2, 3), torch.full((2,), 2.0), 1.0, sigma_data=value)


def test_a_number_is_made_once() -> None:
    assert arguments.coefficient(0.1171875) is arguments.coefficient(0.1171875)


def test_zeros_keep_their_sign() -> None:
    first, second = arguments.coefficient(0.0), arguments.coefficient(-0.0)
    assert not torch.signbit(first)
    assert torch.signbit(second)


def test_an_integer_is_not_taken_for_a_float() -> None:
    assert arguments.coefficient(7).dtype == torch.float64
    assert arguments.integer(7).dtype == torch.int64


def test_fake_tensors_do_not_stay_behind() -> None:
    with FakeTensorMode():
        assert levels(0.3046875).shape == (2, 3)
    assert torch.equal(levels(0.3046875), bk.reference.denoise(*[torch.ones(2, 3)] * 2, 2.0, 1.0, sigma_data=0.3046875))


def test_a_number_met_in_inference_mode_serves_a_backward_pass() -> None:
    with torch.inference_mode():
        levels(0.4140625)
    x = torch.ones(2, 3, requires_grad=True)
    bk.denoise(x, torch.ones(2, 3), torch.full((2,), 2.0), 1.0, sigma_data=0.4140625).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_another_default_device_or_dtype_changes_nothing() -> None:
    expected = levels(0.2265625)
    arguments._kept_float.cache_clear()
    with torch.device("meta"):
        number = arguments.coefficient(0.2265625)
    assert number.device.type == "cpu"
    assert number.dtype == torch.float64
    assert torch.equal(levels(0.2265625), expected)
