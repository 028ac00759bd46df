"""Fused ops for diffusion and consistency models: the same noise everywhere, exact arithmetic, batch invariance.

Every op is one kernel launch and gives the same bits on every backend; ``backend.describe()`` returns which one runs.
"""

from bicm_kernels import backend, reference
from bicm_kernels.ops.gaussian import gaussian_kl, gaussian_log_prob, gaussian_step
from bicm_kernels.ops.generator import torch_randn
from bicm_kernels.ops.multistep import DenoisedStep, affine_step, bdia_inverse_step, bdia_step, ddim_step, denoised_step
from bicm_kernels.ops.noise import NOISE_VERSION, add_noise, fold_in, normal, uniform
from bicm_kernels.ops.noisy_pair import noisy_pair
from bicm_kernels.ops.preconditioning import denoise, renoise, scale_input
from bicm_kernels.ops.pseudo_huber import consistency_loss, pseudo_huber
from bicm_kernels.ops.reversible import (
    bdia_exact_inverse_step,
    bdia_exact_step,
    exact_affine_inverse_step,
    exact_affine_step,
    fixed_point_decode,
    fixed_point_encode,
)
from bicm_kernels.version import __version__

backend.start()

__all__ = [
    "NOISE_VERSION",
    "DenoisedStep",
    "__version__",
    "add_noise",
    "affine_step",
    "backend",
    "bdia_exact_inverse_step",
    "bdia_exact_step",
    "bdia_inverse_step",
    "bdia_step",
    "consistency_loss",
    "ddim_step",
    "denoise",
    "denoised_step",
    "exact_affine_inverse_step",
    "exact_affine_step",
    "fixed_point_decode",
    "fixed_point_encode",
    "fold_in",
    "gaussian_kl",
    "gaussian_log_prob",
    "gaussian_step",
    "noisy_pair",
    "normal",
    "pseudo_huber",
    "reference",
    "renoise",
    "scale_input",
    "torch_randn",
    "uniform",
]
