"""The processes that train together: one, or those that torchrun starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

PARALLEL = ("ddp", "fsdp2")
Blocks = Callable[[nn.Module], Iterable[nn.Module]]


@dataclass(frozen=True)
class Processes:
    """This process: its `rank` of `count`, and its device."""

    rank: int
    count: int
    device: torch.device

    @classmethod
    def joined(cls, device: torch.device | str | None = None) -> Processes:
        """Return this process's rank and device; under torchrun the group is created if it does not exist yet.

        device: None for the GPU of the process's number on its machine, or the CPU where torch finds no GPU; "cuda" is
            that GPU. Outside of torchrun it is the current one.
        """
        cuda = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
        if "RANK" in os.environ and dist.is_available() and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo")
        together = dist.is_available() and dist.is_initialized()
        device = torch.device("cuda" if cuda else "cpu") if device is None else torch.device(device)
        if cuda and ":" not in str(device):
            local = os.environ.get("LOCAL_RANK")
            device = torch.device("cuda", torch.cuda.current_device() if local is None else int(local))
        if cuda:
            torch.cuda.set_device(device)
            device = torch.device("cuda", torch.cuda.current_device())
        rank, count = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        return cls(rank, count, device)

    def agree(self, network: nn.Module) -> None:
        """Broadcast the first process's parameters and buffers."""
        for x in (*network.parameters(), *network.buffers()) if self.count > 1 else ():
            dist.broadcast(x.detach(), 0)

    def wrapped(
        self, network: nn.Module, parallel: str, blocks: Blocks | None, arguments: Mapping[str, Any]
    ) -> nn.Module:
        """Return the wrapped network: itself for one process; FSDP2 changes it in place."""
        if parallel not in PARALLEL:
            raise ValueError(f"parallel: expected one of {', '.join(PARALLEL)}, got {parallel!r}")
        if self.count == 1:
            return network
        if parallel == "ddp":
            return nn.parallel.DistributedDataParallel(network, **arguments)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.count,))
        for block in blocks(network) if blocks is not None else ():
            fully_shard(block, mesh=mesh, **arguments)
        fully_shard(network, mesh=mesh, **arguments)
        return network

    def mean(self, numbers: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the sums of numbers over the processes, divided by their count."""
        if self.count == 1 or not numbers:
            return numbers
        stacked = torch.stack([x.detach().to(self.device, torch.float64) for x in numbers.values()])
        dist.all_reduce(stacked)
        return dict(zip(numbers, stacked / self.count, strict=True))

    def wait(self) -> None:
        """Wait for the others."""
        if self.count > 1:
            dist.barrier()


@contextmanager
def gradients_kept(model: nn.Module, kept: bool) -> Iterator[None]:
    """Suppress gradient synchronisation for all micro-batches but the last, which then exchanges the sum."""
    if isinstance(model, nn.parallel.DistributedDataParallel) and kept:
        with model.no_sync():
            yield
        return
    synchronise: Any = getattr(model, "set_requires_gradient_sync", None)
    if synchronise is not None:
        synchronise(not kept)
    yield


def release(module: nn.Module) -> None:
    """Make FSDP2 free the parameters gathered in an evaluation without a backward pass, which its root keeps."""
    for part in module.modules():
        reshard = getattr(part, "reshard", None)
        if callable(reshard):
            reshard()


def whole(x: Tensor) -> Tensor:
    """Return the full tensor of one that may be sharded over processes, detached."""
    gather: Any = getattr(x, "full_tensor", None)
    full: Tensor = x if gather is None else gather()
    return full.detach()


def spread(x: Tensor, like: Tensor) -> Tensor:
    """Return a full tensor on the device of another, and sharded like it."""
    x = x.to(like.device)
    if not hasattr(like, "full_tensor"):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, like.device_mesh, like.placements)  # type: ignore[attr-defined]
