"""Which GPUs the CUDA library's machine code runs on."""

from __future__ import annotations

import re
from collections.abc import Sequence

Capability = tuple[int, int]
#: From these GPUs on a sample is shared by a cluster of blocks, which code for older ones has not.
CLUSTERS = (9, 0)


def runs_on(architectures: str, capability: Capability) -> bool:
    """Whether a GPU has machine code in a list as CMake's, or PTX that a driver can compile for it.

    "80-real" is machine code, for GPUs of that major version and at least that minor one; "80-virtual" is PTX, for all
    later ones; "80" is both; code of "90a" runs on that one alone, of "100f" on its major version. Words, such as
    "native", are taken to fit. PTX from before clusters is none for GPUs that have them, since it has no kernels of
    clusters.

    >>> runs_on("80-real 90", (8, 6)), runs_on("80-real 90", (12, 0)), runs_on("80", (9, 0)), runs_on("90", (8, 0))
    (True, True, False, False)
    """
    for entry in architectures.split():
        parts = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", entry)
        if parts is None:
            return True
        major, minor, suffix, kind = parts.groups()
        built = int(major), int(minor)
        if suffix:
            if built == capability or (suffix == "f" and built[0] == capability[0] and built <= capability):
                return True
            continue
        if kind != "-virtual" and built[0] == capability[0] and built <= capability:
            return True
        if kind != "-real" and built <= capability and (built >= CLUSTERS or capability < CLUSTERS):
            return True
    return False


def refused(architectures: str, capabilities: Sequence[Capability]) -> str:
    """Why the library must not run on a machine with such GPUs; empty where it may."""
    lacking = [capability for capability in capabilities if not runs_on(architectures, capability)]
    # A GPU without any code raises at its first call, while others work; one with clusters would be silently wrong.
    if not lacking or (len(lacking) < len(capabilities) and all(capability < CLUSTERS for capability in lacking)):
        return ""
    names = ", ".join(sorted({f"{major}{minor}" for major, minor in lacking}))
    return (
        f"the CUDA library was built for {architectures}, not for sm_{names}: build it again on this machine, or with "
        f'BICM_CUDA_ARCH_LIST="{names}"'
    )
