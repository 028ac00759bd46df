"""BCT training in two processes: DDP and FSDP2 train as one process does, and wrappers that cannot are refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bicm_diffusion import LevelTable, bct_loss, draw_levels, karras_levels
from tests.support import parallel_training
from tests.support.parallel_training import BATCH, SIZE, STEPS, network, train

SCRIPT = Path(parallel_training.__file__)
ROOT = SCRIPT.parents[2]
RANKS = 2
REFUSED = {
    "FSDP1": r"TypeError: network: expected .*fully_shard, got FullyShardedDataParallel",
    "DDP in a module, static graph": r"TypeError: network: expected .*itself, got one inside Around: wrap the whole",
    "DDP in a module, unused parameters": r"TypeError: network: expected .*itself, got one inside Around",
}
Found = dict[str, Any]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """What each of two processes found with each wrapper."""
    directory = tmp_path_factory.mktemp("ranks")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")]),
    }
    outputs = [directory / f"{rank}.pt" for rank in range(RANKS)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(RANKS), str(directory / "store"), str(output)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, output in enumerate(outputs)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), "\n".join(errors)
    return [torch.load(output) for output in outputs]


@pytest.fixture(scope="module")
def alone() -> Found:
    return train(network(), network())


def averaged(parts: list[Found], name: str) -> Tensor:
    """Of the ranks' losses the mean; whatever else training finds is the same on every rank."""
    if name.startswith("loss"):
        return torch.stack([part[name] for part in parts]).mean()
    assert all(torch.equal(part[name], parts[0][name]) for part in parts), name
    first: Tensor = parts[0][name]
    return first


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", [name for name in parallel_training.WRAPPERS if name not in REFUSED])
def test_two_processes_train_as_one(ranks: list[Found], alone: Found, wrapper: str) -> None:
    """To rounding, for gradients of halves of the batch are added: float64, three steps, eight samples."""
    parts = [rank[wrapper] for rank in ranks]
    assert isinstance(parts[0], dict), parts[0]
    names = {name for name in parts[0] if ".unused" not in name and " unused" not in name}
    assert names == alone.keys()
    assert {f"gradient {STEPS - 1} times.weight", "average blocks.0.first.weight"} <= names
    for name, expected in alone.items():
        bound = 1e-14 * float(expected.abs().max())
        torch.testing.assert_close(averaged(parts, name), expected, rtol=1e-14, atol=bound, msg=name)


@pytest.mark.slow
def test_wrappers_agree_to_the_bit(ranks: list[Found]) -> None:
    """With each other and with checkpoints; the order in which one process adds is another one."""
    plain = ranks[0]["DDP"]
    for wrapper in ("DDP, checkpoints", "FSDP2", "FSDP2, the root resharded", "FSDP2, checkpoints"):
        assert all(torch.equal(ranks[0][wrapper][name], x) for name, x in plain.items()), wrapper


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", REFUSED)
def test_wrappers_that_cannot_be_right_are_refused(ranks: list[Found], wrapper: str) -> None:
    for rank in ranks:
        assert isinstance(rank[wrapper], str), "it trained"
        assert re.match(REFUSED[wrapper], rank[wrapper]), rank[wrapper]


@pytest.mark.parametrize("inside", [False, True])
def test_data_parallel_is_refused(inside: bool) -> None:
    wrapped: nn.Module = nn.DataParallel(network())
    x, levels = torch.zeros(BATCH, SIZE), draw_levels(LevelTable(karras_levels(21)), BATCH, seed=3, step=0)
    with pytest.raises(TypeError, match=r"network: expected .*DistributedDataParallel, got DataParallel"):
        bct_loss(nn.Sequential(wrapped) if inside else wrapped, x, levels, seed=5, step=3)
