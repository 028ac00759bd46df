"""Noise schedules: the levels z = alpha·x + sigma·n of a sampler, as float64 tables."""

from bicm_diffusion.schedules.ddpm import Betas, Spacing, ddpm_alpha_bar, ddpm_schedule, ddpm_timesteps
from bicm_diffusion.schedules.flow import flow_schedule
from bicm_diffusion.schedules.karras import karras_levels, karras_schedule
from bicm_diffusion.schedules.schedule import Schedule, to_ve, to_vp
from bicm_diffusion.schedules.vp import vp_alpha_sigma, vp_schedule, vp_time

__all__ = [
    "Betas",
    "Schedule",
    "Spacing",
    "ddpm_alpha_bar",
    "ddpm_schedule",
    "ddpm_timesteps",
    "flow_schedule",
    "karras_levels",
    "karras_schedule",
    "to_ve",
    "to_vp",
    "vp_alpha_sigma",
    "vp_schedule",
    "vp_time",
]
