"""What pytest must not import: modules for a library that is not installed."""

import importlib.util

collect_ignore_glob = (
    []
    if importlib.util.find_spec("diffusers")
    else ["python/bicm_diffusion/adapters/diffusers/*", "tests/diffusers_cases.py"]
)
