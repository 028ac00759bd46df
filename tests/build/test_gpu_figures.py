"""The figures of a GPU, on the CPU: every table to its end, and none lost to a contestant that fails."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu_clock, gpu_figures
from benchmarks.cases import Case
from benchmarks.gpu_clock import Row
from benchmarks.registry import FAMILIES


class Host(gpu_clock.Clock):
    """Times calls where there is no GPU."""

    def graph(self, calls: Sequence[Callable[[], object]]) -> float:
        return self.host(calls[0], 1)

    def host(self, call: Callable[[], object], count: int = 1) -> float:
        call()
        return 1.0

    def wait(self) -> None:
        pass

    def stream(self) -> None:
        pass

    def restore(self, stream: object) -> None:
        pass

    def operations(self, call: Callable[[], object]) -> int:
        call()
        return 1


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything on the CPU: on a machine without a GPU nothing else would run these lines."""
    for name, value in {"DEVICE": "cpu", "SHAPES": ((2, 3, 8, 8),) * 5, "LOSS_SHAPES": ((2, 3, 8, 8),) * 3}.items():
        monkeypatch.setattr(gpu_figures, name, value)
    monkeypatch.setattr(gpu_figures, "ROTATED", 1)
    monkeypatch.setattr(gpu_figures, "bounds", lambda clock: [{"copy TB/s": 3.0}])
    monkeypatch.setattr(gpu_figures, "loops", partial(gpu_figures.loops, steps=2, side=8))


@pytest.mark.usefixtures("small")
def test_to_their_end() -> None:
    kept: list[list[str]] = []
    found = gpu_figures.measured(Host(rounds=1), 1e6, compile_too=False, keep=lambda found: kept.append([*found]))
    names = ["bounds", "host, µs a call", "loops", "kernels, µs"]
    assert kept == [["backend", *names[: k + 1]] for k in range(len(names))]
    assert gpu_figures.stopped(found) == []
    cases = [case for name in gpu_figures.OPS for case in FAMILIES[name]]
    shapes = sum(3 if case.trains else 5 for case in cases)
    assert len(found["kernels, µs"]) == 2 * shapes
    assert len(found["host, µs a call"]) == len(cases) + 1
    rows = [row for table in found.values() if isinstance(table, list) for row in table]
    assert not [row for row in rows if any("failed" in name for name in row)]
    gpu_figures.once()


@pytest.mark.usefixtures("small")
def test_a_table_that_stops_keeps_its_rows_and_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def two_rows(*_: object) -> Iterator[Row]:
        yield {"case": "one"}
        raise RuntimeError("a reason")

    monkeypatch.setattr(gpu_figures, "hosts", two_rows)
    kept: list[dict[str, Any]] = []
    found = gpu_figures.measured(
        Host(rounds=1), 1e6, False, keep=lambda found: kept.append(json.loads(json.dumps(found)))
    )
    assert found["host, µs a call"] == [{"case": "one"}, {"table failed": "RuntimeError: a reason"}]
    assert gpu_figures.stopped(found) == ["host, µs a call"]
    assert found["loops"] and found["kernels, µs"]
    assert kept[-1] == found


@pytest.mark.usefixtures("small")
def test_no_figure_is_lost_to_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs that do not fit, and schedulers that are not there."""

    def full(case: Case, *_: object) -> list[Tensor]:
        if case.name == "normal":
            raise torch.OutOfMemoryError("no memory is left")
        return inputs(case, (2, 3, 8, 8), torch.float32)

    def absent(*_: object) -> dict[str, Callable[[], object]]:
        raise ImportError("no scheduler")

    inputs = gpu_figures.inputs_of
    rows = gpu_figures.loops
    monkeypatch.setattr(gpu_figures, "inputs_of", full)
    monkeypatch.setattr(gpu_figures, "diffusers_loops", absent)
    table = {row["case"]: row for row in gpu_figures.kernels(Host(rounds=1), gpu_figures.Budget(1e6), False, 3.0)}
    assert table["normal"]["case failed"] == "OutOfMemoryError: no memory is left"
    assert all("ours" in row for name, row in table.items() if name != "normal")
    assert [row["loop failed"] for row in rows(Host(rounds=1)) if "loop failed" in row] == [
        "ImportError: no scheduler"
    ] * 2


@pytest.mark.usefixtures("small")
def test_no_graph_of_what_reads_on_the_host() -> None:
    """A capture of diffusers' own step fails always: it reads the timestep."""
    pytest.importorskip("diffusers", reason="needs the extra [diffusers]")
    rows = [*gpu_figures.loops(Host(rounds=1))]
    assert {row["loop"] for row in rows if "µs, graph" not in row} == {"diffusers DDIM"}
    assert {row["loop"] for row in rows} > {"diffusers DDIM", "diffusers DDIM, accelerated"}
    assert all("µs" in row for row in rows)


@pytest.mark.usefixtures("small")
def test_bounds_have_inputs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(gpu_figures, "DEVICE", "cpu")
    sets: list[int] = []

    class Counts(Host):
        def graph(self, calls: Sequence[Callable[[], object]]) -> float:
            sets.append(len(calls))
            return 2.0

    monkeypatch.setattr(gpu_figures, "normal", lambda shape: torch.empty(8))
    first, second = gpu_figures.bounds(Counts())
    assert sets == [4, 4, 33, 33]
    assert first["copy TB/s"] == pytest.approx(8 * 2**28 / 2e-6 / 1e12)
    assert second["MB"] == pytest.approx(4.194304)


def test_inputs_leave_torchs_generator_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may refuse to draw after a capture that failed."""
    monkeypatch.setattr(gpu_figures, "DEVICE", "cpu")
    before = torch.get_rng_state()
    for case in (case for name in gpu_figures.OPS for case in FAMILIES[name]):
        x, y = (gpu_figures.inputs_of(case, (2, 3, 8, 8), torch.bfloat16) for _ in range(2))
        assert not torch.equal(x[0], y[0])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("together", "has"), [(1, True), (1 << 30, False)])
def test_what_stays_in_the_cache_is_no_part_of_a_copy(
    monkeypatch: pytest.MonkeyPatch, together: int, has: bool
) -> None:
    monkeypatch.setattr(gpu_figures, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_figures, "ROTATED", together)
    row: Row = {}
    case = next(case for case in FAMILIES["multistep"] if case.name == "ddim_step")
    gpu_figures.time_case(Host(rounds=1), row, case, (1, 3, 8, 8), torch.float32, False, 3.0)
    assert ("of copy" in row) == has
    assert row["MB together"] == row["MB"] * (1 if has else gpu_figures.MOST_CALLS)


class OldCuda:
    """What a capture that fails leaves behind in torch 2.12: its stream, the allocator's pool and the generator."""

    def __init__(self) -> None:
        self.underway, self.invalid = set[int](), False
        self.default, self.pools = ["idle"], itertools.count()
        device = SimpleNamespace(index=0)
        self.main, self.side = SimpleNamespace(device=device), SimpleNamespace(device=device)
        self.stream = self.main

    @contextmanager
    def graph(self, graph: object, pool: int) -> Iterator[None]:
        assert not self.underway, "captures_underway.empty()"
        before, self.stream, self.invalid = self.stream, self.side, False
        self.underway.add(pool)
        self.default[0] = "captures"
        try:
            yield
        finally:
            if self.invalid:
                raise RuntimeError("operation failed due to a previous error during capture")
            self.underway.discard(pool)
            self.stream, self.default[0] = before, "idle"

    def read_on_the_host(self) -> None:
        self.invalid = True
        raise RuntimeError("operation not permitted when stream is capturing")

    def draw(self) -> None:
        assert self.default[0] == ("captures" if self.underway else "idle"), "Offset increment outside graph capture"

    def end_pool(self, device: int, pool: int) -> None:
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)

    def torch(self) -> SimpleNamespace:
        def set_state(state: str) -> None:
            self.default[0] = state

        cuda = SimpleNamespace(
            CUDAGraph=object,
            graph=self.graph,
            graph_pool_handle=lambda: next(self.pools),
            current_device=lambda: 0,
            current_stream=lambda: self.stream,
            set_stream=lambda stream: setattr(self, "stream", stream),
            default_generators=[SimpleNamespace(graphsafe_set_state=set_state)],
        )
        fresh = SimpleNamespace(graphsafe_get_state=lambda: "idle")
        private = SimpleNamespace(_cuda_endAllocateToPool=self.end_pool)
        return SimpleNamespace(cuda=cuda, Generator=lambda device: fresh, _C=private)


def test_a_capture_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, row = OldCuda(), Row()
    monkeypatch.setattr(gpu_clock, "torch", cuda.torch())
    clock = gpu_clock.Clock()

    def length(*calls: Callable[[], None]) -> float:
        return len(gpu_clock.captured(calls)[1])

    clock.attempt(row, "draws", partial(length, cuda.draw, cuda.draw))
    clock.attempt(row, "reads", partial(length, cuda.draw, cuda.read_on_the_host))
    assert cuda.stream is cuda.main
    cuda.draw()
    clock.attempt(row, "an error of Python", partial(length, lambda: int("x")))
    clock.attempt(row, "draws again", partial(length, cuda.draw))
    assert row == {
        "draws": 2,
        "reads failed": "RuntimeError: operation failed due to a previous error during capture",
        "an error of Python failed": "ValueError: invalid literal for int() with base 10: 'x'",
        "draws again": 1,
    }


def test_torchs_names_that_a_failed_capture_needs() -> None:
    assert {"graphsafe_get_state", "graphsafe_set_state"} <= {*dir(torch.Generator)}
    assert {"default_generators", "graph_pool_handle"} <= {*dir(torch.cuda)}
    assert hasattr(torch._C, "_cuda_endAllocateToPool")
