"""Steps of BCT training in processes, for the tests: parallel_training.py RANK RANKS STORE OUTPUT."""

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
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
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
    """Three blocks, of which the first is called twice and registered under two names."""

    def __init__(self, *, checkpoints: bool = False, unused: bool = False) -> None:
        super().__init__()
        self.times = nn.Linear(2, 16)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.again = self.blocks[0]
        self.checkpoints = checkpoints
        if unused:
            self.unused = nn.Linear(2, 2)

    def forward(self, scaled: Tensor, t: Tensor, u: Tensor) -> Tensor:
        x, times = scaled, self.times(torch.stack([t, u], dim=1).log().to(scaled.dtype))
        for block in (*self.blocks, self.again):
            x = checkpoint(block, x, times, use_reentrant=False) if self.checkpoints else block(x, times)
        return x


class Around(nn.Module):
    """A module that holds a wrapped network."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Tensor) -> Any:
        return self.inner(*args)


def network(**options: bool) -> Network:
    torch.manual_seed(1)
    return Network(**options).double()


def train(model: nn.Module, average: nn.Module | None = None, rank: int = 0, ranks: int = 1) -> dict[str, Tensor]:
    """Losses and gradients of each step on a share of its batch, and the weights at the end, by name."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    share, found = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks), {}
    for step in range(STEPS):
        x = torch.randn((BATCH, SIZE), generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        levels = draw_levels(LevelTable(karras_levels(21)), BATCH, seed=3, step=step)
        mine = Levels(*(level[share] for level in levels))
        optimizer.zero_grad()
        loss = bct_loss(model, x[share], mine, seed=3, step=step, sample_id=share.start)
        loss.total.backward()
        found[f"loss {step}"] = loss.total.detach()
        found |= {f"gradient {step} {name}": whole(p.grad) for name, p in named(model) if p.grad is not None}
        optimizer.step()
        if average is not None:
            update_average(average, model, step=step, decay=DECAY)
    found |= {f"weight {name}": whole(p) for name, p in named(model)}
    return found | ({f"average {name}": whole(p) for name, p in named(average)} if average is not None else {})


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters by the names that they have in no wrapper."""
    return [
        (".".join(part for part in name.split(".") if part not in ("module", "_orig_mod", "inner")), p)
        for name, p in model.named_parameters()
    ]


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
    "DDP": replicated,
    "DDP, unused parameters": partial(replicated, unused=True, find_unused_parameters=True),
    "DDP, checkpoints": partial(replicated, checkpoints=True),
    "DDP, checkpoints, static graph": partial(replicated, checkpoints=True, static_graph=True),
    "DDP in a module, static graph": lambda: Around(replicated(static_graph=True)),
    "DDP in a module, unused parameters": lambda: Around(replicated(unused=True, find_unused_parameters=True)),
    "DDP, compiled": partial(compiled, replicated),
    "FSDP2": sharded,
    "FSDP2, the root resharded": partial(sharded, blocks=False, reshard_after_forward=True),
    "FSDP2, checkpoints": partial(sharded, checkpoints=True),
    "FSDP1": lambda: FullyShardedDataParallel(network(), device_id=torch.device("cpu")),
}


def main(rank: int, ranks: int, store: str, output: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    results: dict[str, dict[str, Tensor] | str] = {}
    for name, make in WRAPPERS.items():
        average = sharded(blocks="root" not in name) if name.startswith("FSDP2") else network(unused="unused" in name)
        try:
            results[name] = train(make(), average, rank, ranks)
        except (TypeError, RuntimeError) as error:
            results[name] = f"{type(error).__name__}: {error}"
    torch.save(results, Path(output))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
