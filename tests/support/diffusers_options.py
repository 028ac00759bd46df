"""Every option of the schedulers that are accelerated, with values to try."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)

Options = Mapping[str, tuple[Any, ...]]

FLAG = (False, True)
BETAS: Options = {
    "num_train_timesteps": (100, 500),
    "beta_start": (1e-5, 0.01),
    "beta_end": (0.002, 0.2),
    "beta_schedule": ("scaled_linear", "squaredcos_cap_v2"),
    "trained_betas": ([0.1, 0.3], torch.linspace(1e-4, 0.02, 50).tolist()),
    "timestep_spacing": ("leading", "trailing"),
    "rescale_betas_zero_snr": FLAG,
}
DDIM: Options = {
    **BETAS,
    "clip_sample": FLAG,
    "clip_sample_range": (0.5, 2.0),
    "set_alpha_to_one": FLAG,
    "steps_offset": (1,),
    "prediction_type": ("sample", "v_prediction"),
}
THRESHOLDING: Options = {"thresholding": (True,), "dynamic_thresholding_ratio": (0.9,), "sample_max_value": (0.5, 2.0)}
EDM: Options = {
    "sigma_min": (0.1,),
    "sigma_max": (10.0,),
    "sigma_data": (1.0,),
    "sigma_schedule": ("exponential",),
    "num_train_timesteps": (10,),
    "prediction_type": ("v_prediction",),
    "rho": (3.0,),
    "final_sigmas_type": ("sigma_min",),
}
SIGMAS: Options = {
    **BETAS,
    "use_karras_sigmas": FLAG,
    "use_exponential_sigmas": FLAG,
    "use_beta_sigmas": FLAG,
    "prediction_type": ("sample", "v_prediction"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "steps_offset": (1,),
}
SOLVER: Options = {
    "solver_order": (1, 2, 3),
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
    "solver_type": ("midpoint", "heun"),
    "lower_order_final": FLAG,
    "euler_at_final": FLAG,
}
#: Without what some do not know.
PLAIN_SIGMAS: Options = {
    name: values for name, values in SIGMAS.items() if name not in ("final_sigmas_type", "rescale_betas_zero_snr")
}
FLOW_SIGMAS: Options = {
    "use_flow_sigmas": FLAG,
    "flow_shift": (3.0,),
    "use_dynamic_shifting": FLAG,
    "time_shift_type": ("exponential",),
}
#: What singlestep solvers know of `SIGMAS`.
SINGLE = frozenset(SIGMAS) - {"timestep_spacing", "steps_offset", "rescale_betas_zero_snr"}
KDPM2: Options = {
    name: values for name, values in SIGMAS.items() if name not in ("rescale_betas_zero_snr", "final_sigmas_type")
}
#: Every option of every scheduler, with values beside its default.
OPTIONS: dict[type[Any], Options] = {
    DDIMScheduler: {**DDIM, **THRESHOLDING, "timestep_spacing": ("leading", "trailing", "linspace")},
    DDIMInverseScheduler: DDIM,
    EulerDiscreteScheduler: {
        **SIGMAS,
        "interpolation_type": ("log_linear",),
        "timestep_type": ("continuous",),
        "sigma_min": (0.1,),
        "sigma_max": (20.0,),
    },
    EDMEulerScheduler: EDM,
    EDMDPMSolverMultistepScheduler: {**EDM, **SOLVER, **THRESHOLDING},
    DPMSolverMultistepScheduler: {
        **SIGMAS,
        **SOLVER,
        **THRESHOLDING,
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"),
        "prediction_type": ("sample", "v_prediction", "flow_prediction"),
        "use_lu_lambdas": FLAG,
        "use_flow_sigmas": FLAG,
        "lambda_min_clipped": (-5.1,),
        "variance_type": ("learned", "learned_range"),
    },
    CMStochasticIterativeScheduler: {
        "num_train_timesteps": (10, 201),
        "sigma_min": (0.1,),
        "sigma_max": (10.0,),
        "sigma_data": (1.0,),
        "s_noise": (1.01,),
        "rho": (3.0,),
        "clip_denoised": FLAG,
    },
    LCMScheduler: {
        **DDIM,
        **THRESHOLDING,
        "original_inference_steps": (25,),
        "timestep_scaling": (1.0,),
    },
    TCDScheduler: {
        **DDIM,
        **THRESHOLDING,
        "original_inference_steps": (25,),
        "timestep_scaling": (1.0,),
    },
    FlowMatchEulerDiscreteScheduler: {
        "num_train_timesteps": (10, 500),
        "shift": (0.5, 3.0),
        "use_dynamic_shifting": FLAG,
        "time_shift_type": ("linear", "exponential"),
        "shift_terminal": (0.1,),
        "invert_sigmas": FLAG,
        "use_karras_sigmas": FLAG,
        "use_exponential_sigmas": FLAG,
        "use_beta_sigmas": FLAG,
        "stochastic_sampling": FLAG,
        "base_shift": (0.2,),
        "max_shift": (2.0,),
        "base_image_seq_len": (64,),
        "max_image_seq_len": (1024,),
    },
    EulerAncestralDiscreteScheduler: {
        **BETAS,
        "prediction_type": ("sample", "v_prediction"),
        "steps_offset": (1,),
    },
    FlowMatchHeunDiscreteScheduler: {"num_train_timesteps": (10, 500), "shift": (0.5, 3.0)},
    HeunDiscreteScheduler: {
        **KDPM2,
        "beta_schedule": ("scaled_linear", "squaredcos_cap_v2", "exp"),
        "clip_sample": FLAG,
        "clip_sample_range": (0.5, 2.0),
    },
    KDPM2DiscreteScheduler: KDPM2,
    KDPM2AncestralDiscreteScheduler: KDPM2,
    CogVideoXDDIMScheduler: {
        **DDIM,
        "timestep_spacing": ("leading", "trailing", "linspace"),
        "snr_shift_scale": (1.0, 2.0),
        "sample_max_value": (2.0,),
    },
    CogVideoXDPMScheduler: {
        **DDIM,
        "timestep_spacing": ("leading", "trailing", "linspace"),
        "snr_shift_scale": (1.0, 2.0),
        "sample_max_value": (2.0,),
    },
    UniPCMultistepScheduler: {
        **{name: values for name, values in SOLVER.items() if name not in ("algorithm_type", "euler_at_final")},
        **SIGMAS,
        **THRESHOLDING,
        **FLOW_SIGMAS,
        "prediction_type": ("sample", "v_prediction", "flow_prediction"),
        "solver_order": (1, 2, 3, 4),
        "solver_type": ("bh1", "bh2", "heun"),
        "predict_x0": FLAG,
        "disable_corrector": ([0], [1, 2]),
        "shift_terminal": (0.1,),
        "sigma_min": (0.1,),
        "sigma_max": (20.0,),
    },
    DEISMultistepScheduler: {
        **{name: values for name, values in SOLVER.items() if name != "euler_at_final"},
        **{
            name: values
            for name, values in SIGMAS.items()
            if name not in ("final_sigmas_type", "rescale_betas_zero_snr")
        },
        **THRESHOLDING,
        **FLOW_SIGMAS,
        "prediction_type": ("sample", "v_prediction", "flow_prediction"),
        "algorithm_type": ("deis", "dpmsolver++"),
        "solver_type": ("logrho", "heun"),
    },
    LMSDiscreteScheduler: PLAIN_SIGMAS,
    PNDMScheduler: {
        **{name: values for name, values in BETAS.items() if name != "rescale_betas_zero_snr"},
        "skip_prk_steps": FLAG,
        "set_alpha_to_one": FLAG,
        "prediction_type": ("v_prediction",),
        "timestep_spacing": ("leading", "trailing", "linspace"),
        "steps_offset": (1,),
    },
    DPMSolverSinglestepScheduler: {
        **{name: values for name, values in SIGMAS.items() if name in SINGLE},
        **{name: values for name, values in SOLVER.items() if name != "euler_at_final"},
        **THRESHOLDING,
        **FLOW_SIGMAS,
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver"),
        "prediction_type": ("sample", "v_prediction", "flow_prediction"),
        "lambda_min_clipped": (-5.1,),
        "variance_type": ("learned", "learned_range"),
    },
    DDPMScheduler: {
        **{name: values for name, values in DDIM.items() if name != "set_alpha_to_one"},
        **THRESHOLDING,
        "timestep_spacing": ("leading", "trailing", "linspace"),
        "beta_schedule": ("scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"),
        "variance_type": (
            "fixed_small",
            "fixed_small_log",
            "fixed_large",
            "fixed_large_log",
            "learned",
            "learned_range",
        ),
    },
}
