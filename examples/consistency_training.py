"""Consistency training (iCT) from fused ops: bfloat16 autocast, accumulation, DDP, and a run that can be resumed.

Every random number is keyed by (seed, epoch, index of the image in the data set). An image therefore gets the same
noise level and the same noise for any split of the data into batches, micro-batches and processes, and a resumed run
makes the draws that the interrupted one would have made.

    python examples/consistency_training.py --epochs 2
    torchrun --nproc_per_node 2 examples/consistency_training.py --epochs 2

Needs the extra [diffusion], for the digits.
"""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import bicm_kernels as bk
from bicm_diffusion import LevelTable, draw_levels, karras_levels, update_average
from bicm_diffusion.distributed.atomic import write_whole

SEED = 0
SIGMA_DATA = 0.5


class Network(nn.Module):
    """F(c_in·x, t): a small convolutional network whose channels are shifted by an embedding of ln(t)/4."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, scaled: Tensor, t: Tensor) -> Tensor:
        shift = self.time(t.log()[:, None] / 4)[:, :, None, None]
        h = nn.functional.silu(self.first(scaled) + shift)
        return self.last(nn.functional.silu(self.middle(h)) + h)


def ict_loss(network: nn.Module, x: Tensor, ids: Tensor, table: LevelTable, *, epoch: int) -> Tensor:
    """The mean of d(f(x_high), sg f(x_low)) / (t_high - t_low) over a batch (iCT; BCM eq. 5)."""
    key = {"seed": SEED, "step": epoch, "sample_id": ids}
    levels = draw_levels(table, len(x), **key)
    low, high = (t.float() for t in levels[:2])
    # Both come out multiplied by c_in, as the network takes them; x + t·n itself is never stored.
    x_low, x_high = bk.noisy_pair(x, low, high, **key, sigma_data=SIGMA_DATA)
    options = {"parameterization": "cm", "sigma_data": SIGMA_DATA, "scaled": True}
    with torch.autocast(x.device.type, torch.bfloat16):
        output = network(x_high, high)  # first: torch 2.10 would keep the casts without gradients of the other call
        with torch.no_grad():
            target = network(x_low, low)
    # The ops take bfloat16 outputs together with float32 states; the sum and the loss are float32.
    goal = bk.denoise(x_low, target, low, **options)
    return bk.consistency_loss(x_high, output, high, None, goal, weight=1 / (high - low), **options)


def batches(count: int, size: int, epoch: int, rank: int, world: int) -> list[Tensor]:
    """The indices that a process takes in an epoch, a tensor for each step; all processes together take `size`."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SEED + epoch))
    return [step[rank::world] for step in order[: count // size * size].split(size)]


def train(
    epochs: int, *, batch: int = 256, micro_batch: int = 64, checkpoint: Path | None = None, images: int | None = None
) -> nn.Module:
    """Train and return the average of the weights; resumes from `checkpoint` if it exists."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else "cpu"
    data = torch.tensor(load_digits().images[:images], dtype=torch.float32)[:, None] / 16 - 0.5
    data = (data / data.std() * SIGMA_DATA).to(device)
    if not world <= batch <= len(data):
        raise SystemExit(
            f"--batch: expected between {world} and {len(data)}, as there are processes and images, got {batch}"
        )
    torch.manual_seed(SEED)
    network, average = Network().to(device), Network().to(device)
    average.load_state_dict(network.state_dict())
    model = DistributedDataParallel(network) if world > 1 else network
    optimizer = torch.optim.RAdam(network.parameters(), lr=1e-3)
    table, first = LevelTable(karras_levels(19)), 0
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epoch"]
    for epoch in range(first, epochs):
        total = torch.zeros((), device=device)
        steps = batches(len(data), batch, epoch, rank, world)
        for i, ids in enumerate(steps):
            parts = ids.to(device).split(micro_batch)
            for k, part in enumerate(parts):
                last = k == len(parts) - 1
                with nullcontext() if last or world == 1 else model.no_sync():
                    loss = ict_loss(model, data[part], part, table, epoch=epoch) * (len(part) / len(ids))
                    loss.backward()
                total += loss.detach()
            optimizer.step()
            optimizer.zero_grad()
            update_average(average, network, step=epoch * len(steps) + i, decay=0.99)
        if world > 1:
            dist.all_reduce(total)
        if rank == 0:
            print(f"epoch {epoch + 1}: loss {total.item() / len(steps) / world:.4f}")
            if checkpoint is not None:
                parts = {"network": network.state_dict(), "average": average.state_dict()}
                state = {**parts, "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
                checkpoint.parent.mkdir(parents=True, exist_ok=True)
                write_whole(checkpoint, partial(torch.save, state))
    return average


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--checkpoint", type=Path, help="written after every epoch; a run resumes from it")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--images", type=int, help="how many of the data set's images to use; all of them by default")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    train(arguments.epochs, batch=arguments.batch, checkpoint=arguments.checkpoint, images=arguments.images)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
