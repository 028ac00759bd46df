"""Training objectives, one module per method: plain functions of a network, a batch and its levels, on fused ops."""

from bicm_diffusion.objectives.bct import BctLoss, bct_loss
from bicm_diffusion.objectives.cd import cd_loss
from bicm_diffusion.objectives.denoising import denoising_loss, draw_denoising_levels
from bicm_diffusion.objectives.diagnostics import transport_cost, transport_cost_derivative, velocity_variance
from bicm_diffusion.objectives.ect import draw_ect_times, ect_loss, ect_partner
from bicm_diffusion.objectives.evaluation import Loss
from bicm_diffusion.objectives.gc import gc_loss
from bicm_diffusion.objectives.ict import ict_loss
from bicm_diffusion.objectives.idempotent import ign_loss, sign_loss
from bicm_diffusion.objectives.pairing import optimal_pairing

__all__ = [
    "BctLoss",
    "Loss",
    "bct_loss",
    "cd_loss",
    "denoising_loss",
    "draw_denoising_levels",
    "draw_ect_times",
    "ect_loss",
    "ect_partner",
    "gc_loss",
    "ict_loss",
    "ign_loss",
    "optimal_pairing",
    "sign_loss",
    "transport_cost",
    "transport_cost_derivative",
    "velocity_variance",
]
