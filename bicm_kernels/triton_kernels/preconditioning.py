"""Preconditioning: sampler updates whose weights depend on noise levels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bicm_kernels.triton_kernels.checks import Integer, Number
from bicm_kernels.triton_kernels.multistep import launch_multistep, noise_arguments


def form_of(cm: bool, scaled: bool = False) -> str:
    """The form that chooses the weights."""
    return ("cm" if cm else "bcm") + ("_scaled" if scaled else "")


def scale_input(x: Tensor, t: Number | None, sigma_data: Number | None) -> Tensor:
    """c_in(t) x."""
    out = torch.empty_like(x)
    launch_multistep((out,), [x], given(t, sigma_data), form="input")
    return out


def denoise(
    x: Tensor, F: Tensor, t: Number | None, u: Number | None, sigma_data: Number | None, cm: bool, scaled: bool
) -> Tensor:
    """c_skip x + c_out F."""
    out = torch.empty_like(x)
    launch_multistep((out,), [x, F], given(t, u, sigma_data), form=form_of(cm, scaled))
    return out


def denoise_gradient(
    gradient: Tensor,
    t: Number | None,
    u: Number | None,
    sigma_data: Number | None,
    cm: bool,
    scaled: bool,
    in_F: bool,
    dtype: torch.dtype,
) -> Tensor:
    """c_skip times the incoming gradient, or c_out times it: the derivative in x or in F."""
    out = gradient.new_empty(gradient.shape, dtype=dtype)
    numbers = given(t, u, sigma_data)
    launch_multistep((out,), [gradient], numbers, form=form_of(cm, scaled), derivative="F" if in_F else "x")
    return out


def renoise(
    x: Tensor,
    F: Tensor,
    t: Number | None,
    u: Number | None,
    sigma: Number | None,
    next_sigma: Number | None,
    sigma_data: Number | None,
    cm: bool,
    seed: Integer | None,
    step: Integer | None,
    sample_id: Integer | None,
) -> tuple[Tensor, Tensor]:
    """x_s = c_skip x + c_out F + sigma n, and c_in(next_sigma) x_s."""
    outs = torch.empty_like(x), torch.empty_like(x)
    launch_multistep(
        outs,
        [x, F],
        given(t, u, sigma_data),
        form=form_of(cm),
        next_scale=given(next_sigma)[0],
        next_scale_is_sigma=True,
        **noise_arguments(sigma, seed, step, sample_id),
    )
    return outs


def given(*numbers: Number | None) -> list[Number]:
    """Omitted numbers are 0, as in the native library."""
    return [0.0 if x is None else x for x in numbers]


def implementations() -> dict[str, Callable[..., Any]]:
    """Every overload of the family by the name of its schema."""
    found: dict[str, Callable[..., Any]] = {"denoise_gradient": denoise_gradient}
    for name, function in (("scale_input", scale_input), ("denoise", denoise), ("renoise", renoise)):
        found |= {name: function, f"{name}.tensor": function}
    return found
