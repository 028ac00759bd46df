"""Training objectives, one module a method: plain functions of a network, a batch and its levels, on fused ops."""

from bicm_diffusion.consistency.objective import BctLoss, bct_loss
from bicm_diffusion.objectives.denoising import denoising_loss, draw_denoising_levels
from bicm_diffusion.objectives.ect import draw_ect_times, ect_loss, ect_partner
from bicm_diffusion.objectives.evaluation import Loss
from bicm_diffusion.objectives.ict import ict_loss

__all__ = [
    "BctLoss",
    "Loss",
    "bct_loss",
    "denoising_loss",
    "draw_denoising_levels",
    "draw_ect_times",
    "ect_loss",
    "ect_partner",
    "ict_loss",
]
