"""`python -m benchmarks` as a suite: what it selects, which sizes fit, what changed since an earlier run, crossings.

By made numbers: no test depends on a time.
"""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from benchmarks import __main__ as command
from benchmarks import comparison, documents, picture, report, sizes, timing
from benchmarks.__main__ import chosen, main
from benchmarks.cases import Case
from benchmarks.isolation import keep_memory
from benchmarks.measurement import Measurement, OnThreads, measure_together, merged, switching
from benchmarks.registry import FAMILIES
from benchmarks.suite import ROWS, present
from benchmarks.timing import QUICK, Timing

IMAGE = (1, 3, 32, 32)
SETTINGS = {"clock": "processor", "keeps_memory": True}
SUITE = [(family, case) for family, case in chosen((), None) if case.installed]


def time_of(median: float, spread: float = 0.02) -> Timing:
    """A timing with quartiles around its median."""
    return Timing(median, median * (1 - spread / 2), median * (1 + spread / 2), median, 21, 1)


def row(name: str = "step", *, batch: int = 1, threads: int = 1, spread: float = 0.02, **times: float) -> Measurement:
    """A measurement of these contestants' seconds."""
    found = {key: time_of(seconds, spread) for key, seconds in times.items()}
    shape = (batch, *IMAGE[1:])
    return Measurement("made", name, "cpu", threads, "processor", "float32", shape, 1000, found, {}, 0.0)


def written(path: Path, rows: Sequence[Measurement], **changes: Any) -> Path:
    """A file of these rows."""
    document = documents.document(rows, settings=SETTINGS | changes.pop("settings", {})) | changes
    path.write_text(json.dumps(document))
    return path


@pytest.fixture
def compared(tmp_path: Path) -> Callable[..., Result]:
    """The command's comparison of made rows: old, new."""

    def run(old: Sequence[Measurement], new: Sequence[Measurement], **changes: Any) -> Result:
        before, after = written(tmp_path / "old.json", old), written(tmp_path / "new.json", new, **changes)
        result = CliRunner().invoke(main, ["--from", str(after), "--compare", str(before)])
        result.output_bytes = " ".join(result.output.split()).encode()
        return result

    return run


def test_a_planted_regression_is_flagged(compared: Callable[..., Result]) -> None:
    old = [row("a", ours=1e-3, eager=5e-3), row("b", ours=1e-3, eager=5e-3)]
    result = compared(old, [old[0], row("b", ours=1.3e-3, eager=5e-3)])
    assert result.exit_code == 1
    assert "slower than before" in result.output
    assert "b 1×3×32×32 float32, 1 thread 1000.00 1300.00 1.30 3% 1.30" in result.output
    assert "2 rows compared: 1 slower, 0 faster, 1 same within the noise" in result.output


def test_a_faster_row_is_named_and_passes(compared: Callable[..., Result]) -> None:
    result = compared([row(ours=1e-3, eager=5e-3)], [row(ours=0.7e-3, eager=5e-3)])
    assert result.exit_code == 0
    assert "faster than before" in result.output and "0 slower, 1 faster" in result.output


@pytest.mark.parametrize(
    ("what", "spread", "times"),
    [
        ("the row's own noise", 0.2, {"ours": 1.2e-3, "eager": 5e-3}),
        ("below what is ever reported", 0.0, {"ours": 1.02e-3, "eager": 5e-3}),
        ("the machine became slower", 0.02, {"ours": 1.5e-3, "eager": 7.5e-3}),
        ("eager code alone became faster", 0.02, {"ours": 1e-3, "eager": 3e-3}),
    ],
)
def test_noise_is_not_flagged(
    compared: Callable[..., Result], what: str, spread: float, times: dict[str, float]
) -> None:
    result = compared([row(ours=1e-3, eager=5e-3, spread=spread)], [row(spread=spread, **times)])
    assert (result.exit_code, "1 same within the noise" in result.output) == (0, True), what


def test_several_processes_widen_the_noise() -> None:
    runs = [replace(row(ours=seconds, eager=5e-3), run=run) for run, seconds in enumerate((1e-3, 1.25e-3, 1.1e-3))]
    (pooled,) = merged(runs)
    assert pooled.times["ours"].median == 1.1e-3
    assert pooled.times["ours"].low == pytest.approx(0.99e-3) and pooled.times["ours"].high == pytest.approx(1.2625e-3)
    later = row(ours=1.3e-3, eager=5e-3)
    assert [change.verdict for change in comparison.compare(runs, [later]).changes] == ["same"]
    assert [change.verdict for change in comparison.compare(runs[:1], [later]).changes] == ["slower"]


def test_rows_in_one_run_only_are_named(compared: Callable[..., Result]) -> None:
    """A row's threads and its shape are parts of its name."""
    kept = row("kept", ours=1e-3, eager=5e-3)
    old = [kept, row("gone", batch=2, threads=2, ours=1e-3, eager=5e-3)]
    result = compared(old, [kept, row("kept", batch=4, ours=1e-3, eager=5e-3)])
    assert result.exit_code == 0
    assert "missing: gone 2×3×32×32 float32, 2 threads" in result.output
    assert "not in the old file: kept 4×3×32×32 float32, 1 thread" in result.output


def test_runs_that_cannot_be_compared(compared: Callable[..., Result], tmp_path: Path) -> None:
    rows = [row(ours=1e-3, eager=5e-3)]
    result = compared(rows, rows, settings={"clock": "wall"})
    assert result.exit_code == 1 and "clock was 'processor' and is 'wall'" in result.output
    assert "schema 1, expected 2" in compared(rows, rows, schema=1).output
    # Before anything is measured.
    old = written(tmp_path / "old.json", rows)
    result = CliRunner().invoke(main, ["--return-memory", "--clock", "processor", "--compare", str(old)])
    assert "keeps_memory was True and is False" in result.output
    (tmp_path / "no.json").write_text("no")
    assert "is no JSON" in CliRunner().invoke(main, ["--from", str(tmp_path / "no.json")]).output


def test_another_machine_is_named(compared: Callable[..., Result]) -> None:
    rows = [row(ours=1e-3, eager=5e-3)]
    changed = documents.environment() | {"torch": "1.0"}
    assert f"another machine: torch: {torch.__version__} → 1.0" in compared(rows, rows, environment=changed).output


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    rows = [row(ours=1e-3, eager=5e-3), row(threads=2, ours=1e-3)]
    found = documents.read(written(tmp_path / "rows.json", rows))
    assert found["measurements"] == rows
    assert {"memory", "system", "bicm-kernels"} <= set(found["environment"])


def test_the_suite_is_every_row_of_its_list() -> None:
    assert [case.name for _, case in chosen((), None)] != []
    assert {(f, case.name) for f, case in chosen((), None)} == {
        (f, name) for f, names in ROWS.items() for name in names
    }
    assert [case.name for _, case in chosen((), ("bct_loss", "normal"))] == ["bct_loss"]
    assert [case.name for _, case in chosen(("noise",), None)] == [case.name for case in FAMILIES["noise"]]
    assert len(chosen(("all",), None)) == sum(map(len, FAMILIES.values()))


def test_an_absent_package_takes_one_line() -> None:
    here, gone = FAMILIES["noise"][0], replace(FAMILIES["noise"][0], package="no_such_package")
    found, lines = present([("x", here), ("x", replace(gone, name="a")), ("x", replace(gone, name="b"))])
    assert found == [("x", here)]
    assert lines == ["no_such_package is not installed: without a, b"]


@pytest.mark.parametrize("case", [case for _, case in SUITE], ids=[case.name for _, case in SUITE])
def test_every_row_takes_video_latents(case: Case) -> None:
    assert case.error((3, 4, 3, 5, 6), torch.float32) <= 1


def test_sizes_from_an_image_to_two_gigabytes() -> None:
    counts = [4 * math.prod(shape) for shape in sizes.SHAPES.values()]
    assert counts == sorted(set(counts))
    assert next(iter(sizes.SHAPES.values())) == IMAGE
    assert 1.9e9 < counts[-1] < 2.1e9


def test_what_does_not_fit_is_skipped_and_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case = next(case for _, case in SUITE if case.name == "sampler_bdia")
    small, large = sizes.SHAPES["cifar"], sizes.SHAPES["video-103"]
    # Three inputs, four temporaries, the four passes of the copy.
    assert sizes.needed(case, small, torch.float32) == 3072 * 4 * (3 + 4 + 4)
    assert sizes.fitting(case, [small, large], "float32", torch.float32, 10**12) == ([small, large], [])
    fits, skipped = sizes.fitting(case, [small, large], "float32", torch.float32, 10**10)
    assert fits == [small] and [found.shape for found in skipped] == [large]
    loss = next(case for _, case in SUITE if case.name == "bct_loss")
    assert sizes.needed(loss, small, torch.float32) > 2 * sizes.needed(case, small, torch.float32)

    monkeypatch.setattr(sizes, "free_memory", lambda: 1000)
    path = tmp_path / "figures.json"
    arguments = ["--cases", "sampler_bdia", "--shapes", "cifar,2x3x8x8", "--threads", "1", "--json", str(path)]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "sampler_bdia float32 1×3×32×32: not measured, it may need 0.0 GB where 0.0 GB are free" in result.output
    document = json.loads(path.read_text())
    assert document["measurements"] == [] and len(document["skipped"]) == 2
    assert document["settings"]["keeps_memory"] is True


def test_an_interrupted_run_leaves_what_it_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, done = tmp_path / "figures.json", [row("normal", ours=1e-3, eager=5e-3)]
    answers = iter([done])
    monkeypatch.setattr(command, "measure_apart", lambda *_, **__: next(answers))
    with pytest.raises(StopIteration):
        CliRunner().invoke(main, ["noise", "--json", str(path)], catch_exceptions=False)
    assert documents.read(path)["measurements"] == done


def test_free_memory_is_a_number_of_bytes() -> None:
    assert 10**7 < sizes.free_memory() < 10**15


def test_crossings() -> None:
    # On a logarithmic line from 1/4 to 4 the middle is 1.
    assert picture.crossings([(1e3, 0.25), (1e5, 4.0)]) == [pytest.approx(1e4)]
    assert picture.crossings([(1e3, 2.0), (1e4, 2.0)]) == []
    assert picture.verdict([(1e3, 0.25), (1e5, 4.0)]) == "from 10 kB"
    assert picture.verdict([(1e3, 4.0), (1e5, 0.25)]) == "up to 10 kB"
    assert picture.verdict([(1e3, 0.25), (1e5, 4.0), (1e7, 0.25)]) == "10 kB to 1.0 MB"
    assert picture.verdict([(1e3, 4.0), (1e5, 0.25), (1e7, 4.0)]) == "up to 10 kB, from 1.0 MB"
    assert (picture.verdict([(1e3, 2.0)]), picture.verdict([(1e3, 0.5)])) == ("at every size", "at no size")


def test_the_plot_marks_the_crossover() -> None:
    slow, fast = row(ours=2e-6, compile=1e-6, eager=1e-5), row(batch=4, ours=3e-6, compile=6e-6, eager=1e-4)
    axes = picture.draw([fast, slow]).axes[0]
    (mark,) = [line for line in axes.lines if line.get_gid() == "crossover"]
    assert mark.get_xdata()[0] == pytest.approx(2 * 12_288)
    curve = next(line for line in axes.lines if line.get_label() == picture.LABELS["ours"])
    assert list(curve.get_xdata()) == [12_288, 4 * 12_288] and list(curve.get_ydata()) == [2e-6, 3e-6]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    shown = [text.get_text() for text in axes.texts]
    assert shown == ["faster than compile from 25 kB"]


def test_the_tables_of_made_rows(capsys: pytest.CaptureFixture[str]) -> None:
    one = row(ours=1.8e-3, eager=9e-3, compile=0.9e-3, copy=3e-3)
    two = row(threads=2, ours=1e-3, eager=6e-3, compile=2e-3, copy=2e-3)
    report.show([one, two], about={"processor": "made"})
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "processor made" in lines
    headings = [line for line in lines if line.startswith("op dtype elements")]
    assert [line.endswith("of bound vs 1 thread copy vs 1 thread") for line in headings] == [False, True]
    # 1.8 ms on one thread, a copy 3 ms
    assert next(line for line in lines if "1.00 ms" in line).endswith("2.00 1.80 1.50")
    assert "step float32 1 12 kB … 12 kB 5.00 … 5.00 0.50 … 0.50 at no size" in lines
    assert "step float32 2 12 kB … 12 kB 6.00 … 6.00 2.00 … 2.00 at every size" in lines


def test_thread_counts_take_turns() -> None:
    seen: list[tuple[str, int]] = []
    case = Case("case", lambda x: x, lambda x: x, tensors=1, reads=1, writes=1)

    def sample(call: Any, repeats: int) -> float:
        function = call.func.__name__ if hasattr(call, "func") else ""
        seen.append((function, torch.get_num_threads()))
        return 1e-3

    before = torch.get_num_threads()
    found = measure_together(
        "made", case, IMAGE, "float32", thread_counts=(1, 2), compile_too=False, effort=QUICK, sampler=sample
    )
    assert torch.get_num_threads() == before
    assert [m.threads for m in found] == [1, 2]
    assert all(set(m.times) == {"ours", "eager", "copy"} for m in found)
    # Three contestants on one thread, then on two, in every round from another one on.
    assert [count for _, count in seen[-18:]] == [1, 1, 1, 2, 2, 2, 1, 1, 2, 2, 2, 1, 1, 2, 2, 2, 1, 1]
    assert switching(lambda call, repeats: float(torch.get_num_threads()))(OnThreads(2, int), 1) == 2.0
    torch.set_num_threads(before)


def test_a_long_call_is_tried_once() -> None:
    calls: list[int] = []
    assert timing.repeats_for(int, lambda call, repeats: (calls.append(repeats), 1.0)[1], seconds=5e-3) == 1
    assert calls == [1]


def faults_of_large_blocks(kept: bool) -> int:
    """Minor page faults of the fifth use of a 64 MiB block, which the C library maps by default."""
    if kept:
        keep_memory()
    for _ in range(4):
        torch.zeros(16 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.slow
def test_memory_is_kept_in_blocks_of_any_size() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        returned, kept = pool.map(faults_of_large_blocks, [False, True])
    assert returned > 100 > kept


def test_an_unknown_scheduler_is_no_measurement_of_none() -> None:
    pytest.importorskip("diffusers")
    from benchmarks.bench_adapters import main as adapters

    result = CliRunner().invoke(adapters, ["DDIMScheduler"])
    assert result.exit_code == 2 and "'DDIM'" in result.output
