"""Schedulers for diffusers: accelerated forms of its own, and BDIA-DDIM as one more. Needs the extra `[diffusers]`."""

from bicm_diffusion.adapters.diffusers.accelerate import accelerate_scheduler, accelerated_class
from bicm_diffusion.adapters.diffusers.bdia import BDIADDIMScheduler

__all__ = ["BDIADDIMScheduler", "accelerate_scheduler", "accelerated_class"]
