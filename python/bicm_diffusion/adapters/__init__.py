"""Drop-in forms for other libraries: diffusers, k-diffusion, EDM and OpenAI's consistency models.

Each library's module is imported on its own, so that none of them is needed by another:
`from bicm_diffusion.adapters.diffusers import accelerate_scheduler`.
"""

from typing import TYPE_CHECKING

from bicm_diffusion.subpackages import on_first_use

if TYPE_CHECKING:
    from bicm_diffusion.adapters import consistency_models as consistency_models
    from bicm_diffusion.adapters import deepinv as deepinv
    from bicm_diffusion.adapters import diffusers as diffusers
    from bicm_diffusion.adapters import edm as edm
    from bicm_diffusion.adapters import k_diffusion as k_diffusion
else:
    __getattr__, __dir__ = on_first_use(__name__, ("consistency_models", "deepinv", "diffusers", "edm", "k_diffusion"))
