"""A worked example on real data: a small noise predictor for scikit-learn's handwritten digits."""

import importlib

from bicm_diffusion.extras import extra

# What every command needs; matplotlib is slow to import, and only pictures need it.
with extra("diffusion"):
    for needed in ("click", "rich", "safetensors", "sklearn", "tqdm"):
        importlib.import_module(needed)
