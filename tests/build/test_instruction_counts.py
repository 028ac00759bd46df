"""The guard of instruction counts: what it reads, what it finds at fault, and that its table has every row."""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path
from types import FrameType

import pytest
from click.testing import CliRunner

from benchmarks import disassembly, instruction_counts
from benchmarks.instruction_counts import LIMITS, SECTIONS, Comparison, compare, counts_of, line, totals

HERE = {"compiler": "a compiler", "python": "a Python", "torch": "a torch", "libc": "a libc"}


# --- what is read ---------------------------------------------------------------------------------------------------


def test_totals_that_were_asked_for(tmp_path: Path) -> None:
    parts = {
        "counts.7.1": "version: 1\ndesc: Trigger: Client Request: calls|ddim_step, out|8\nevents: Ir\n\ntotals: 800\n",
        "counts.7.2": "version: 1\ndesc: Trigger: Program termination\nevents: Ir\n\ntotals: 31\n",
        "other": "desc: Trigger: Client Request: calls|ddim_step, out|16\ntotals: 9\n",
    }
    for name, text in parts.items():
        (tmp_path / name).write_text(text)
    assert totals(tmp_path) == {"calls|ddim_step, out|8": 800}


def test_counts_are_of_one_more_call_or_element() -> None:
    found = {"calls|a|8": 10_080, "calls|a|40": 10_400}
    found |= {"elements, avx2|a|98304": 200_000, "elements, avx2|a|16384": 77_120}
    counts = counts_of(found)
    assert counts["calls"] == {"a": 10.0}
    assert counts["elements, avx2"] == {"a": 1.5}
    assert set(counts) == set(SECTIONS)


LISTING = """
/a/library.so:     file format elf64-x86-64

0000000000001000 <void bicm::avx512::(anonymous namespace)::fold<1, (bicm::Way)0>(bicm::Unit const&, float)>:
    1000:\tpush   %rbx
    1001:\tvmovups (%rdi),%zmm0
    1005:\tvaddps %zmm0,%zmm1,%zmm1
    100a:\tcmp    %rax,%rbx
    100d:\tjne    1001 <void bicm::avx512::(anonymous namespace)::fold<1, (bicm::Way)0>(bicm::Unit const&, float)+0x1>
    100f:\tdec    %rcx
    1012:\tjne    1000 <void bicm::avx512::(anonymous namespace)::fold<1, (bicm::Way)0>(bicm::Unit const&, float)>
    1014:\tmov    %al,(%rdi)
    1016:\tdec    %rdx
    1018:\tjg     1014 <void bicm::avx512::(anonymous namespace)::fold<1, (bicm::Way)0>(bicm::Unit const&, float)+0x14>
    101a:\tjmp    1100 <bicm::avx512::noise(bicm::Noise const&, long, long)>

0000000000001100 <bicm::avx512::noise(bicm::Noise const&, long, long)>:
    1100:\tvaddps %zmm0,%zmm1,%zmm1
    1104:\tjmp    1001 <void bicm::avx512::(anonymous namespace)::fold<1, (bicm::Way)0>(bicm::Unit const&, float)+0x1>

0000000000001200 <void bicm::avx512::(anonymous namespace)::fold<2, (bicm::Way)0>(bicm::Unit const&, float)>:
    1200:\tvaddps %zmm0,%zmm1,%zmm1
    1204:\tjne    1200 <void bicm::avx512::(anonymous namespace)::fold<2, (bicm::Way)0>(bicm::Unit const&, float)>

0000000000001300 <bicm::avx2::noise(bicm::Noise const&, long, long)>:
    1300:\tvaddps %zmm0,%zmm1,%zmm1
    1304:\tjne    1300 <bicm::avx2::noise(bicm::Noise const&, long, long)>
"""


def test_innermost_loops_over_vectors() -> None:
    """Four instructions around a jump back and two of another instance; not the loop around them, nor that of bytes."""
    assert disassembly.loop_lengths(LISTING.splitlines(), "avx512", "%zmm") == {"fold": 4 + 2}


@pytest.mark.parametrize(
    ("demangled", "name"),
    [
        ("bicm::avx512::noise(bicm::Noise const&, long, long)", "noise"),
        ("bicm::avx512::(anonymous namespace)::normals_of(float const*, float*)", "normals_of"),
        ("float bicm::avx512::(anonymous namespace)::draw<float>(bicm::Multistep const&, A<B<float>>&)", "draw"),
        ("A<double> bicm::avx512::(anonymous namespace)::numbers_of<double>(bicm::PseudoHuber const&)", "numbers_of"),
        ("void bicm::avx512::(anonymous namespace)::draw<(bicm::Distribution)0>(bicm::Noise const&)", "draw"),
        ("bool bicm::avx512::step_all<false>(long*, long) [clone .part.0]", "step_all"),
    ],
)
def test_plain_names(demangled: str, name: str) -> None:
    assert disassembly.plain_name(demangled) == name


# --- what is at fault -----------------------------------------------------------------------------------------------


def of(section: str, limit: float | None, count: float | None) -> Comparison:
    return Comparison(section, "ddim_step", limit, count)


@pytest.mark.parametrize("section", SECTIONS)
def test_a_count_above_its_limit(section: str) -> None:
    tolerance = SECTIONS[section].tolerance
    assert 0 < tolerance <= 0.05
    assert of(section, 1000, 1000 * (1 + tolerance) + 1).fault == "is too high"
    assert of(section, 1000, 1000 * (1 + tolerance) - 1).fault == ""
    assert of(section, 1000, 1000 * (1 - tolerance) - 1).fault == ("has changed" if section.startswith("loops") else "")
    assert of(section, None, 10).fault == "has no limit"
    assert of(section, 10, None).fault == "is not counted any more"
    assert "ddim_step" in line(of(section, None, 10))


def test_every_count_is_compared() -> None:
    counts = {"calls": {"a": 1.0, "new": 2.0}, "elements, avx2": {}}
    limits = {"calls": {"a": 1.0, "gone": 3.0}}
    assert [(row.name, row.fault) for row in compare(counts, limits)] == [
        ("a", ""),
        ("gone", "is not counted any more"),
        ("new", "has no limit"),
    ]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> instruction_counts.Counts:
    """A machine on which the table was just made; what is counted there from now on."""
    counts: instruction_counts.Counts = {section: {"a": 100.0, "b": 50.0} for section in SECTIONS}
    monkeypatch.setattr(instruction_counts, "measure", lambda library: counts)
    monkeypatch.setattr(instruction_counts, "environment", lambda library: HERE)
    monkeypatch.setattr(instruction_counts, "missing_tool", lambda: None)
    monkeypatch.setattr(instruction_counts, "has_avx2", lambda: True)
    monkeypatch.setattr(instruction_counts, "LIMITS", tmp_path / "limits.json")
    status, printed = run("--update")
    assert status == 0 and printed.endswith("limits.json: 12 of 12 limits are new\n")
    return counts


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(instruction_counts.main, arguments)
    return done.exit_code, done.output


def test_the_command_passes_where_nothing_changed(measured: instruction_counts.Counts) -> None:
    status, printed = run()
    assert status == 0
    assert "12 of 12 counts compared, 0 at fault" in printed
    assert not re.search(r" a ", printed)
    assert run("--all")[1].count(" a ") == len(SECTIONS)


@pytest.mark.parametrize("section", SECTIONS)
def test_the_command_fails_where_a_count_rose(measured: instruction_counts.Counts, section: str) -> None:
    measured[section]["a"] *= 1.1
    status, printed = run()
    assert status == 1
    (row,) = [row for row in printed.splitlines() if "is too high" in row]
    assert row.startswith(section) and "+10.0%" in row
    assert "--update" in printed
    assert run("--update")[0] == 0
    assert run()[0] == 0


def test_an_update_of_chosen_rows_leaves_the_others(measured: instruction_counts.Counts) -> None:
    measured["calls"] = {"a": 130.0, "ba": 7.0}
    measured["elements, avx2"]["b"] = 60.0
    status, printed = run("--update", "--only", "a")
    assert status == 0 and printed.endswith("limits.json: 2 of 13 limits are new\n")
    assert [line.split()[:2] for line in printed.splitlines()[:-1]] == [["calls", "a"], ["calls", "ba"]]
    status, printed = run()
    assert status == 1  # b has grown, and is gone from the calls
    assert "is not counted any more" in printed and "2 at fault" in printed
    assert run("--only", "a")[0] == 1


def test_rows_of_two_environments_are_not_mixed(
    measured: instruction_counts.Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = instruction_counts.LIMITS.read_text()
    monkeypatch.setattr(instruction_counts, "environment", lambda library: HERE | {"torch": "another"})
    measured["calls"]["a"] = 130.0
    assert run("--update", "--only", "a")[0] == 1
    assert instruction_counts.LIMITS.read_text() == before


def test_another_environment_adds_the_rows_that_have_no_limit(
    measured: instruction_counts.Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = json.loads(instruction_counts.LIMITS.read_text())
    monkeypatch.setattr(instruction_counts, "environment", lambda library: HERE | {"torch": "another"})
    for section in SECTIONS:
        measured[section] |= {"a": 130.0, "a_new": 7.0}
    status, printed = run("--update", "--only", "a")
    assert status == 0
    assert "3 limits are from another torch and stay" in printed
    table = json.loads(instruction_counts.LIMITS.read_text())
    assert table["environment"] == before["environment"]
    assert all(limits["a_new"] == 7.0 and limits["b"] == 50.0 for limits in table["limits"].values())
    own = {section for section, limits in table["limits"].items() if limits["a"] == 100.0}
    assert own == {section for section in SECTIONS if "torch" in SECTIONS[section].needs}


@pytest.mark.parametrize(
    ("other", "compared"),
    [({"python"}, 6), ({"torch"}, 6), ({"libc"}, 6), ({"compiler"}, 0), ({"python", "torch"}, 6), (set(HERE), 0)],
)
def test_another_machine_is_held_to_what_is_the_same_there(
    measured: instruction_counts.Counts, monkeypatch: pytest.MonkeyPatch, other: set[str], compared: int
) -> None:
    there = HERE | dict.fromkeys(other, "another")
    monkeypatch.setattr(instruction_counts, "environment", lambda library: there)
    for section in ("calls", "calls through the dispatcher"):
        measured[section]["a"] *= 2
    status, printed = run()
    assert status == 0
    assert f"{compared} of 12 counts compared, 0 at fault" in printed
    assert "calls: printed, not compared" in printed
    measured["elements, avx2"]["a"] *= 2
    assert run()[0] == (1 if compared else 0)


def test_a_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instruction_counts, "missing_tool", lambda: "valgrind")
    status, printed = run()
    assert status == 1
    assert "valgrind is needed: apt-get install valgrind" in printed
    monkeypatch.undo()
    monkeypatch.setattr(instruction_counts.shutil, "which", lambda name: None if name == "readelf" else f"/bin/{name}")
    assert "readelf is needed" in run()[1]


def test_a_processor_without_avx2_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instruction_counts, "missing_tool", lambda: None)
    monkeypatch.setattr(instruction_counts, "has_avx2", lambda: False)
    status, printed = run()
    assert status == 1
    assert "no AVX2" in printed


# --- the table ------------------------------------------------------------------------------------------------------


def test_the_table_has_a_limit_for_every_call_and_loop() -> None:
    from benchmarks.counted_calls import ON_GPU, rows

    table = json.loads(LIMITS.read_text())
    limits = table["limits"]
    assert set(limits) == set(SECTIONS)
    assert set(table["environment"]) == set(HERE)
    every = list(rows())
    assert len({row.name for row in every}) == len(every)
    assert {row.name for row in every if row.calls} == set(limits["calls"])
    for instructions in instruction_counts.INSTRUCTION_SETS:
        assert {row.name for row in every if instructions in row.loops} == set(limits[f"elements, {instructions}"])
    assert set(limits["calls through the dispatcher"]) < set(limits["calls"])
    assert set(limits["calls on GPUs"]) == set(ON_GPU) < set(limits["calls"])
    assert all(limit > 0 for section in limits.values() for limit in section.values())


def test_the_contributors_table_is_of_these_limits() -> None:
    """`make counts` holds calls to the limits; the table shows some of them."""
    text = (Path(instruction_counts.ROOT) / "CONTRIBUTING.md").read_text()
    limits = json.loads(LIMITS.read_text())["limits"]
    shown = dict(re.findall(r"^\| `(\w+)` \| (\d+ \| \d+ \| \d+) \|$", text, re.MULTILINE))
    assert len(shown) == 7
    sections = ("calls", "calls through the dispatcher", "calls on GPUs")
    assert shown == {name: " | ".join(f"{limits[x][name] / 1000:.0f}" for x in sections) for name in shown}
    shares = [limits["calls"][name] / limits["calls through the dispatcher"][name] for name in shown]
    assert f"takes {min(shares):.0%} to {max(shares):.0%} of".replace("%", "", 1).replace("%", " %") in text


def test_every_op_is_called() -> None:
    import bicm_kernels as bk
    from benchmarks.counted_calls import rows

    named = {name: getattr(bk, name) for name in bk.__all__}
    ops = {op.__code__: name for name, op in named.items() if inspect.isfunction(op)}
    called: set[str] = set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code in ops:
            called.add(ops[frame.f_code])

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        for row in rows():
            row.make(16)()
    finally:
        sys.setprofile(before)
    assert called == set(ops.values())
    assert len(ops) > 15
