"""One training loop for every objective: processes, accumulation, averaged weights, bit-exact resume."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset

from bicm_diffusion.consistency.shared_draws import draws_alike
from bicm_diffusion.described import described
from bicm_diffusion.ema import update_average
from bicm_diffusion.extras import extra
from bicm_diffusion.keys import TRAINING
from bicm_diffusion.objectives.evaluation import Loss
from bicm_diffusion.train import checkpoints
from bicm_diffusion.train.batches import CPU, Batches, Collate, Part
from bicm_diffusion.train.logs import Log, listed
from bicm_diffusion.train.optimizers import make_optimizer
from bicm_diffusion.train.options import TrainingOptions
from bicm_diffusion.train.processes import Blocks, Processes, gradients_kept, release
from bicm_kernels import fold_in


class Losses(Protocol):
    """The result of a loss: `Loss`, `BctLoss` and similar classes."""

    @property
    def total(self) -> Tensor:
        """The loss to be minimised, 0-d."""

    @property
    def terms(self) -> Mapping[str, Tensor]:
        """Its terms, each 0-d."""


@dataclass(frozen=True)
class Step:
    """The argument of a loss that describes the step.

    seed, step, sample_id: the key of its draws, see `key`. average: the averaged network, a predictor for
    `gc_loss`. options: those of the run.
    """

    seed: int
    step: int
    sample_id: Tensor
    average: nn.Module
    options: TrainingOptions

    @property
    def key(self) -> dict[str, Any]:
        """The arguments seed, step and sample_id of objectives and of functions that draw levels."""
        return {"seed": self.seed, "step": self.step, "sample_id": self.sample_id}


LossFunction: TypeAlias = Callable[[nn.Module, Any, Step], Losses]


class Trainer:
    """A run after `step` of its steps: network, average and optimizer.

    network: the module that is trained; it is moved to the device, and in FSDP2 changed in place. `model`, passed to
        the loss, is the network, or DistributedDataParallel around it.
    dataset: any of torch.utils.data. One with indices is read in the order of `keyed_order`, or of
        `order`, a function from a step to its samples' indices; the index is the sample's id. Random numbers that a
        sample takes from torch's own generator are keyed by (seed, step, index), in worker processes too; those of a
        stream by (seed, number of the sample). Resuming reads a stream from its start.
    loss: called as loss(model, batch, step) -> an object with `.total` and `.terms`, of samples as `collate`
        (torch's own where None) makes them of the dataset's, on the device; `step` is a `Step`. Totals are means over
        samples. Its draws from torch's generator are keyed by (seed, step, process, micro-batch).
    options: see `TrainingOptions`. device: None for the GPU of this process, where there is one.
    average: the averaged network; None for a copy of the network.
    parallel: "ddp" or "fsdp2", under torchrun. blocks(network): modules that FSDP2 shards one by one. parallel_args:
        further arguments of DistributedDataParallel or `fully_shard`.
    notes: further settings that determine the run's bits, by name, as JSON can hold them; checkpoints are compared by
        them.

    The loss and its gradient do not depend on the number of processes and micro-batches, up to rounding, where the loss
    draws only by `Step.key`. Dropout is the exception: torch draws its masks by position, and objectives key them by a
    micro-batch's first sample.
    Raises ValueError for a batch size that is not divisible by the number of processes, and for notes of other kinds.
    """

    def __init__(
        self,
        network: nn.Module,
        dataset: Dataset[Any],
        loss: LossFunction,
        options: TrainingOptions,
        *,
        average: nn.Module | None = None,
        order: Callable[[int], Tensor] | None = None,
        collate: Collate | None = None,
        workers: int = 0,
        device: torch.device | str | None = None,
        parallel: str = "ddp",
        blocks: Blocks | None = None,
        parallel_args: Mapping[str, Any] | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        self.processes = Processes.joined(device)
        self.options, self.loss, self.notes, self.step = options, loss, checkpoints.checked_notes(notes), 0
        self.batches = Batches(
            dataset,
            options.batch_size,
            options.micro_batch,
            options.seed,
            order,
            collate,
            workers,
            self.processes.rank,
            self.processes.count,
        )
        self.network = network.to(self.processes.device)
        self.processes.agree(self.network)
        self.average = copy.deepcopy(self.network) if average is None else average.to(self.processes.device)
        self.processes.agree(self.average)
        self.average.requires_grad_(False).eval()
        self.model = self.processes.wrapped(self.network, parallel, blocks, parallel_args or {})
        if parallel == "fsdp2":
            self.processes.wrapped(self.average, parallel, blocks, parallel_args or {})
        if options.compiled:
            self.network.compile()
        self.optimizer = make_optimizer(self.network.parameters(), options)
        self._source: Iterator[list[Part]] | None = None

    def advance(self) -> Loss:
        """Take one of the run's steps and return its loss, as means over the whole batch of all processes.

        Raises StopIteration after the last step of the run, and TypeError for a loss without `.total` and `.terms` of
        tensors.
        """
        # Kept once the step is taken: after an exception the next call repeats it, with the same samples.
        source, self._source = self._source or self.batches.since(self.step, self.options.steps), None
        parts = next(source)
        self.network.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate_at(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        found: dict[str, Tensor] = {}
        for number, part in enumerate(parts):
            with gradients_kept(self.model, number + 1 < len(parts)):
                for name, value in self._evaluate(part, number).items():
                    found[name] = found[name] + value if name in found else value
        if self.options.clip is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.options.clip)
        self.optimizer.step()
        self.step += 1
        self._source = source
        release(self.average)
        warm = self.step if self.options.ema_warmup else None
        update_average(self.average, self.network, step=warm, decay=self.options.ema)
        means = self.processes.mean(found)
        return Loss(means.pop(""), means)

    def _evaluate(self, part: Part, number: int) -> dict[str, Tensor]:
        """Add a micro-batch's gradients; DDP and FSDP2 divide by the number of processes, and so does `mean`."""
        device, options = self.processes.device, self.options
        batch = pytree.tree_map_only(Tensor, lambda x: x.to(device, non_blocking=True), part.batch)
        step = Step(options.seed, self.step, part.ids, self.average, options)
        place = number * self.processes.count + self.processes.rank
        key = int(fold_in(fold_in(int(fold_in(options.seed, TRAINING)), self.step), place))
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bfloat16")
        with draws_alike(key, CPU)(), draws_alike(key, device)():
            with autocast:
                loss = self.loss(self.model, batch, step)
            terms = getattr(loss, "terms", None)
            of_tensors = isinstance(terms, Mapping) and all(isinstance(x, Tensor) for x in terms.values())
            if not (of_tensors and isinstance(getattr(loss, "total", None), Tensor)):
                raise TypeError(
                    "loss: expected an object with .total and .terms of tensors, as objectives return, got "
                    f"{described(loss)}; objectives.Loss(total, {{name: term}}) is one"
                )
            weight = part.share * self.processes.count
            torch.autograd.backward(loss.total * weight)
        values = {"": loss.total, **loss.terms}
        return {name: value.detach() * weight for name, value in values.items()}

    def save(self, path: str | Path) -> None:
        """Write the whole state; a kill at any moment leaves the old file or the new one. All processes call it."""
        modules = {"network": self.network, "average": self.average}
        release(self.network)
        release(self.average)
        tensors = checkpoints.tensors_of(modules, self.optimizer, kept=self.processes.rank == 0)
        if self.processes.rank == 0:
            metadata = {name: json.dumps(value) for name, value in self._identity().items()}
            checkpoints.save(Path(path), tensors, {**metadata, "step": str(self.step), "torch": torch.__version__})
        self.processes.wait()

    def load(self, path: str | Path) -> None:
        """Load a checkpoint of `save`, with any number of processes.

        Raises ValueError for a checkpoint of other options, notes or another network, and for another file.
        """
        metadata = checkpoints.read_metadata(Path(path))
        if "step" not in metadata:
            raise ValueError(f"checkpoint: expected a file that Trainer.save wrote, got {path}")
        checkpoints.check_same(Path(path), metadata, self._identity())
        checkpoints.load(Path(path), {"network": self.network, "average": self.average}, self.optimizer)
        self.step, self._source = int(metadata["step"]), None

    def _identity(self) -> dict[str, Any]:
        return {**self.notes, "options": asdict(self.options)}

    def run(
        self,
        *,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 1000,
        log: Log | None = None,
        log_every: int = 1,
        report: Callable[[Any], Mapping[str, float]] | None = None,
        report_every: int = 1000,
        progress: bool = False,
    ) -> None:
        """Take the remaining steps.

        checkpoint: a file, written every `checkpoint_every` steps and after the last. log: called with (name, value,
        step) by the first process, for the terms of the losses of every `log_every` steps (reading them syncs the
        device), and for the figures of reports. report: called with the averaged network every `report_every` steps,
        returns figures by name, on all processes. progress: a bar of tqdm.
        """
        intervals = (
            ("checkpoint", checkpoint_every, checkpoint is not None),
            ("log", log_every, log is not None or progress),
            ("report", report_every, report is not None),
        )
        for name, every, used in intervals:
            if used and not every >= 1:
                raise ValueError(f"{name}_every: expected at least 1 step, got {every}")
        first = self.processes.rank == 0
        means: dict[str, float] = {}
        with _bar(self.options.steps, self.step, shown=progress and first) as bar:
            while self.step < self.options.steps:
                loss = self.advance()
                told: dict[str, float] = {}
                if first and (log is not None or progress) and self.step % log_every == 0:
                    told = {name: term.item() for name, term in loss.terms.items()}
                    means = {name: 0.99 * means.get(name, value) + 0.01 * value for name, value in told.items()}
                if checkpoint is not None and (self.step % checkpoint_every == 0 or self.step == self.options.steps):
                    self.save(checkpoint)
                if report is not None and self.step % report_every == 0:
                    figures = dict(report(self.average))
                    told |= figures if first else {}
                    if bar is not None:
                        bar.write(f"step {self.step}: {listed(figures)}")
                if bar is not None:
                    bar.update()
                    rate = (bar.format_dict["rate"] or 0.0) * self.options.batch_size
                    bar.set_postfix_str(f"{listed(means)}, {rate:.0f} samples/s", refresh=False)
                for name, value in told.items() if log is not None and first else ():
                    log(name, value, self.step)  # type: ignore[misc]
        self._source = None  # with its worker processes


def _bar(total: int, initial: int, *, shown: bool) -> Any:
    if not shown:
        return nullcontext()
    with extra("diffusion", "or progress=False"):
        from tqdm import tqdm
    return tqdm(total=total, initial=initial, unit="step", mininterval=1.0)


def train(
    network: nn.Module,
    dataset: Dataset[Any],
    loss: LossFunction,
    options: TrainingOptions,
    *,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 1000,
    log: Log | None = None,
    log_every: int = 1,
    report: Callable[[Any], Mapping[str, float]] | None = None,
    report_every: int = 1000,
    progress: bool = False,
    **arguments: Any,
) -> Trainer:
    """Train to the last step and return the `Trainer`; sample with its `average`.

    Where the checkpoint exists, the run resumes from it: killed at any moment and called again with the same arguments,
    it ends with the same bits on one device. Arguments: see `Trainer` and `Trainer.run`.

    >>> from torch.utils.data import TensorDataset
    >>> from bicm_diffusion.objectives import denoising_loss, draw_denoising_levels
    >>> class Network(nn.Linear):
    ...     def forward(self, scaled, t):
    ...         return super().forward(scaled)
    >>> def loss(network, batch, step):
    ...     t = draw_denoising_levels(len(batch[0]), **step.key)
    ...     return denoising_loss(network, batch[0], t, **step.key)
    >>> data = TensorDataset(torch.randn(8, 2))
    >>> train(Network(2, 2), data, loss, TrainingOptions(steps=3, batch_size=4)).step
    3
    """
    trainer = Trainer(network, dataset, loss, options, **arguments)
    if checkpoint is not None and Path(checkpoint).exists():
        trainer.load(checkpoint)
    trainer.run(
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        log=log,
        log_every=log_every,
        report=report,
        report_every=report_every,
        progress=progress,
    )
    return trainer
