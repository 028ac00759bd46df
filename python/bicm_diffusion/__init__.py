"""Schedules, samplers and training objectives for diffusion models, built on the fused ops of `bicm_kernels`."""

from bicm_diffusion.consistency import (
    PRESETS,
    BctLoss,
    ConsistencySchedule,
    Levels,
    LevelTable,
    bct_loss,
    discretization,
    draw_levels,
    karras_levels,
    level_probabilities,
    partner_probabilities,
)
from bicm_diffusion.ema import update_average
from bicm_diffusion.interpolation import slerp
from bicm_diffusion.samplers import (
    LeapInfo,
    StatePair,
    StepInfo,
    bdia_invert,
    bdia_sample,
    consistency_invert,
    consistency_sample,
    ddim_invert,
    ddim_sample,
    multistep_sample,
)
from bicm_diffusion.schedules import Schedule, vp_alpha_sigma, vp_schedule

__all__ = [
    "PRESETS",
    "BctLoss",
    "ConsistencySchedule",
    "LeapInfo",
    "LevelTable",
    "Levels",
    "Schedule",
    "StatePair",
    "StepInfo",
    "bct_loss",
    "bdia_invert",
    "bdia_sample",
    "consistency_invert",
    "consistency_sample",
    "ddim_invert",
    "ddim_sample",
    "discretization",
    "draw_levels",
    "karras_levels",
    "level_probabilities",
    "multistep_sample",
    "partner_probabilities",
    "slerp",
    "update_average",
    "vp_alpha_sigma",
    "vp_schedule",
]
