"""The benchmarks measure what they say: equal results on both sides, the right bytes, a readable report."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from benchmarks import documents, overhead, report
from benchmarks.__main__ import main
from benchmarks.cases import Case, opened, shape_of
from benchmarks.measurement import DTYPES, Measurement, copy_of, measure
from benchmarks.registry import FAMILIES
from benchmarks.timing import CLOCKS, QUICK, Timing, interleave, summary

ALL_CASES = {case.name: case for cases in FAMILIES.values() for case in cases}
CASES = {name: case for name, case in ALL_CASES.items() if case.installed}

# Tensors read plus tensors written, counted by hand, times 4 bytes times 3,072 elements.
FLOAT32_BYTES = {
    "bdia_step": 49_152,
    "bdia_step_guided": 61_440,
    "bdia_inverse_step": 49_152,
    "ddim_step": 36_864,
    "affine_step_5": 73_728,
    "affine_step_noise": 36_864,
    "denoised_step": 61_440,
    "normal": 12_288,
    "uniform": 12_288,
    "add_noise": 24_576,
    "pseudo_huber": 61_440,
    "pseudo_huber_elementwise": 61_440,
    "pseudo_huber_squared": 61_440,
    "pseudo_huber_kept": 36_864,
    "pseudo_huber_elementwise_kept": 36_864,
    "pseudo_huber_squared_kept": 36_864,
    "consistency_loss_kept": 49_152,
    "consistency_loss": 86_016,
    "bct_loss": 49_152,
    "bct_loss_backward": 86_016,
    "ict_loss": 49_152,
    "gc_loss": 61_440,
    "ect_loss": 49_152,
    "ign_loss": 49_152,
    "sign_loss": 49_152,
    "sign_loss_dmd": 49_152,
    "diffusers_ddim": 36_864,
    "diffusers_euler": 49_152,
    "diffusers_dpmpp_2m": 49_152,
    "k_euler": 110_592,
    "k_heun": 258_048,
    "edm_loss": 61_440,
}


def test_every_family_has_cases_with_names_of_their_own() -> None:
    assert set(FAMILIES) >= {"multistep", "noise"}
    assert len(ALL_CASES) == sum(len(cases) for cases in FAMILIES.values())


@pytest.mark.parametrize("name", FLOAT32_BYTES)
def test_bytes_of_the_cases(name: str) -> None:
    assert ALL_CASES[name].least_bytes((1, 3, 32, 32), torch.float32) == FLOAT32_BYTES[name]
    assert ALL_CASES[name].least_bytes((2, 3, 32, 32), torch.bfloat16) == FLOAT32_BYTES[name]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_writes_are_the_results(case: Case) -> None:
    inputs = case.inputs((1, 3, 32, 32), torch.float32)
    # A number for every sample is no full tensor; a loss stands for its gradient.
    results = [x for x in opened(case.ours(*inputs, **case.coefficients)) if x.dim() != 1]
    states = sum(not x.is_floating_point() for x in results)
    assert len(results) - states == case.writes
    assert states <= case.state_passes <= states + case.states
    used = sum(matters(case, inputs, k) for k in range(case.tensors))
    assert case.reads in (0, used, used * (1 + case.trains))


def matters(case: Case, inputs: list[torch.Tensor], k: int) -> bool:
    """Whether the results depend on a tensor."""
    others = [2 * x if i == k else x for i, x in enumerate(inputs)]
    pairs = zip(*(opened(case.ours(*given, **case.coefficients)) for given in (inputs, others)), strict=True)
    return not all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_ours_and_eager_agree(case: Case, dtype: torch.dtype) -> None:
    assert case.error((16, 3, 32, 32), dtype) <= 1


def test_an_error_is_seen() -> None:
    wrong = Case("wrong", lambda x: x, lambda x: x + 1e-3, tensors=1, reads=1, writes=1)
    assert wrong.error((16, 3, 32, 32), torch.float32) > 1
    narrow = Case("narrow", lambda x: 0.9 * x, lambda x: x, tensors=1, reads=0, writes=1, noise="alone")
    assert narrow.error((16, 3, 32, 32), torch.float32) > 1


def test_shapes() -> None:
    assert shape_of(3_145_728) == (1024, 3, 32, 32)
    with pytest.raises(ValueError, match="multiple of 3072, got 3000"):
        shape_of(3000)


@pytest.mark.parametrize("name", ["bdia_step", "normal"])
def test_the_bound_moves_as_many_bytes(name: str) -> None:
    least_bytes = CASES[name].least_bytes((1, 3, 32, 32), torch.float32)
    assert 2 * copy_of(least_bytes, "cpu")().nbytes == least_bytes


def test_contestants_take_turns() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = interleave(calls, QUICK, sampler=lambda call, repeats: (call(), 1e-3)[1])
    assert "".join(order[-9:]) == "abcbcacab"
    assert {timing.rounds for timing in times.values()} == {3}


def test_the_processor_clock_leaves_waiting_out() -> None:
    def wait() -> None:
        time.sleep(0.05)

    assert CLOCKS["processor"](wait, 1) < 0.05 <= CLOCKS["wall"](wait, 1)


def test_summary() -> None:
    timing = summary([1.0, 2.0, 3.0, 4.0, 9.0], repeats=7)
    assert timing == Timing(median=3.0, low=2.0, high=4.0, best=1.0, rounds=5, repeats=7)
    assert timing.spread == pytest.approx(2 / 3)


def test_a_case_that_does_not_compile_is_named() -> None:
    def breaks(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x + 1

    case = Case("breaks", lambda x: x + 1, breaks, tensors=1, reads=1, writes=1)
    measured = measure("none", case, (1, 3, 32, 32), "float32", effort=QUICK)
    assert measured.failures["compile"]
    assert set(measured.times) == {"ours", "eager", "copy"}
    assert measured.ratio("compile") is None
    assert "failed" in report.cells(measured)


def test_ratios() -> None:
    times = {name: summary([seconds, seconds], 1) for name, seconds in [("ours", 2.0), ("eager", 8.0), ("copy", 1.0)]}
    m = Measurement("family", "case", "cpu", 1, "wall", "float32", (1, 3, 32, 32), 1000, times, {}, 0.0)
    assert (m.ratio("eager"), m.ratio("copy"), m.ratio("compile")) == (4.0, 0.5, None)
    assert m.bandwidth() == 500.0
    assert m.bandwidth("compile") is None


def test_overhead_of_triton_launches() -> None:
    pytest.importorskip("triton")
    from benchmarks import triton_overhead
    from bicm_kernels.triton_kernels import multistep

    times = triton_overhead.measure(QUICK)
    assert len(times) == 8 and all(0 < timing.median < 1 for timing in times.values())
    assert not isinstance(multistep.multistep, triton_overhead.Nothing)


def test_overhead_has_every_step_op() -> None:
    rows = overhead.measure(QUICK)
    columns = {op: {row.column for row in rows if row.op == op} for op in {row.op for row in rows}}
    assert columns.pop("torch.empty_like") == columns.pop("torch.add") == set(overhead.SIZES)
    assert set(columns) == {case.name for case in FAMILIES["multistep"]} - {"bdia_step_guided"}
    assert all(have == set(overhead.COLUMNS) for have in columns.values())
    assert report.overhead_table(rows).row_count == len(columns) + 2


@pytest.mark.slow
def test_command_line(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    figures, picture = tmp_path / "figures.json", tmp_path / "picture.png"
    result = CliRunner().invoke(
        main,
        [
            *(
                "multistep",
                "noise",
                "--quick",
                "--no-compile",
                "--cases",
                "bdia_step,normal",
                "--threads",
                "1",
            ),
            *("--sizes", "3072,6144", "--dtypes", "float32", "--json", str(figures), "--plot", str(picture)),
        ],
        catch_exceptions=False,
    )
    assert result.exit_code == 0, result.output
    assert torch.get_num_threads() == threads
    assert "multistep, 1 thread" in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")

    document = json.loads(figures.read_text())
    assert document["schema"] == documents.SCHEMA
    assert {"processor", "cores", "torch", "backend"} <= set(document["environment"])
    assert document["overhead"] == []
    rows = document["measurements"]
    assert [(row["family"], row["case"], row["elements"]) for row in rows] == [
        ("multistep", "bdia_step", 3072),
        ("multistep", "bdia_step", 6144),
        ("noise", "normal", 3072),
        ("noise", "normal", 6144),
    ]
    for row in rows:
        assert (row["dtype"], row["threads"], row["device"], row["failures"]) == ("float32", 1, "cpu", {})
        assert row["least_bytes"] == FLOAT32_BYTES[row["case"]] * row["elements"] // 3072
        assert set(row["times"]) == {"ours", "eager", "copy"}
        for timing in row["times"].values():
            assert 0 < timing["best"] <= timing["low"] <= timing["median"] <= timing["high"]
        eager = row["times"]["eager"]["median"] / row["times"]["ours"]["median"]
        assert row["ratios"]["eager"] == pytest.approx(eager)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "3000"], "multiple of 3072"),
        (["--sizes", "many"], "positive integers"),
        (["--threads", "0"], "positive integers"),
        (["--dtypes", "int8"], "expected names among float32, bfloat16, float16, got int8"),
        (["--clock", "processor", "--threads", "1,2"], "does not measure several threads"),
        (["nothing"], "'nothing' is not one of"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
