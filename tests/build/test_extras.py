"""Without the extras: what imports all the same, and what an ImportError says to install."""

from __future__ import annotations

import os
import subprocess
import tempfile
import textwrap
from pathlib import Path

import pytest

from bicm_diffusion.extras import extra
from tests.support import fresh

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = (
    *("PIL", "click", "deepinv", "diffusers", "matplotlib", "rich", "safetensors", "scipy", "sklearn", "tensorboard"),
    "tqdm",
)

BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
for name in [*sys.modules]:
    if name.split(".")[0] in {blocked!r}:
        del sys.modules[name]
"""


def run(code: str, *blocked: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process that cannot import some packages."""
    program = f"{BLOCK.format(blocked=set(blocked))}\n{textwrap.dedent(code)}"
    with tempfile.TemporaryDirectory() as directory:
        return fresh.run(program, os.environ, Path(directory), [str(ROOT), str(ROOT / "python")])


@pytest.mark.slow
def test_the_packages_import_and_sample_without_extras() -> None:
    ran = run(
        """
        import torch, bicm_diffusion, bicm_diffusion.distributed, bicm_diffusion.objectives, bicm_diffusion.train
        from bicm_diffusion.adapters import consistency_models, deepinv, edm, k_diffusion
        print(bicm_diffusion.ddim_sample(lambda z, times: z, torch.ones(2, 3), bicm_diffusion.vp_schedule(4)).shape)
        """,
        *EXTRAS,
    )
    assert ran.returncode == 0, ran.stderr
    assert "torch.Size([2, 3])" in ran.stdout


SHARDS = "sample_shards(lambda shard: torch.ones(shard.batch, 1, 2, 2), 2, sys.argv[0] + '.d', batch=2, settings={}"
TRAIN = """
        import sys, torch
        from torch.utils.data import TensorDataset
        from bicm_diffusion.objectives import denoising_loss
        from bicm_diffusion.train import TrainingOptions, train
        class Network(torch.nn.Linear):
            def forward(self, scaled, t):
                return super().forward(scaled)
        def loss(network, batch, step):
            return denoising_loss(network, batch[0], torch.ones(1), **step.key)
        train(Network(2, 2), TensorDataset(torch.ones(1, 2)), loss, TrainingOptions(steps=1, batch_size=1), {})
        """
CALLS = {
    "a run's checkpoint": ("safetensors", "diffusion", TRAIN.format("checkpoint=sys.argv[0] + '.safetensors'")),
    "a sampler's bar": (
        "tqdm",
        "diffusion",
        """
        import torch, bicm_diffusion
        bicm_diffusion.ddim_sample(lambda z, t: z, torch.ones(2, 3), bicm_diffusion.vp_schedule(4), progress=True)
        """,
    ),
    "a consistency sampler's bar": (
        "tqdm",
        "diffusion",
        """
        import torch, bicm_diffusion
        down = bicm_diffusion.ConsistencySchedule((80.0,))
        bicm_diffusion.consistency_sample(lambda x, t, u: x, torch.ones(2, 3), down, progress=True)
        """,
    ),
    "k-diffusion's bar": (
        "tqdm",
        "diffusion",
        """
        import torch
        from bicm_diffusion.adapters.k_diffusion import sample_euler
        sample_euler(lambda x, sigma: x, torch.ones(2, 3), torch.tensor([1.0, 0.0]))
        """,
    ),
    "batch-OT": (
        "scipy",
        "diffusion",
        "import torch; from bicm_diffusion.objectives import *; optimal_pairing(torch.ones(2, 3), seed=0, step=0)",
    ),
    "diffusers": ("diffusers", "diffusers", "import bicm_diffusion.adapters.diffusers"),
    "a diffusers scheduler": ("diffusers", "diffusers", "import bicm_diffusion.adapters.diffusers.bdia"),
    "shards": ("safetensors", "diffusion", f"from bicm_diffusion.distributed import *; import torch; {SHARDS})"),
    "images": ("PIL", "diffusion", f"from bicm_diffusion.distributed import *; import torch; {SHARDS}, save_as='png')"),
    "the bar of shards": ("tqdm", "diffusion", f"from bicm_diffusion.distributed import *; import torch; {SHARDS})"),
    **{
        f"the digits, {module}": (module, "diffusion", "import runpy; runpy.run_module('examples.digits')")
        for module in ("click", "rich", "safetensors", "sklearn", "tqdm")
    },
    "the digits' pictures": ("matplotlib", "diffusion", "import examples.digits.demo"),
}


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_a_missing_package_names_its_extra(call: str) -> None:
    module, name, code = CALLS[call]
    ran = run(code, module)
    assert ran.returncode == 1
    error = ran.stderr.strip().splitlines()[-1]
    assert error.startswith(f"ModuleNotFoundError: No module named '{module}")
    assert f'pip install "bicm-kernels[{name}]"' in error


@pytest.mark.slow
def test_shards_ask_for_their_library_before_the_first_batch(tmp_path: Path) -> None:
    code = """
    from bicm_diffusion.distributed import sample_shards
    def sample(shard):
        print("made")
    sample_shards(sample, 2, {directory!r}, batch=2, settings={{}}, save_as={save_as!r}, progress={progress})
    """
    for module, save_as, progress in (("safetensors", "safetensors", 0), ("PIL", "png", 0), ("tqdm", "png", 1)):
        directory = tmp_path / module
        ran = run(code.format(directory=str(directory), save_as=save_as, progress=progress), module)
        assert ran.returncode == 1 and "made" not in ran.stdout and not directory.exists()


def test_an_error_that_names_no_module_keeps_its_type_and_cause() -> None:
    old = ImportError("cannot import name 'X' from 'diffusers'")
    with (
        pytest.raises(
            ImportError, match=r"cannot import name 'X'.*: pip install \"bicm-kernels\[diffusers\]\""
        ) as found,
        extra("diffusers"),
    ):
        raise old
    assert type(found.value) is ImportError and found.value.__cause__ is old
