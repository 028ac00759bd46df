"""The names that `import bicm_diffusion` gives: subpackages on first use, without what they need before it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import bicm_diffusion
from bicm_diffusion import adapters, inverse
from tests.support import fresh

ROOT = Path(__file__).resolve().parents[2]
LAZY = ("adapters", "distributed", "policy", "train")
SOLVERS = ("cm_inversion_sample", "cm_posterior_sample", "dps_sample", "freedom_sample", "lgd_sample", "mpgd_sample")


@pytest.mark.parametrize("package", [bicm_diffusion, adapters], ids=lambda package: package.__name__)
def test_names_are_listed_and_others_are_no_attributes(package: Any) -> None:
    names = LAZY if package is bicm_diffusion else ("consistency_models", "deepinv", "diffusers", "edm", "k_diffusion")
    assert {*names, *vars(package)} == set(dir(package))
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'polcy'"):
        _ = package.polcy
    assert not hasattr(package, "__wrapped__")


def test_inverse_solvers_are_public_where_samplers_are() -> None:
    assert set(SOLVERS) <= set(bicm_diffusion.__all__) and bicm_diffusion.inverse is inverse
    assert all(getattr(bicm_diffusion, name) is getattr(inverse, name) for name in SOLVERS)


@pytest.mark.slow
def test_subpackages_are_imported_on_first_use(tmp_path: Path) -> None:
    program = f"""
import inspect, sys, torch
before = set(sys.modules)  # torch's own: it imports tqdm where that is installed
import bicm_diffusion as bd
lazy = {LAZY!r}
assert not [name for name in lazy if "bicm_diffusion." + name in sys.modules]
assert set(lazy) <= set(dir(bd))
assert not {{"diffusers", "safetensors", "scipy", "tqdm"}} & (set(sys.modules) - before)
for name in (*lazy, "consistency", "inverse", "objectives", "samplers", "schedules"):
    assert getattr(bd, name) is sys.modules["bicm_diffusion." + name]
assert bd.adapters.edm.edm_sampler and bd.adapters.k_diffusion.sample_euler and bd.adapters.deepinv.operator
assert "diffusers" not in sys.modules
sys.modules["diffusers"] = None
try:
    import bicm_diffusion.adapters.diffusers
except ModuleNotFoundError as error:
    print(error)
assert not hasattr(bd.adapters, "diffusers")
inspect.getmembers(bd.adapters)
try:
    bd.adapters.diffusers
except AttributeError as error:
    print(error)
"""
    ran = fresh.run(program, os.environ, tmp_path, [str(ROOT), str(ROOT / "python")])
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count('pip install "bicm-kernels[diffusers]"') == 2
