"""The names of the op families; the build, kernels, tests, evidence and benchmarks read this list."""

FAMILIES = (
    "noise",
    "multistep",
    "preconditioning",
    "pseudo_huber",
    "gaussian",
    "reversible",
)
