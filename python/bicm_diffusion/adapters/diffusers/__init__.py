"""Schedulers for diffusers: accelerated forms, and BDIA on DDIM and flows. Needs the extra `[diffusers]`."""

from bicm_diffusion.extras import extra

with extra("diffusers"):
    # Loading a pipeline looks up a component's base class in the component's own module.
    from diffusers import SchedulerMixin as SchedulerMixin

from bicm_diffusion.adapters.diffusers.accelerate import accelerate_scheduler, accelerated_class, is_accelerated
from bicm_diffusion.adapters.diffusers.bdia import BDIADDIMScheduler
from bicm_diffusion.adapters.diffusers.bdia_flow import BDIAFlowMatchScheduler
from bicm_diffusion.adapters.diffusers.bridge import from_diffusers

__all__ = [
    "BDIADDIMScheduler",
    "BDIAFlowMatchScheduler",
    "accelerate_scheduler",
    "accelerated_class",
    "from_diffusers",
    "is_accelerated",
]
