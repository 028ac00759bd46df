"""A run for the tests of `bicm_diffusion.distributed`: python sharded_run.py DIRECTORY STEPS FORMAT [DIES_AFTER].

SHARDED_BY names the group's backend (gloo where it is not set; fake carries nothing), SHARDED_ON the device (cpu).
SHARDED_RANK_1 holds arguments of `sample_shards`, as JSON, that rank 1 alone gives.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor

from bicm_diffusion import ddim_sample, vp_schedule
from bicm_diffusion.distributed import Shard, read_samples, sample_shards
from bicm_kernels import normal

Format = Literal["safetensors", "png"]
COUNT, BATCH, SEED = 22, 4, 7


def run(
    directory: str,
    steps: int,
    save_as: Format = "safetensors",
    dies_after: int | None = None,
    device: str = "cpu",
) -> None:
    torch.manual_seed(0)
    network = torch.nn.Linear(12, 12, dtype=torch.float32).to(device)  # a matrix product's bits depend on its batch
    schedule, made = vp_schedule(steps), 0

    def sample(shard: Shard) -> Tensor:
        nonlocal made
        if made == dies_after:
            os.kill(os.getpid(), signal.SIGKILL)
        made += 1
        time.sleep(0.1 * int(os.environ.get("RANK", "0")))  # the first process is done before the others
        z = normal((shard.batch, 12), seed=SEED, sample_id=shard.first, device=device)
        samples = ddim_sample(lambda z, times: torch.tanh(network(z)), z, schedule)
        return samples if save_as == "safetensors" else samples.reshape(-1, 3, 2, 2)

    asked = {"count": COUNT, "batch": BATCH, "settings": {"seed": SEED, "steps": steps}, "save_as": save_as}
    if os.environ.get("RANK") == "1":
        asked |= json.loads(os.environ.get("SHARDED_RANK_1", "{}"))
    with torch.no_grad():
        sample_shards(sample, directory=directory, progress=False, **asked)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "ACCELERATE_MIXED_PRECISION" in os.environ:  # accelerate's launcher: its own state makes the process group
        from accelerate import PartialState

        PartialState(cpu=True)
    elif "WORLD_SIZE" in os.environ:
        group = os.environ.get("SHARDED_BY", "gloo")
        if group == "nccl":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        store, rank, world = next(dist.rendezvous("env://"))
        importlib.import_module("torch.testing._internal.distributed.fake_pg")  # registers itself
        dist.init_process_group(group, store=store, rank=rank, world_size=world)
    directory, steps, written_as, *dies = sys.argv[1:]
    dies_after, device = int(dies[0]) if dies else None, os.environ.get("SHARDED_ON", "cpu")
    run(directory, int(steps), cast(Format, written_as), dies_after, device)
    read_samples(directory)  # whoever returns finds them all
    if dist.is_initialized():
        dist.destroy_process_group()
