"""Writes noise.json, the bits that guard NOISE_VERSION: run it only when that version changes.

python tests/kernels/vectors/write.py
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bicm_kernels as bk

SEEDS = (0, 1, -1, 2**63, 2**64 - 2, -(2**63), 0x0123456789ABCDEF)


def cases() -> list[dict[str, Any]]:
    """Seeds of every kind, steps, sample ids, sizes that fill no quad or chunk, and keys per sample."""
    keys: list[dict[str, Any]] = [{"shape": [2, 5], "seed": seed, "step": 0, "sample_id": 0} for seed in SEEDS]
    keys += [{"shape": [2, 5], "seed": 7, "step": step, "sample_id": 3} for step in (1, 2**31, 2**32 - 1)]
    keys += [{"shape": [2, 5], "seed": 7, "step": 5, "sample_id": ids} for ids in (1, 2**31, 2**32 - 2, [9, 2**32 - 1])]
    keys += [{"shape": shape, "seed": 11, "step": 4, "sample_id": 0} for shape in ([3], [1, 1], [1, 67], [2, 3, 1, 7])]
    keys += [{"shape": [3, 3], "seed": [5, -6, 2**62], "step": [0, 1, 2**32 - 1], "sample_id": 0}]
    return keys


def bits(x: Tensor) -> list[int]:
    return [number & 0xFFFFFFFF for number in x.view(torch.int32).flatten().tolist()]


def main() -> None:
    rows = []
    for case in cases():
        shape, *key = (torch.tensor(x) if isinstance(x, list) and k else x for k, x in enumerate(case.values()))
        seed, step, sample_id = key
        for draw in (bk.normal, bk.uniform):
            drawn = draw(shape, seed=seed, step=step, sample_id=sample_id, dtype=torch.float32)
            case[draw.__name__] = bits(drawn)
        rows.append(json.dumps(case))
    long = bk.normal((3, 100_003), seed=1, dtype=torch.float32).numpy().tobytes()
    head = f'"version": {bk.NOISE_VERSION},\n "sha256": "{hashlib.sha256(long).hexdigest()}"'
    body = ",\n  ".join(rows)
    Path(__file__).with_name("noise.json").write_text(f'{{{head},\n "cases": [\n  {body}\n ]}}\n')


if __name__ == "__main__":
    main()
