"""Public functions: that they exist, are described, and have the reference's signatures."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from pathlib import Path
from typing import Any

import pytest

import bicm_kernels as bk

KERNELS = Path(bk.__file__).parent


def public_functions() -> list[tuple[str, Any]]:
    found = [(name, getattr(bk, name)) for name in bk.__all__]
    return [(name, value) for name, value in found if inspect.isfunction(value)]


def test_public_names_exist() -> None:
    assert set(bk.__all__) <= set(dir(bk))
    assert bk.__all__ == sorted(bk.__all__, key=lambda name: (not name.isupper(), name))
    expected = (
        "affine_step denoised_step ddim_step bdia_step bdia_inverse_step normal uniform fold_in add_noise noisy_pair "
        "scale_input denoise renoise pseudo_huber consistency_loss fixed_point_encode fixed_point_decode "
        "exact_affine_step exact_affine_inverse_step bdia_exact_step bdia_exact_inverse_step torch_randn "
        "gaussian_step gaussian_log_prob gaussian_kl"
    )
    assert {name for name, _ in public_functions()} == set(expected.split())
    for module in pkgutil.walk_packages([str(KERNELS / "reference"), str(KERNELS / "ops")]):
        assert not module.name.startswith("_")


@pytest.mark.parametrize(("name", "function"), public_functions())
def test_public_docstrings(name: str, function: Any) -> None:
    text = inspect.getdoc(function) or ""
    assert text.splitlines()[0].endswith(".")
    assert ">>> " in text, "no example"
    assert "Raises:" in text
    signature = inspect.signature(function)
    if "with the same arguments" in text:
        text += inspect.getdoc(bk.normal) or ""
    for parameter in signature.parameters:
        assert parameter in text, f"{name}: {parameter} is not described"
    assert all(value.annotation is not inspect.Parameter.empty for value in signature.parameters.values())


def test_ops_and_references_share_their_signatures() -> None:
    """An argument that one side lacks would fail only where that side runs; `gradient` is a matter of kernels alone."""
    for name, function in public_functions():
        ours = inspect.signature(function).parameters
        plain = inspect.signature(getattr(bk.reference, name)).parameters
        assert [key for key in ours if key not in ("out", "gradient")] == list(plain), name
        assert all(
            ours[key].default == value.default and ours[key].kind == value.kind for key, value in plain.items()
        ), name


def test_every_module_says_what_it_is() -> None:
    for package in ("bicm_kernels.ops", "bicm_kernels.reference"):
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__, package + "."):
            assert importlib.import_module(module.name).__doc__, module.name
