"""Diffusion inverse solvers: samples x0 of a model with operator(x0) near a measurement y (CM-DIS)."""

from bicm_diffusion.inverse.ancestral import SolverOptions
from bicm_diffusion.inverse.consistency import cm_inversion_sample, cm_posterior_sample
from bicm_diffusion.inverse.operators import Blur, Downsample, Mask, gaussian_weights
from bicm_diffusion.inverse.posterior_mean import dps_sample, freedom_sample, lgd_sample, mpgd_sample

__all__ = [
    "Blur",
    "Downsample",
    "Mask",
    "SolverOptions",
    "cm_inversion_sample",
    "cm_posterior_sample",
    "dps_sample",
    "freedom_sample",
    "gaussian_weights",
    "lgd_sample",
    "mpgd_sample",
]
