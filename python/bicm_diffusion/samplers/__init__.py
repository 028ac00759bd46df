"""Samplers and their inversions, one module per method; `loop.Options` documents their common arguments."""

from bicm_diffusion.samplers.ancestral import ancestral_sample
from bicm_diffusion.samplers.bdia import bdia_edit, bdia_invert, bdia_sample
from bicm_diffusion.samplers.consistency import (
    LeapInfo,
    LeapOptions,
    consistency_invert,
    consistency_multistep_sample,
    consistency_sample,
)
from bicm_diffusion.samplers.ddim import ddim_invert, ddim_sample
from bicm_diffusion.samplers.edict import edict_invert, edict_sample
from bicm_diffusion.samplers.edm import edm_invert, edm_sample
from bicm_diffusion.samplers.guide import Evaluation, Guide, Shift
from bicm_diffusion.samplers.loop import Options, StepInfo
from bicm_diffusion.samplers.notices import InexactInversionWarning, RetraceWarning
from bicm_diffusion.samplers.obelm import obelm_invert, obelm_sample
from bicm_diffusion.samplers.prediction import Preconditioned
from bicm_diffusion.samplers.sign import sign_masked, sign_recursive
from bicm_diffusion.samplers.states import ExactPair, ExactTwins, StatePair, TwinPair, load_pair, save_pair

__all__ = [
    "Evaluation",
    "ExactPair",
    "ExactTwins",
    "Guide",
    "InexactInversionWarning",
    "LeapInfo",
    "LeapOptions",
    "Options",
    "Preconditioned",
    "RetraceWarning",
    "Shift",
    "StatePair",
    "StepInfo",
    "TwinPair",
    "ancestral_sample",
    "bdia_edit",
    "bdia_invert",
    "bdia_sample",
    "consistency_invert",
    "consistency_multistep_sample",
    "consistency_sample",
    "ddim_invert",
    "ddim_sample",
    "edict_invert",
    "edict_sample",
    "edm_invert",
    "edm_sample",
    "load_pair",
    "obelm_invert",
    "obelm_sample",
    "save_pair",
    "sign_masked",
    "sign_recursive",
]
