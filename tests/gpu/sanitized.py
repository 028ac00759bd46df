"""``python tests/gpu/sanitized.py DEVICE``: a few calls for compute-sanitizer, which makes them slow."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from calls import CALLS, DTYPES, states

NAMES = (
    *("bdia_step", "affine_step", "exact steps", "vector mean", "vector mean, kept", "consistency none, kept"),
    *("gaussian_step", "gaussian_log_prob"),
)


def main(device: str) -> None:
    for name in NAMES:
        for shape in ((3, 67), (2, 40_003)):
            CALLS[name](states(shape, DTYPES["mixed"], device))
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1])
