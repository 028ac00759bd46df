"""Every op written plainly in PyTorch: the specification in code, and the fallback when nothing is compiled.

The functions take the arguments of the public ops and give the same bits as every backend. They are written from the
formulas, differentiable, and slow: halves are computed in float32 and rounded once, multiply and add are
separate operations, and a float32 root is taken through float64, because torch's own is not correctly rounded.
"""

from bicm_kernels.reference.gaussian import gaussian_kl, gaussian_log_prob, gaussian_step
from bicm_kernels.reference.generator import torch_randn
from bicm_kernels.reference.multistep import (
    affine_step,
    bdia_inverse_step,
    bdia_step,
    ddim_step,
    denoised_step,
)
from bicm_kernels.reference.noise import (
    add_noise,
    fold_in,
    fold_in_words,
    normal,
    philox4x32,
    uniform,
)
from bicm_kernels.reference.noisy_pair import noisy_pair
from bicm_kernels.reference.preconditioning import c_in, denoise, denoise_gradient, renoise, scale_input
from bicm_kernels.reference.pseudo_huber import consistency_loss, pseudo_huber
from bicm_kernels.reference.reversible import (
    bdia_exact_inverse_step,
    bdia_exact_step,
    exact_affine_inverse_step,
    exact_affine_step,
    fixed_point_decode,
    fixed_point_encode,
)

__all__ = [
    "add_noise",
    "affine_step",
    "bdia_exact_inverse_step",
    "bdia_exact_step",
    "bdia_inverse_step",
    "bdia_step",
    "c_in",
    "consistency_loss",
    "ddim_step",
    "denoise",
    "denoise_gradient",
    "denoised_step",
    "exact_affine_inverse_step",
    "exact_affine_step",
    "fixed_point_decode",
    "fixed_point_encode",
    "fold_in",
    "fold_in_words",
    "gaussian_kl",
    "gaussian_log_prob",
    "gaussian_step",
    "noisy_pair",
    "normal",
    "philox4x32",
    "pseudo_huber",
    "renoise",
    "scale_input",
    "torch_randn",
    "uniform",
]
