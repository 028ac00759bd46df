"""The Triton kernels, one module per family. Import this package late: importing Triton is slow.

``OPS`` holds an implementation of every overload under its schema's name, for any device Triton compiles for.
"""

import importlib

from bicm_kernels.families import FAMILIES
from bicm_kernels.triton_kernels.multistep import launch_multistep
from bicm_kernels.triton_kernels.noise import launch_noise

OPS = {
    name: function
    for family in FAMILIES
    for name, function in importlib.import_module(f"{__name__}.{family}").implementations().items()
}

__all__ = ["OPS", "launch_multistep", "launch_noise"]
