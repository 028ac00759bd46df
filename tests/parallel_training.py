"""Steps of training on two processes, for the tests: parallel_training.py WRAPPER OUTPUT, run by torchrun."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from bicm_diffusion import Levels, LevelTable, bct_loss, draw_levels, karras_levels, update_average

BATCH, SIZE, STEPS, DECAY = 8, 12, 3, 0.5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(SIZE, 16), nn.Linear(16, SIZE)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        return x + self.second((self.first(x) + times).tanh())


class Network(nn.Module):
    def __init__(self, *, checkpoints: bool = False, unused: bool = False) -> None:
        super().__init__()
        self.times = nn.Linear(2, 16)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.checkpoints = checkpoints
        if unused:
            self.unused = nn.Linear(2, 2)

    def forward(self, scaled: Tensor, t: Tensor, u: Tensor) -> Tensor:
        x, times = scaled, self.times(torch.stack([t, u], dim=1).log().to(scaled.dtype))
        for block in self.blocks:
            x = checkpoint(block, x, times, use_reentrant=False) if self.checkpoints else block(x, times)
        return x


def network(**options: bool) -> Network:
    torch.manual_seed(1)
    return Network(**options).double()


def batch(step: int) -> tuple[Tensor, Levels]:
    x = torch.randn((BATCH, SIZE), generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return x, draw_levels(LevelTable(karras_levels(21)), BATCH, seed=3, step=step)


def train(model: nn.Module, average: nn.Module | None, rank: int, ranks: int) -> list[dict[str, Tensor]]:
    """The gradients of each step on a share of the batch, by name."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    share, found = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks), []
    for step in range(STEPS):
        x, levels = batch(step)
        mine = Levels(*(level[share] for level in levels))
        optimizer.zero_grad()
        bct_loss(model, x[share], mine, seed=3, step=step, sample_id=share.start).total.backward()
        found.append({name: whole(p.grad) for name, p in named(model) if p.grad is not None})
        optimizer.step()
        if average is not None:
            update_average(average, model, step=step, decay=DECAY)
    return found


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    prefixes = ("module.", "_orig_mod.")
    names = [(name, p) for name, p in model.named_parameters()]
    for prefix in prefixes * 2:
        names = [(name.removeprefix(prefix), p) for name, p in names]
    return names


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()  # type: ignore[operator]


def sharded(*, checkpoints: bool = False, blocks: bool = True, **options: Any) -> nn.Module:
    model = network(checkpoints=checkpoints)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks if blocks else ():
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def replicated(*, checkpoints: bool = False, unused: bool = False, **options: bool) -> nn.Module:
    return DistributedDataParallel(network(checkpoints=checkpoints, unused=unused), **options)


def compiled(make: Callable[[], nn.Module]) -> Any:
    return torch.compile(make(), backend="aot_eager")


WRAPPERS: dict[str, Callable[[], nn.Module]] = {
    "ddp": replicated,
    "ddp-static": partial(replicated, static_graph=True),
    "ddp-unused": partial(replicated, unused=True, find_unused_parameters=True),
    "ddp-checkpoints": partial(replicated, checkpoints=True),
    "ddp-static-checkpoints": partial(replicated, checkpoints=True, static_graph=True),
    "ddp-compiled": partial(compiled, replicated),
    "ddp-of-compiled": lambda: DistributedDataParallel(compiled(network)),
    "fsdp": sharded,
    "fsdp-root": partial(sharded, blocks=False),
    "fsdp-root-resharded": partial(sharded, blocks=False, reshard_after_forward=True),
    "fsdp-kept": partial(sharded, reshard_after_forward=False),
    "fsdp-checkpoints": partial(sharded, checkpoints=True),
}


def main(names: str, output: str) -> None:
    dist.init_process_group("gloo")
    results: dict[str, Any] = {}
    for name in names.split(","):
        model = WRAPPERS[name]()
        average = sharded(checkpoints="checkpoints" in name, blocks="root" not in name) if "fsdp" in name else network()
        average = None if "unused" in name else average
        try:
            steps = train(model, average, dist.get_rank(), dist.get_world_size())
            ends = [{n: whole(p) for n, p in named(m)} for m in (model, average) if m is not None]
            results[name] = (steps, *ends)
        except Exception as error:
            results[name] = repr(error)
            if len(names.split(",")) == 1:
                raise
    if dist.get_rank() == 0:
        torch.save(results, Path(output))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
