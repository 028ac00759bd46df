"""What has benchmarks: every family, and what is built of them; a new one adds its module."""

import importlib

from benchmarks.cases import Case
from bicm_kernels.families import FAMILIES as OPS

#: What is built of the families.
ABOVE_OPS = ("consistency", "idempotent", "inverse", "objectives", "samplers")

FAMILIES: dict[str, tuple[Case, ...]] = {
    name: importlib.import_module(f"benchmarks.bench_{name}").CASES for name in sorted((*OPS, *ABOVE_OPS))
}
