"""Whether both packages come from one place: an installation, or one source tree."""

from __future__ import annotations

import warnings
from pathlib import Path

import bicm_kernels


def warn_of_a_mix(diffusion: Path, kernels: Path) -> None:
    """Warn where the two packages are in neither one folder nor one source tree.

    It happens in a clone's root with the package installed: Python searches the working directory first, where
    bicm_kernels is, and finds bicm_diffusion among the installed packages.
    """
    home, base = diffusion.parent, kernels.parent
    if home in (base, base / "python"):
        return
    warnings.warn(
        f"two copies are mixed: bicm_diffusion is {diffusion}, but bicm_kernels is {kernels}. Python searches the "
        "working directory and PYTHONPATH first: leave that directory to use the installed package, or install the "
        "source tree with `pip install -e .` to use that",
        stacklevel=4,
    )


def check() -> None:
    """Warn where the packages that are imported are of different copies."""
    folders = (Path(file).resolve().parent for file in (__file__, bicm_kernels.__file__))
    warn_of_a_mix(*folders)
