"""The record of a pair: the settings that a retrace must share with the run that made it, and checks of the result."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bicm_diffusion.samplers.notices import RetraceWarning, warn
from bicm_diffusion.schedules import Schedule

Levels: TypeAlias = Schedule | Mapping[str, tuple[float, ...]]

traced = torch.compiler.is_compiling

#: Sums per sample in a checksum.
SUMS = 64


@dataclass(frozen=True, eq=False)
class Conditions:
    """Guidance, the model's arguments and the guide of a run; compared only where a retrace missed its start."""

    guidance_scale: Any
    extra_args: Mapping[str, Any]
    guide: Any = None

    def digest(self) -> str:
        """Return a digest, which is the same in other processes for tensors and plain values."""
        found = hashlib.sha256()
        # Pairs that were stored before there were guides keep their digests.
        guide = [] if self.guide is None else [self.guide]
        _digest(found, [self.guidance_scale, sorted(self.extra_args.items()), *guide])
        return found.hexdigest()


def _digest(found: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        found.update(f"{value.dtype}{tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, list | tuple):
        for part in value:
            _digest(found, part)
    elif isinstance(value, Mapping):
        _digest(found, sorted(value.items(), key=repr))
    elif value is None or isinstance(value, str | bytes | int | float | complex):
        found.update(repr(value).encode())
    else:
        found.update(f"{type(value).__qualname__}{id(value)}".encode())


@dataclass(frozen=True, eq=False)
class Record:
    """The settings of the run that made a pair, and the pair's index.

    method, settings (gamma, increments, prediction …) and levels: another run with the same ones retraces the pair.
    index: of the pair, 0 (data) or N (noise). origin: checksums of the integers that the run began with,
    None where it did not begin exact or was traced. conditions: of that run, or their digest.
    """

    method: str
    levels: Levels
    settings: Mapping[str, Any]
    index: int
    origin: Tensor | None = None
    conditions: Conditions | str | None = None

    @property
    def steps(self) -> int:
        """The number N of steps."""
        if isinstance(self.levels, Schedule):
            return self.levels.steps
        return len(next(iter(self.levels.values()))) - 1

    def check(
        self,
        made: Record,
        caller: str,
        back: str,
        *,
        pair: str = "z",
        steps: str = "schedule",
        levels: str = "schedule",
    ) -> None:
        """Raise ValueError unless this run, by `caller`, can retrace a pair with the record `made`.

        back: the function that starts from the other end. pair, steps, levels: the caller's names of them.
        """
        if made.method != self.method:
            raise ValueError(f"{pair}: {caller} expected a pair of {self.method}, got one of {made.method}")
        if made.steps != self.steps:
            raise ValueError(f"{steps}: expected {made.steps} steps, as the pair {pair} was made in, got {self.steps}")
        if made.index == self.index:
            ends = {0: "data, index 0", self.steps: f"noise, index {self.steps}"}
            start = ends[self.steps - self.index]
            raise ValueError(
                f"{pair}: {caller} starts from {start}, got a pair at {ends[self.index]}; {back} retraces it"
            )
        for name, value in self.settings.items():
            if not _same(made.settings.get(name), value):
                raise ValueError(
                    f"{name}: expected {_shown(made.settings.get(name))}, which the pair {pair} was made with, got "
                    f"{_shown(value)} (guidance and conditions may differ)"
                )
        if made.levels is not self.levels and not traced():
            _check_levels(levels, pair, made.table(), self.table())

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Record:
        """Return the record with its checksums changed."""
        return self if self.origin is None else replace(self, origin=change(self.origin))

    def table(self) -> Mapping[str, tuple[float, ...]]:
        """Return the levels by name."""
        levels = self.levels
        if not isinstance(levels, Schedule):
            return levels
        return {"alpha": levels.alpha, "sigma": levels.sigma, "times": levels.times}

    def digest(self) -> str | None:
        """Return a digest of the conditions."""
        known = self.conditions
        return known.digest() if isinstance(known, Conditions) else known


def _check_levels(
    label: str, pair: str, made: Mapping[str, tuple[float, ...]], now: Mapping[str, tuple[float, ...]]
) -> None:
    for name, numbers in now.items():
        for i, (was, is_now) in enumerate(zip_longest(made.get(name, ()), numbers)):
            if was != is_now:
                raise ValueError(
                    f"{label}: expected {name}[{i}] = {was}, as where the pair {pair} was made, got {is_now} "
                    "(a pair is retraced on the levels that it was made on)"
                )


def _same(made: Any, now: Any) -> bool:
    """Whether two settings are equal; a factor for all samples equals the same factor per sample."""
    if traced() and (_holds_tensors(made) or _holds_tensors(now)):
        return True
    if not isinstance(made, tuple) and made is now:  # Dynamo before torch 2.13 cannot tell whether tuples are the same
        return True
    ours, theirs = _numbers(now), _numbers(made)
    if ours is None or theirs is None:
        return bool(made == now)
    if len(ours) != len(theirs):
        shorter, longer = sorted((ours, theirs), key=len)
        ours, theirs = (shorter * len(longer), longer) if len(shorter) == 1 else (ours, theirs)
    return ours == theirs


def _holds_tensors(factor: Any) -> bool:
    return any(isinstance(x, Tensor) for x in (factor if isinstance(factor, tuple) else (factor,)))


def _numbers(factor: Any) -> list[Any] | None:
    """A factor as floats or fractions, one or one per sample; None where there is none."""
    if isinstance(factor, float):
        return [factor]
    if isinstance(factor, Tensor):
        return [float(x) for x in factor.double().flatten().tolist()]
    if not isinstance(factor, tuple):
        return None
    n, m = torch.broadcast_tensors(*(torch.as_tensor(x).cpu().flatten() for x in factor))
    return list(zip(n.tolist(), m.tolist(), strict=True))


def _shown(value: Any) -> str:
    numbers = _numbers(value)
    if numbers is None:
        return repr(value)
    words = [f"{x[0]}/{x[1]} = {x[0] / x[1]:.6g}" if isinstance(x, tuple) else repr(x) for x in numbers]
    return words[0] if len(words) == 1 else f"[{', '.join(words)}]"


def checksum(*states: Tensor) -> Tensor:
    """Return checksums of integers (B, …), (B, n) int64, exact on every device."""
    return torch.cat([_sums(q.flatten(1) if q.dim() > 1 else q[:, None]) for q in states], dim=1)


def _sums(q: Tensor) -> Tensor:
    width = q.shape[1]
    if width < SUMS:
        return q
    whole = width // SUMS * SUMS
    sums = q[:, :whole].reshape(len(q), SUMS, whole // SUMS).sum(-1)
    if whole < width:
        sums[:, : width - whole] += q[:, whole:]
    return sums


def report_remainder(caller: str, start: Record, end: Record, *states: Tensor) -> None:
    """Warn where a retraced trajectory did not return to its start although the conditions are the same.

    start: of the pair that the retrace began with; end, states: of the resulting pair. Reads the device once.
    """
    if start.origin is None:
        return
    wrong = (start.origin != checksum(*states)).any(1).nonzero().flatten().tolist()
    if not wrong or (start.digest() is not None and start.digest() != end.digest()):
        return
    some = ", ".join(map(str, wrong[:4])) + (" …" if len(wrong) > 4 else "")
    warn(
        f"{caller}: {len(wrong)} of {len(states[0])} samples ({some}) did not return to the integers that the "
        "trajectory began with. Likely causes: another network or other conditions than before (intended in an "
        "edit), dropout or other randomness in it (model.eval() switches dropout off), a kernel "
        "that is not deterministic (torch.use_deterministic_algorithms)",
        RetraceWarning,
    )


@dataclass(frozen=True, eq=False)
class _HandedOut:
    """A state of a pair that a caller holds."""

    reference: weakref.ref[Tensor]
    #: The pair's, not kept alive, since it may hold a model's arguments. States of one pair share this reference,
    #: beyond the record's life too: a record has a single weak reference.
    record: weakref.ref[Record]
    method: str
    index: int
    inner: bool


_handed_out: dict[int, _HandedOut] = {}


def hand_out(z: Tensor, record: Record | None, *, inner: bool = False) -> Tensor:
    """Record a tensor as a state of a pair, by a weak reference; inner: the state at the adjacent index.

    The inner state of a single step is not recorded: it is where the trajectory began, and may begin others.
    """
    if record is not None and not traced() and not (inner and record.steps == 1):
        key = id(z)
        reference = weakref.ref(z, lambda _: _handed_out.pop(key, None))
        _handed_out[key] = _HandedOut(reference, weakref.ref(record), record.method, record.index, inner)
    return z


def take_back(z: Tensor) -> None:
    """Forget that a tensor is a state of a pair."""
    known = _handed_out.get(id(z))
    if known is not None and known.reference() is z:
        del _handed_out[id(z)]


def is_inner(z: Tensor, method: str) -> bool:
    """Whether a tensor equals the inner state of a live pair of a method, and not its other state too."""
    if traced():
        return False
    held = [(one, one.reference()) for one in list(_handed_out.values()) if one.inner and one.method == method]
    return any(x is not None and same_values(x, z) and not _at_rest(one) for one, x in held)


def _at_rest(inner: _HandedOut) -> bool:
    """Whether a pair's states are equal, as at a fixed point of the model, so that its inner one tells nothing."""
    state = inner.reference()
    others = [one.reference() for one in list(_handed_out.values()) if not one.inner and one.record is inner.record]
    return state is not None and any(x is not None and same_values(x, state) for x in others)


def same_values(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are alike in shape, dtype, device and every value; reads the device."""
    if x is y:
        return True
    return x.shape == y.shape and x.dtype == y.dtype and x.device == y.device and torch.equal(x, y)


def notice_alone(
    z: Tensor, run: Record, caller: str, *, name: str = "z", advice: str = "the pair itself, in place of its .z,"
) -> None:
    """Warn where a run starts from one state of a pair that it could retrace; raise ValueError for its inner state.

    name: the caller's name of z. advice: how to retrace the trajectory.
    """
    known = None if traced() else _handed_out.get(id(z))
    if known is None or known.reference() is not z or known.method != run.method or not z.numel():
        return  # all empty states are equal
    if known.inner:
        if _at_rest(known):
            return
        raise ValueError(
            f"{name}: {caller} got the inner state of a pair, from which no trajectory begins; {advice} retraces the "
            f"pair's trajectory ({name}.clone() starts a new one)"
        )
    if known.index == run.steps - run.index:
        warn(
            f"{name}: {caller} got one state of a pair and starts a new trajectory from it; {advice} retraces the "
            f"pair's trajectory ({name}.clone() starts a new one)",
            RetraceWarning,
        )
