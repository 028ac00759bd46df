"""The Triton kernels, one module per family. Import this package late: Triton takes its time.

``OPS`` holds an implementation of every overload under its schema's name, for any device Triton compiles for.
"""

from bicm_kernels.triton_kernels import multistep, noise, preconditioning, pseudo_huber, reversible
from bicm_kernels.triton_kernels.multistep import launch_multistep
from bicm_kernels.triton_kernels.noise import launch_noise

FAMILIES = (noise, multistep, preconditioning, pseudo_huber, reversible)

OPS = {name: function for family in FAMILIES for name, function in family.implementations().items()}

__all__ = ["OPS", "launch_multistep", "launch_noise"]
