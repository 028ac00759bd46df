"""The modules with benchmarks: every family, and higher-level code; a new one adds its module."""

import importlib

from benchmarks.cases import Case
from bicm_kernels.families import FAMILIES as OPS

#: Higher-level code on the families.
ABOVE_OPS = ("consistency", "idempotent", "inverse", "objectives", "peers", "samplers")

FAMILIES: dict[str, tuple[Case, ...]] = {
    name: importlib.import_module(f"benchmarks.bench_{name}").CASES for name in sorted((*OPS, *ABOVE_OPS))
}
