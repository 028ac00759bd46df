"""Schedules and samplers for diffusion models, built on the fused ops of `bicm_kernels`."""

from bicm_diffusion.consistency import PRESETS, ConsistencySchedule
from bicm_diffusion.interpolation import slerp
from bicm_diffusion.samplers import (
    StatePair,
    StepInfo,
    bdia_invert,
    bdia_sample,
    ddim_invert,
    ddim_sample,
)
from bicm_diffusion.schedules import Schedule, vp_alpha_sigma, vp_schedule

__all__ = [
    "Schedule",
    "StatePair",
    "StepInfo",
    "bdia_invert",
    "bdia_sample",
    "ddim_invert",
    "ddim_sample",
    "vp_alpha_sigma",
    "vp_schedule",
]
