"""What a run is made of: its settings, its draws, and a state that goes on to the bit in every layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, TensorDataset

pytest.importorskip("safetensors", reason="checkpoints are safetensors, an extra of this package")

import numpy as np

from bicm_diffusion.objectives import Loss, denoising_loss, draw_denoising_levels
from bicm_diffusion.train import Step, Trainer, TrainingOptions
from bicm_diffusion.train.batches import Batches
from bicm_diffusion.train.processes import Processes

IMAGES = torch.randn(12, 3, 6, 6, generator=torch.Generator().manual_seed(0))
OPTIONS: dict[str, Any] = {"steps": 8, "batch_size": 4, "seed": 3, "optimizer": "adamw", "learning_rate": 1e-2}


class Network(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.last, self.dropout = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3), nn.Dropout(dropout)

    def forward(self, scaled: Tensor, t: Tensor) -> Tensor:
        shift = t.log()[:, None, None, None].to(scaled.dtype)
        return nn.functional.pad(self.last(self.dropout(self.first(scaled) + shift).tanh()), (1, 1, 1, 1))


def network(**options: Any) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Network(**options)


def loss(model: nn.Module, batch: Any, step: Step) -> Loss:
    (x,) = batch
    return denoising_loss(model, x, draw_denoising_levels(len(x), **step.key), **step.key)


def trainer(model: nn.Module, *, average: nn.Module | None = None, notes: Any = None, **changed: Any) -> Trainer:
    asked = TrainingOptions(**{**OPTIONS, **changed})
    return Trainer(model, TensorDataset(IMAGES), loss, asked, average=average, notes=notes, device="cpu")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("fused", [False, True])
def test_a_run_goes_on_to_the_bit_in_every_layout(fused: bool, layout: torch.memory_format, tmp_path: Path) -> None:
    made = {"optimizer_args": {"fused": fused}}
    whole = trainer(network().to(memory_format=layout), **made)
    whole.run(checkpoint=tmp_path / "state.safetensors", checkpoint_every=8)
    first = trainer(network().to(memory_format=layout), **made)
    for _ in range(4):
        first.advance()
    first.save(tmp_path / "half.safetensors")
    second = trainer(network().to(memory_format=layout), **made)
    second.load(tmp_path / "half.safetensors")
    second.run()
    for ours, theirs in zip(second.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_checkpoint_of_another_dtype_or_shape_changes_nothing(tmp_path: Path) -> None:
    run = trainer(network())
    run.advance()
    run.save(tmp_path / "state.safetensors")
    other = trainer(network().double())
    with pytest.raises(ValueError, match=r"first.weight is torch.float32 of shape .*, expected torch.float64"):
        other.load(tmp_path / "state.safetensors")
    wider = network()
    wider.last = nn.Conv2d(8, 3, 1)
    before = [p.detach().clone() for p in wider.parameters()]
    with pytest.raises(ValueError, match=r"last.weight is torch.float32 of shape \(3, 8, 3, 3\), expected"):
        trainer(wider).load(tmp_path / "state.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(before, wider.parameters(), strict=True))


def test_processes_agree_on_a_given_average(monkeypatch: pytest.MonkeyPatch) -> None:
    agreed: list[nn.Module] = []
    monkeypatch.setattr(Processes, "agree", lambda self, module: agreed.append(module))
    model, average = network(), network()
    trainer(model, average=average)
    assert agreed == [model, average]


def test_numbers_of_numpy_are_kept_as_python_s(tmp_path: Path) -> None:
    given: dict[str, Any] = {"steps": np.int64(2), "batch_size": np.int64(4), "learning_rate": np.float32(0.5)}
    given["ema_warmup"] = np.bool_(True)
    run = trainer(network(), **given)
    run.run(checkpoint=tmp_path / "state.safetensors")
    other = trainer(network(), steps=2, batch_size=4, learning_rate=0.5)
    other.load(tmp_path / "state.safetensors")
    assert other.step == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": "3"}, r"steps: expected an int, got '3' \(str\)"),
        ({"steps": 2.0}, r"steps: expected an int, got 2.0 \(float\)"),
        ({"ema": "x"}, r"ema: expected a number, got 'x'"),
        ({"compiled": "no"}, r"compiled: expected a bool, got 'no'"),
        ({"clip": torch.tensor(1.0)}, r"clip: expected a number, got a torch.float32 tensor"),
        ({"optimizer_args": {"eps": torch.tensor(1.0)}}, r"optimizer_args: expected values that JSON can hold"),
    ],
)
def test_settings_of_another_kind_are_refused_at_once(given: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        TrainingOptions(**{**OPTIONS, **given})


def test_notes_have_names() -> None:
    with pytest.raises(ValueError, match="notes: expected names that are strings, got 1"):
        trainer(network(), notes={1: 2})


@pytest.mark.parametrize("name", ["checkpoint_every", "log_every", "report_every"])
def test_no_step_is_taken_for_an_interval_of_0(name: str) -> None:
    run, used = trainer(network()), {"checkpoint": "x", "log": print, "report": dict}
    kind = name.removesuffix("_every")
    with pytest.raises(ValueError, match=f"{name}: expected at least 1 step, got 0"):
        run.run(**{name: 0, kind: used[kind]})
    assert run.step == 0
    run.run(**{name: 0})  # nothing is done at its steps
    assert run.step == 8


def test_micro_batches_draw_masks_of_their_own() -> None:
    masks: list[Tensor] = []
    model = network(dropout=0.5)
    model.dropout.register_forward_hook(lambda module, args, result: masks.append(result == 0))
    trainer(model, micro_batch=2).advance()
    assert len(masks) == 2 and not torch.equal(*masks)


class Drawing(IterableDataset[Any]):
    """Items in an order that torch's generator draws, with noise that it draws."""

    def __iter__(self) -> Iterator[Any]:
        for index in torch.randperm(8):
            yield float(index) + 0.5 * torch.rand(())


def test_what_a_stream_draws_is_keyed() -> None:
    def read(rank: int, processes: int, first: int = 0) -> list[Tensor]:
        torch.manual_seed(rank + 10 * first)
        before = torch.get_rng_state()
        batches = Batches(Drawing(), 4, None, 0, rank=rank, processes=processes)
        found = [part.batch for step in batches.since(first, 4) for part in step]
        assert torch.equal(before, torch.get_rng_state())
        return found

    whole = read(0, 1)
    assert torch.cat(whole[:2]).floor().sort().values.tolist() == list(range(8))
    assert not torch.equal(torch.cat(whole[:2]), torch.cat(whole[2:]))
    assert torch.equal(torch.cat(read(0, 1, first=3)), whole[3])
    for step, halves in enumerate(zip(read(0, 2), read(1, 2), strict=True)):
        assert torch.equal(torch.cat(halves), whole[step])
