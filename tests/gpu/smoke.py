"""``python tests/gpu/smoke.py DEVICE``: the bits of every exact call there and on the CPU, before any test."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from calls import DTYPES, EXACT, LOSSES, states

from bicm_kernels import backend


def differs(actual: Tensor, expected: Tensor) -> bool:
    """Whether any bit does, NaNs apart."""
    nan = expected.isnan()
    return not torch.equal(actual.isnan(), nan) or not torch.equal(actual[~nan], expected[~nan])


def main(device: str) -> int:
    wrong = []
    for name, call in EXACT.items():
        for kind, dtypes in DTYPES.items():
            actual = [x.cpu() for x in call(states((3, 67), dtypes, device))]
            with backend.use("reference" if device == "cpu" else "native"):
                expected = call(states((3, 67), dtypes, "cpu"))
            if any(differs(x, y) for x, y in zip(actual, expected, strict=True)):
                wrong.append(f"{name}, {kind}")
    # One block for a sample, a cluster, many chunks.
    for shape in ((4, 3, 32, 32), (2, 40_003), (1, 200_000)):
        for call in LOSSES.values():
            call(states(shape, DTYPES["mixed"], device))
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"other bits: {wrong}" if wrong else backend.describe().replace("\n", "; "))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
