"""What `python -m benchmarks` measures where no family is named: the rows by which a user decides."""

from __future__ import annotations

from benchmarks.cases import Case

#: Peers' packages beside their adapters, the papers' formulas beside our launches, whole training losses.
ROWS: dict[str, tuple[str, ...]] = {
    "peers": (
        *("diffusers_ddim", "diffusers_euler", "diffusers_flow_euler", "diffusers_dpmpp_2m"),
        *("k_euler", "k_heun", "k_dpmpp_2m", "edm_heun", "edm_loss"),
    ),
    "samplers": ("sampler_ddim", "sampler_bdia", "sampler_bdia_guided", "sampler_edict", "sampler_euler_raw"),
    "preconditioning": ("denoise", "renoise"),
    "consistency": ("bct_loss",),
    "objectives": ("ict_loss", "gc_loss", "ect_loss"),
    "idempotent": ("ign_loss", "sign_loss"),
}


def present(chosen: list[tuple[str, Case]]) -> tuple[list[tuple[str, Case]], list[str]]:
    """The cases whose packages are installed, and the others: a line for each package."""
    absent: dict[str, list[str]] = {}
    for _, case in chosen:
        if not case.installed:
            absent.setdefault(case.package, []).append(case.name)
    lines = [f"{package} is not installed: without {', '.join(names)}" for package, names in absent.items()]
    return [(family, case) for family, case in chosen if case.installed], lines
