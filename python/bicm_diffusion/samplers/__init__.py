"""Samplers and their inversions, one module per method; `loop` documents the arguments that all of them share."""

from bicm_diffusion.samplers.bdia import StatePair, bdia_invert, bdia_sample
from bicm_diffusion.samplers.consistency import LeapInfo, consistency_invert, consistency_sample, multistep_sample
from bicm_diffusion.samplers.ddim import ddim_invert, ddim_sample
from bicm_diffusion.samplers.loop import StepInfo

__all__ = [
    "LeapInfo",
    "StatePair",
    "StepInfo",
    "bdia_invert",
    "bdia_sample",
    "consistency_invert",
    "consistency_sample",
    "ddim_invert",
    "ddim_sample",
    "multistep_sample",
]
