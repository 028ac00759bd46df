"""The families of ops: what build, kernels, tests, evidence and benchmarks read."""

FAMILIES = (
    "noise",
    "multistep",
    "preconditioning",
    "pseudo_huber",
    "gaussian",
    "reversible",
)
