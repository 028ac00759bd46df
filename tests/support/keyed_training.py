"""Runs of `bicm_diffusion.train` for the tests; as a program, under torchrun's variables: keyed_training.py OUTPUT."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from bicm_diffusion import LevelTable, draw_levels, karras_levels
from bicm_diffusion.objectives import gc_loss
from bicm_diffusion.train import Step, Trainer, TrainingOptions
from bicm_diffusion.train.processes import whole

COUNT, SIZE, STEPS = 40, 6, 5
TABLE = LevelTable(karras_levels(21))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(SIZE, 16), nn.Linear(16, SIZE)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        return x + self.second((self.first(x) + times).tanh())


class Network(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.times, self.dropout = nn.Linear(1, 16), nn.Dropout(dropout)
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, scaled: Tensor, t: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.seen += 1
        times = self.times(t.log()[:, None].to(scaled.dtype))
        for block in self.blocks:
            scaled = block(self.dropout(scaled), times)
        return scaled


def network(**options: Any) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Network(**options).double()


def samples() -> TensorDataset:
    return TensorDataset(torch.randn(COUNT, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


class Items(Dataset[Any]):
    """The same one by one, with what torch's generator says at the time."""

    def __init__(self, noise: float = 0.0) -> None:
        self.x, self.noise = samples().tensors[0], noise

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return (self.x[index] + self.noise * torch.randn(SIZE, dtype=torch.float64),)


def loss(model: nn.Module, batch: Any, step: Step) -> Any:
    (x,) = batch
    levels = draw_levels(TABLE, len(x), **step.key)
    options: dict[str, Any] = {"mu": 0.5, "predictor": step.average, "parameterization": "cm"}
    return gc_loss(model, x, levels, **options, **step.key)


def options(**changed: Any) -> TrainingOptions:
    return TrainingOptions(
        **{"steps": STEPS, "batch_size": 8, "seed": 3, "learning_rate": 1e-2, "clip": 1.0, "ema": 0.9, **changed}
    )


def trained(trainer: Trainer, steps: int = STEPS) -> dict[str, Tensor]:
    """Losses, gradients and weights of a run, by name."""
    found: dict[str, Tensor] = {}
    for step in range(steps):
        found[f"loss {step}"] = trainer.advance().total
        for name, p in trainer.network.named_parameters():
            assert p.grad is not None
            found[f"gradient {step} {name}"] = whole(p.grad).clone()
    for kind in ("network", "average"):
        for name, x in getattr(trainer, kind).state_dict().items():
            found[f"{kind} {name}"] = whole(x).clone()
    return found


def main(output: str) -> None:
    torch.set_num_threads(1)
    results = {}
    for parallel in ("ddp", "fsdp2"):
        for micro_batch in (None, 2):
            with torch.random.fork_rng(devices=[]):
                model = network()
                if dist.is_initialized() and dist.get_rank():
                    nn.init.zeros_(model.times.weight)  # the first process's parameters are everyone's
            trainer = Trainer(
                model,
                samples(),
                loss,
                options(micro_batch=micro_batch),
                parallel=parallel,
                blocks=lambda network: network.blocks,  # type: ignore[return-value]
                device="cpu",
            )
            path = Path(f"{output}.{parallel}.{micro_batch}.safetensors")
            results[parallel, micro_batch] = trained(trainer, 3)
            trainer.save(path)
            trainer.advance()
            trainer.load(path)
            results[parallel, micro_batch] |= trained(trainer, 2) | {"step": torch.tensor(trainer.step)}
    torch.save(results, f"{output}.{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
