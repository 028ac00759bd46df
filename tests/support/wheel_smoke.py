"""What `make wheel` runs in an environment of torch, NumPy and the wheel: the native library, and its bits.

Started by its path in isolated mode, so that neither this checkout nor a compiler can be found.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

import bicm_diffusion
import bicm_kernels as bk
from bicm_kernels import backend

CHECKOUT = Path(__file__).resolve().parents[2]


def results() -> list[torch.Tensor]:
    x = torch.linspace(-3, 3, 2 * 40_000).reshape(2, -1)
    eps, pair = x.sin(), bk.noisy_pair(x, 0.5, 0.7, seed=1, step=0)
    schedule = bicm_diffusion.ddpm_schedule(4)
    exact = bicm_diffusion.bdia_sample(lambda z, t: 0.5 * z, x[:, :100], schedule)
    return [
        bk.normal((2, 41), seed=1, dtype=torch.bfloat16),
        bk.ddim_step(x, eps, a=0.98, b=0.03),
        bk.denoised_step([x, eps], [0.9, -0.1], [0.3, 0.4], x0_weight=0.5, clip=1.0)[0],
        *pair,
        exact.q,
    ]


def main() -> None:
    assert CHECKOUT not in Path(bk.__file__).resolve().parents or "site-packages" in bk.__file__, bk.__file__
    assert not [name for name in ("c++", "g++", "clang++", "cc") if shutil.which(name)]
    print(f"torch {torch.__version__}; {backend.describe()}")
    assert backend.running("cpu") == "native"
    native = results()
    with backend.use("reference"):
        assert all(torch.equal(a, b) for a, b in zip(native, results(), strict=True))
    x = torch.ones(2, 3, requires_grad=True)
    bk.pseudo_huber(x, torch.zeros(2, 3), c=0.1).backward()
    assert x.grad is not None and bool((x.grad > 0).all())
    compiled = torch.compile(lambda x: bk.ddim_step(x, x, a=0.5, b=0.25), fullgraph=True, backend="eager")
    assert torch.equal(compiled(native[1]), 0.75 * native[1])


if __name__ == "__main__":
    main()
