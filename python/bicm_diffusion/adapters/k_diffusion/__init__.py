"""Samplers, denoisers and noise samplers with k-diffusion's signatures."""

from bicm_diffusion.adapters.k_diffusion.denoisers import Denoiser, EDMDenoiser
from bicm_diffusion.adapters.k_diffusion.noise import (
    NoiseSampler,
    brownian_noise_sampler,
    default_noise_sampler,
    keyed_noise_sampler,
)
from bicm_diffusion.adapters.k_diffusion.run import MOST_LIFT, Callback, Network
from bicm_diffusion.adapters.k_diffusion.samplers import (
    sample_dpmpp_2m,
    sample_euler,
    sample_euler_ancestral,
    sample_heun,
)
from bicm_diffusion.adapters.k_diffusion.solvers import (
    sample_dpmpp_2m_sde,
    sample_dpmpp_2s_ancestral,
    sample_dpmpp_3m_sde,
    sample_dpmpp_sde,
    sample_lms,
)

__all__ = [
    "MOST_LIFT",
    "Callback",
    "Denoiser",
    "EDMDenoiser",
    "Network",
    "NoiseSampler",
    "brownian_noise_sampler",
    "default_noise_sampler",
    "keyed_noise_sampler",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_2s_ancestral",
    "sample_dpmpp_3m_sde",
    "sample_dpmpp_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_heun",
    "sample_lms",
]
