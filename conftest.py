"""What pytest must not import: modules for a library that is not installed."""

import importlib.util

NEEDS = {
    "diffusers": ["python/bicm_diffusion/adapters/diffusers/*", "tests/support/diffusers_*.py"],
    "sklearn": ["examples/digits/*"],
}
collect_ignore_glob = [path for name, paths in NEEDS.items() if not importlib.util.find_spec(name) for path in paths]
