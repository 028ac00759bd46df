"""The training loop: what it computes, that runs go on to the bit, and that processes change nothing but rounding."""

from __future__ import annotations

import copy
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

pytest.importorskip("safetensors", reason="checkpoints are safetensors, an extra of this package")

from safetensors.torch import load_file, save_file

from bicm_diffusion import update_average
from bicm_diffusion.objectives import Loss
from bicm_diffusion.train import (
    Step,
    Trainer,
    TrainingOptions,
    checkpoints,
    keyed_order,
    make_optimizer,
    saved_step,
    scalar_log,
    train,
)
from bicm_diffusion.train.checkpoints import read_metadata
from bicm_diffusion.train.processes import Processes
from tests.support import keyed_training
from tests.support.keyed_training import COUNT, STEPS, Items, loss, network, options, samples, trained

ROOT = Path(keyed_training.__file__).parents[2]


def trainer(dataset: Any = None, /, *, dropout: float = 0.0, **arguments: Any) -> Trainer:
    loop = {k: arguments.pop(k) for k in ("collate", "workers", "order", "notes") if k in arguments}
    data = samples() if dataset is None else dataset
    return Trainer(network(dropout=dropout), data, loss, options(**arguments), device="cpu", **loop)


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """To rounding: float64, five steps of RAdam."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        bound = 1e-12 * float(expected.abs().max())
        torch.testing.assert_close(ours[name], expected, rtol=1e-11, atol=bound, msg=name)


def test_a_run_is_the_steps_that_one_would_write() -> None:
    chosen: dict[str, Any] = {"optimizer": "adamw", "warmup": 3, "decay": "cosine", "ema": 0.5, "clip": 0.1}
    ours = trained(trainer(**chosen, weight_decay=0.1, optimizer_args={"betas": (0.8, 0.9)}))
    model, x = network(), samples().tensors[0]
    average = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.8, 0.9), weight_decay=0.1)
    for step in range(STEPS):
        ids = keyed_order(step, COUNT, batch_size=8, seed=3)
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, (step + 1) / 3) * (1 + math.cos(math.pi * step / STEPS)) / 2
        total = loss(model, (x[ids],), Step(3, step, ids, average, options())).total
        assert torch.equal(ours[f"loss {step}"], total.detach())
        optimizer.zero_grad()
        total.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert norm > 0.1
        optimizer.step()
        update_average(average, model, step=step + 1, decay=0.5)
    for kind, module in (("network", model), ("average", average)):
        for name, value in module.state_dict().items():
            torch.testing.assert_close(ours[f"{kind} {name}"], value, rtol=1e-14, atol=1e-15)
    assert ours["network seen"] == STEPS and ours["average seen"] == STEPS  # buffers, too


def test_micro_batches_change_nothing_but_rounding() -> None:
    whole = trained(trainer())
    parts = trained(trainer(micro_batch=3))
    for found in (whole, parts):
        for name in ("network seen", "average seen"):  # calls are counted
            found.pop(name)
    assert_close(parts, whole)


def test_an_epoch_visits_every_sample_once_and_the_next_in_another_order() -> None:
    epochs = [[keyed_order(5 * e + k, COUNT, batch_size=8, seed=1) for k in range(5)] for e in range(2)]
    first, second = (torch.cat(epoch) for epoch in epochs)
    assert all(torch.equal(epoch.sort().values, torch.arange(COUNT)) for epoch in (first, second))
    assert not torch.equal(first, second) and not torch.equal(first, keyed_order(0, COUNT, batch_size=40, seed=2))
    assert len(keyed_order(3, 5, batch_size=8, seed=1)) == 5


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_datasets_of_items_give_the_same_run(workers: int) -> None:
    assert_equal(trained(trainer(Items(), workers=workers)), trained(trainer()))


@pytest.mark.slow
def test_what_a_sample_draws_is_keyed_in_every_process() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    alone = trained(trainer(Items(noise=0.3)))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert_equal(trained(trainer(Items(noise=0.3), workers=2)), alone)
    assert not torch.equal(alone["loss 0"], trained(trainer())["loss 0"])


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([(x,) for x in samples().tensors[0][:20]])


def test_a_stream_is_read_in_order_and_begun_again() -> None:
    first = trainer(Stream(), micro_batch=4)
    parts = list(first.batches.since(0, STEPS))
    got = torch.cat([part.batch[0] for step in parts for part in step])
    assert torch.equal(got, samples().tensors[0][:20].repeat(2, 1))
    assert torch.cat([part.ids for step in parts for part in step]).tolist() == list(range(40))
    later = list(first.batches.since(3, STEPS))
    assert torch.equal(later[0][1].batch[0], parts[3][1].batch[0]) and len(later) == 2


@pytest.mark.parametrize("optimizer", ["radam", "adamw"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_run_goes_on_to_the_bit(optimizer: str, dropout: float, tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"optimizer": optimizer, "dropout": dropout, "micro_batch": 4, "decay": "cosine"}
    whole, first, second = (trainer(**chosen) for _ in range(3))
    expected = trained(whole)
    before = trained(first, 2)
    first.save(tmp_path / "new" / "run.safetensors")
    assert saved_step(tmp_path / "new" / "run.safetensors") == 2 and len(list((tmp_path / "new").iterdir())) == 1
    second.load(tmp_path / "new" / "run.safetensors")
    torch.manual_seed(5)
    rest = trained(second, 3)
    assert torch.equal(before["loss 1"], expected["loss 1"]) and second.step == STEPS
    for kind in ("network", "average"):
        names = [name for name in expected if name.startswith(f"{kind} ")]
        assert names and all(torch.equal(rest[name], expected[name]) for name in names)
    with pytest.raises(StopIteration):
        second.advance()


def test_checkpoints_of_other_runs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    mine, other_run = (tmp_path / name for name in ("run.123.partial", "run.other.123.partial"))
    for left in (mine, other_run):
        left.write_bytes(b"")
    trainer(notes={"data": "first"}).save(path)
    assert not mine.exists() and other_run.exists()
    for changed, message in (
        ({"seed": 4, "notes": {"data": "first"}}, "was made with options .*'seed': 3.* expected .*'seed': 4"),
        ({"seed": 4, "notes": {"data": "first"}}, r"was made with options \{'seed': 3\}, expected \{'seed': 4\}$"),
        ({"notes": {"data": "second"}}, "was made with data first, expected second"),
        ({}, "was made with data first, expected None"),
        ({"notes": {"data": "first", "more": 1}}, "was made with more None, expected 1"),
    ):
        with pytest.raises(ValueError, match=f"checkpoint: .* {message}"):
            trainer(**changed).load(path)
    other = Trainer(nn.Linear(2, 2), samples(), loss, options(), device="cpu", notes={"data": "first"})
    with pytest.raises(ValueError, match=r"checkpoint: .* is of another network"):
        other.load(path)


def test_notes_are_what_a_checkpoint_can_hold(tmp_path: Path) -> None:
    for notes in ({"torch": "2.13"}, {"step": 1}, {"options": {}}, {"data": Path("x")}, {"rate": math.nan}):
        with pytest.raises(ValueError, match="notes: expected"):
            trainer(notes=notes)
    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"checkpoint: expected a file that Trainer\.save wrote"):
        trainer().load(path)


@pytest.mark.parametrize("place", ["loss", "data"])
def test_a_step_that_failed_is_repeated_with_its_own_samples(place: str) -> None:
    fails = iter([False, False, True, *[False] * 100])

    def failing(*arguments: Any) -> Any:
        if next(fails):
            raise KeyboardInterrupt
        return loss(*arguments)

    class Failing(Items):
        def __getitem__(self, index: int) -> Any:
            if place == "data" and index == 3 and next(fails):
                raise KeyboardInterrupt
            return super().__getitem__(index)

    data = Failing() if place == "data" else samples()
    broken = Trainer(network(), data, failing if place == "loss" else loss, options(), device="cpu")
    for _ in range(4):
        try:
            broken.run()
        except KeyboardInterrupt:
            assert broken.step < STEPS
    whole = trainer()
    whole.run()
    assert broken.step == whole.step == STEPS and broken._source is None
    assert_equal(broken.average.state_dict(), whole.average.state_dict())


class Stateful(nn.Linear):
    """A module whose extra state is a tensor of its own making."""

    count = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.count += 1
        return super().forward(x)

    def get_extra_state(self) -> Tensor:
        return torch.full((1 + self.count % 2,), self.count)

    def set_extra_state(self, state: Tensor) -> None:
        self.count = int(state[0])


def test_extra_state_is_loaded_too(tmp_path: Path) -> None:
    first, second = (
        Trainer(Stateful(2, 2), TensorDataset(torch.ones(8, 2)), plain, options(batch_size=4), device="cpu")
        for _ in range(2)
    )
    first.run()
    first.save(tmp_path / "run.safetensors")
    assert first.network.count == STEPS
    second.load(tmp_path / "run.safetensors")
    assert second.network.count == STEPS


def plain(model: nn.Module, batch: Any, step: Step) -> Loss:
    value = model(batch[0], batch[0]).square().mean()
    return Loss(value, {"plain": value})


def test_an_order_may_be_written_to() -> None:
    ids = keyed_order(0, COUNT, batch_size=4, seed=9)
    before = ids.clone()
    ids += 1
    assert torch.equal(keyed_order(0, COUNT, batch_size=4, seed=9), before)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    """SIGKILL between checkpoints, twice, and a last call that finds the run complete."""
    program = f"""
import sys, time, torch
sys.path[:0] = {[str(ROOT), str(ROOT / "python")]!r}
from tests.support.keyed_training import *
from bicm_diffusion.train import train
torch.set_num_threads(1)
def slow(*args):
    time.sleep(float(sys.argv[2]))
    return loss(*args)
files = {{"checkpoint": sys.argv[1], "checkpoint_every": 3}}
train(network(dropout=.3), samples(), slow, options(steps=30), device="cpu", **files)
"""

    def begun(path: Path, pause: float) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", program, str(path), str(pause)], stderr=subprocess.PIPE)

    whole, killed = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    assert begun(whole, 0.0).wait(timeout=200) == 0
    steps = [0]
    for _ in range(2):
        victim = begun(killed, 0.05)
        deadline = time.monotonic() + 200
        while not killed.exists() or saved_step(killed) <= steps[-1]:
            assert victim.poll() is None and time.monotonic() < deadline, victim.communicate()
            time.sleep(0.01)
        victim.send_signal(signal.SIGKILL)
        assert victim.wait() == -signal.SIGKILL
        steps.append(saved_step(killed))
    assert 0 < steps[1] < steps[2] < 30
    assert begun(killed, 0.0).wait(timeout=200) == 0 and begun(killed, 0.0).wait(timeout=200) == 0
    assert read_metadata(killed) == read_metadata(whole)
    assert_equal(load_file(killed), load_file(whole))


def test_bfloat16_is_an_autocast_of_the_loss() -> None:
    seen: list[torch.dtype] = []

    def watched(model: nn.Module, batch: Any, step: Step) -> Any:
        seen.append(model.blocks[0].first(batch[0]).dtype)  # type: ignore[index, union-attr]
        return loss(model, batch, step)

    data = TensorDataset(samples().tensors[0].float())
    for precision, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        run = Trainer(network().float(), data, watched, options(precision=precision), device="cpu")
        assert run.advance().total.isfinite() and seen.pop() == dtype
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in run.network.parameters())


@pytest.mark.slow
def test_compiled_networks_train_alike() -> None:
    compiled = trainer(compiled=True)
    compiled.network._compiled_call_impl = torch.compile(compiled.network._call_impl, backend="aot_eager")
    ours, theirs = trained(compiled, 3), trained(trainer(), 3)
    assert_close(ours, theirs)


def test_reports_logs_and_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[str, int]] = []
    run = train(
        network(),
        samples(),
        loss,
        options(),
        device="cpu",
        log=lambda name, value, step: told.append((name, step)),
        report=lambda average: {"bias": average.times.bias.mean().item()},  # type: ignore[union-attr]
        report_every=2,
        log_every=2,
        progress=True,
    )
    steps = [("consistency", k) for k in (2, 4)]
    assert sorted(told) == sorted([*steps, ("bias", 2), ("bias", 4)]) and run.step == STEPS
    assert "step 4: bias" in "".join(capsys.readouterr()) and not run.average.training


def test_tensorboard_is_an_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with scalar_log(None) as log:
        assert log is None
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install \"bicm-kernels\[tensorboard\]\""), scalar_log(tmp_path):
        pass


def test_lion_comes_from_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = TrainingOptions(steps=1, batch_size=1, optimizer="lion", weight_decay=0.5)
    monkeypatch.setitem(sys.modules, "lion_pytorch", None)
    with pytest.raises(ImportError, match=r"pip install \"bicm-kernels\[lion\]\", or choose optimizer='adamw'"):
        make_optimizer(nn.Linear(1, 1).parameters(), chosen)
    module = ModuleType("lion_pytorch")
    module.Lion = torch.optim.SGD  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lion_pytorch", module)
    (group,) = make_optimizer(nn.Linear(1, 1).parameters(), chosen).param_groups
    assert group["lr"] == 1e-4 and group["weight_decay"] == 0.5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer: expected one of radam, adamw, lion, got 'sgd'"),
        ({"decay": "linear"}, "decay: expected one of constant, cosine, got 'linear'"),
        ({"precision": "float16"}, "precision: expected one of float32, bfloat16"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"micro_batch": 0}, "micro_batch: expected at least 1"),
        ({"ema": 1.5}, r"ema: expected a value in \[0, 1\], got 1.5"),
        ({"clip": -1.0}, "clip: expected a norm above 0, or None, got -1.0"),
        ({"warmup": -1}, "warmup: expected at least 0 steps, got -1"),
    ],
)
def test_wrong_options(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options(**wrong)


def test_streams_have_neither_workers_nor_an_order() -> None:
    with pytest.raises(ValueError, match="dataset: expected one with indices"):
        trainer(Stream(), workers=1)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, dict[str, Tensor]]]:
    """What each of two processes under torchrun's variables found."""
    output = tmp_path_factory.mktemp("ranks") / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    script = [str(keyed_training.__file__), str(output)]
    ran = subprocess.run([*command, *script], env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert ran.returncode == 0, ran.stderr
    return [torch.load(f"{output}.{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_two_processes_train_as_one(ranks: list[Any], parallel: str, micro_batch: int | None, tmp_path: Path) -> None:
    """The same losses, averaged gradients, weights and averages, to rounding; through a checkpoint and back."""
    run = trainer(micro_batch=micro_batch)
    expected = trained(run, 3)
    run.save(tmp_path / "run.safetensors")
    expected |= trained(run, 2) | {"step": torch.tensor(5)}
    for rank in ranks:
        found = dict(rank[parallel, micro_batch])
        for name in ("network seen", "average seen"):
            found.pop(name)
        assert_close(found, {name: x for name, x in expected.items() if name in found})
        assert len(found) == len(expected) - 2


def test_a_loader_is_no_dataset() -> None:
    with pytest.raises(TypeError, match=r"dataset: expected a Dataset, got a DataLoader; pass its \.dataset"):
        trainer(DataLoader(samples()))


@pytest.mark.parametrize("result", [torch.ones(()), Loss(torch.ones(()), {"a": 1.0})], ids=["tensor", "float"])  # type: ignore[dict-item]
def test_a_loss_of_another_kind_is_told_of(result: Any) -> None:
    run = Trainer(network(), samples(), lambda *_: result, options(), device="cpu")
    with pytest.raises(TypeError, match=r"loss: expected an object with \.total and \.terms of tensors"):
        run.advance()


@pytest.mark.parametrize(("rank", "expected"), [("3", 3), (None, 5)])
@pytest.mark.parametrize("device", [None, "cuda", torch.device("cuda")], ids=str)
def test_a_gpu_without_a_number_is_the_process_s(
    device: Any, rank: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    current = [5]
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_device", lambda chosen: current.__setitem__(0, chosen.index))
    assert Processes.joined(device).device == torch.device("cuda", expected)
    assert Processes.joined("cuda:1").device == torch.device("cuda", 1)


def test_only_the_first_process_keeps_what_was_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[torch.Size] = []
    monkeypatch.setattr(checkpoints, "whole", lambda x: gathered.append(x.shape) or x.detach())
    module = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(module.parameters())
    assert sorted(checkpoints.tensors_of({"network": module}, optimizer)) == ["network.bias", "network.weight"]
    assert checkpoints.tensors_of({"network": module}, optimizer, kept=False) == {}
    assert len(gathered) == 4
