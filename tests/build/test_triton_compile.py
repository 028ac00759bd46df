"""The Triton kernels compiled for GPUs that need not be there: wide accesses, no spills, no contraction."""

from __future__ import annotations

import inspect
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bicm_kernels.triton_kernels import OPS, operands, rounding
from tests.support.triton_cases import (
    BDIA,
    DENSE,
    EXACT,
    F32,
    F64,
    I64,
    LOSSES,
    MIXED,
    ON_THE_STACK,
    OTHERS,
    POLICIES,
    RESIDENTS,
    THREADS,
    TILE,
    Case,
    last,
    resident,
    states,
)
from tests.support.triton_compilation import (
    DOUBLE,
    SM90,
    accesses,
    check_arithmetic,
    check_resources,
    compiled,
    element_loops,
    specialized,
)
from tests.support.ways import Counter as Ops


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.mark.parametrize("case", DENSE.values(), ids=DENSE)
def test_dense_tensors_move_128_bits_at_a_time(case: Case, tmp_path: Path) -> None:
    name, call, read, written = case
    binary = compiled(name, call)
    check_arithmetic(binary)
    check_resources(binary, tmp_path, registers=64)

    def moves(tensors: list[Tensor]) -> int:
        return sum(x.element_size() for x in tensors) * TILE // THREADS // 16

    expected = {("ld", 16): moves(read), ("st", 16): moves(written)}
    assert accesses(binary.asm["ptx"]) == Counter({access: count for access, count in expected.items() if count})


@pytest.mark.parametrize("case", LOSSES.values(), ids=LOSSES)
def test_losses_move_128_bits_at_a_time(case: Case, tmp_path: Path) -> None:
    """Elements are moved 128 bits at a time; where they are, nothing else is, and nothing is in double precision."""
    name, call, read, written = case
    binary = compiled(name, call)
    check_arithmetic(binary)
    check_resources(binary, tmp_path)
    (loop,) = element_loops(binary.asm["ptx"])
    assert not DOUBLE.search(loop)
    found = accesses(loop)
    for kind, tensors in (("ld", read), ("st", written)):
        assert found[kind, 16] == sum(x.element_size() for x in tensors) * TILE // THREADS // 16
    if name == "sums":
        assert set(found) == {("ld", 16)}
    elif name == "scale":  # a predicate of its own for each sample, whose factor is read before
        assert {size for _, size in found} <= {4, 16}
    else:  # the numbers of the sample, and its sum
        assert {size for _, size in found} <= {4, 8, 16}
        assert sum(count for (_, size), count in found.items() if size < 16) <= 6


@pytest.mark.parametrize("case", POLICIES.values(), ids=POLICIES)
def test_policies_move_128_bits_at_a_time(case: Case, tmp_path: Path) -> None:
    """No operation of an element is contracted or in float64; the logarithm of a sample, CUDA's, is both."""
    name, call, read, written = case
    binary = compiled(name, call)
    ptx = binary.asm["ptx"]
    check_resources(binary, tmp_path)
    found = accesses(ptx)
    for kind, tensors in (("ld", read), ("st", written)):
        assert found[kind, 16] == sum(x.element_size() for x in tensors) * TILE // THREADS // 16
    assert "fma.rn.f32" not in ptx and "div.rn.f32" not in ptx
    if name == "density_gradients":
        check_arithmetic(binary)
    else:
        (loop,) = element_loops(ptx)
        assert not DOUBLE.search(loop)


@pytest.mark.slow
@pytest.mark.parametrize("name", RESIDENTS)
def test_a_loss_with_its_gradient_reads_once(name: str, tmp_path: Path) -> None:
    """All that a sample has moves once, 128 bits at a time; only what it has one of is in double precision.

    Elementwise, where the plain formula will not do, tiles are read again in two loops, and written in one.
    """
    _, call, read, written = RESIDENTS[name]
    binary = compiled("resident", call)
    check_arithmetic(binary)
    check_resources(binary, tmp_path)
    found = accesses(binary.asm["ptx"])
    for kind, tensors, loops in (("ld", read, 2), ("st", written, 1)):
        again = TILE * loops if "elementwise" in name else 0
        assert found[kind, 16] == sum(x.element_size() * (x[0].numel() + again) for x in tensors) // THREADS // 16
    _, call, *_ = resident(tiles=1)[name]
    assert len(DOUBLE.findall(binary.asm["ptx"])) == len(DOUBLE.findall(compiled("resident", call).asm["ptx"]))


def reductions(ttgir: str) -> list[str]:
    """Which of a tile's elements lie where when they are added up: what the order of a sum depends on."""
    layouts = dict(re.findall(r"^(#\w+) = (.+)$", ttgir, re.MULTILINE))
    tiles = re.findall(r'"tt\.reduce".*?: \(tensor<1x(\d\d+x\w+), (#\w+)>\)', ttgir, re.DOTALL)
    return [f"{shape} {layouts[name]}" for shape, name in tiles]


@pytest.mark.parametrize("name", RESIDENTS)
def test_a_loss_is_summed_alike_with_its_gradient(name: str) -> None:
    _, call, read, _ = RESIDENTS[name]
    binary = compiled("resident", call)
    op, kind, _ = name.split(" ", 2)
    (forward,) = [case for title, case in LOSSES.items() if title == f"{op} {kind} float32"]
    closure = inspect.signature(forward[1]).parameters
    alone = compiled("sums", lambda: OPS[op](*read, *closure["call"].default))
    found = reductions(binary.asm["ttgir"])
    assert len(found) == (4 if kind == "elementwise" else 2)  # there, of distances read again, too
    assert found[:2] == found[-2:] == reductions(alone.asm["ttgir"])


@pytest.mark.parametrize("reduction", range(3))
def test_the_end_of_a_loss(reduction: int, tmp_path: Path) -> None:
    """A program's sum is stored before it counts, and the last program reads the others' past its own cache."""
    x = states(F32, F32, shape=(40, 20_000))
    binary = compiled("sums", lambda: OPS["pseudo_huber"](*x, None, None, 0, reduction))
    check_arithmetic(binary)
    check_resources(binary, tmp_path)
    order = r"st\.global\.b64.*?bar\.sync.*?atom\.global\.gpu\.acq_rel\.add.*?bar\.sync.*?ld\.global\.cg\.b64"
    assert re.search(order, binary.asm["ptx"], re.DOTALL)


def test_a_loss_is_one_launch() -> None:
    """Forward and backward, whether a sample is one chunk or many; only `sums` and `gradients` are recorded."""
    for shape in ((4, 3072), (4, 100_000)):
        x = states(F32, F32, shape=shape)
        forward = torch.ones(()), torch.empty(4, dtype=torch.float64), 1
        specialized("sums", lambda x=x: OPS["pseudo_huber"](*x, None, None, 0, 0))
        specialized("gradients", lambda x=(*forward, *x): OPS["pseudo_huber_backward"](*x, None, None, 0, 0))


@pytest.mark.parametrize("case", EXACT.values(), ids=EXACT)
def test_exact_steps_move_as_much_as_they_can_at_a_time(case: Case, tmp_path: Path) -> None:
    name, call, read, written = case
    binary = compiled(name, call)
    check_arithmetic(binary)
    check_resources(binary, tmp_path)

    # A step takes four elements a thread: 8 bytes of halves.
    each = 4 if name == "exact_step" else 8
    found: Counter[tuple[str, int]] = Counter()
    for kind, tensors in (("ld", read), ("st", written)):
        for x in tensors:
            size = min(16, each * x.element_size())
            found[kind, size] += each * x.element_size() // size
    assert accesses(binary.asm["ptx"]) == found


@pytest.mark.parametrize("case", ["denoise float32", "renoise mixed", "noisy_pair float32", "normal float32"])
def test_float32_kernels_compute_in_float32(case: str) -> None:
    assert not DOUBLE.search(compiled(*DENSE[case][:2]).asm["ptx"])


def test_a_contracted_product_is_seen() -> None:
    """The check of the arithmetic, tested: the same kernel with contraction allowed fails it."""
    kernel, (options, *source) = specialized("multistep", DENSE["bdia float32"][1])
    loose = {**options.__dict__, "enable_fp_fusion": True}
    with pytest.raises(AssertionError):
        check_arithmetic(triton.compile(ASTSource(kernel, *source), target=SM90, options=loose))


@pytest.mark.parametrize("wide", [operands.WIDE, 1], ids=["32-bit indices", "64-bit indices"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_variants_compile(name: str, wide: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operands, "WIDE", wide)
    binary = compiled(*OTHERS[name])
    check_arithmetic(binary)
    check_resources(binary, tmp_path, stack=ON_THE_STACK.get((name, 90), 0))


def test_channels_last_without_noise_is_dense() -> None:
    tensors = [last(x) for x in states(F32, F32, F32)]
    binary = compiled("multistep", lambda: OPS["bdia_step"](tensors, BDIA, 0.0))
    assert set(accesses(binary.asm["ptx"])) == {("ld", 16), ("st", 16)}


def test_new_numbers_and_keys_compile_nothing() -> None:
    calls = []
    for seed, step, sample_id in ((0, 0, 0), (1, 1, 1), (16, 16, 16), (2**62, 2**31, 2**31), (-1, 7, 5)):
        for number in (0.0, 1.0, 0.3):
            arguments = ([number] * 2, 0.0, 0.5 + number, seed, step, sample_id)
            calls.append(lambda arguments=arguments: OPS["affine_step"](MIXED[1:], *arguments))
    signatures = {str(specialized("multistep", call)[1][1:]) for call in calls}
    assert len(signatures) == 1


def test_new_numbers_in_float64_compile_nothing_and_fill_nothing() -> None:
    """They travel as bits, so that nothing but the step's own kernel runs."""
    tensors, signatures = states(F64, F64, F64), set()
    for number in (0.0, -0.0, 1.0, 0.3, 1e300, -(2.0**-1074), math.inf, math.nan):
        call = lambda number=number: OPS["bdia_step"](tensors, [number] * 5, 0.0)  # noqa: E731
        with Ops() as counter:
            signatures.add(str(specialized("multistep", call)[1][1:]))
        assert counter.seen == ["aten::empty_like"]
    assert len(signatures) == 1


def test_new_exact_steps_compile_nothing() -> None:
    """Numbers in double precision travel as bits, beside the ratio, the grid and the mark."""
    tensors, (info,) = states(I64, I64, F32), states(I64)
    outs = {"out": torch.empty_like(info), "info_out": torch.empty_like(info), "overflow": torch.empty(4, dtype=I64)}
    signatures = set()
    for number in (0.0, 1.0, 0.3, 1e300, -(2.0**-1074)):
        for n, m, bits, mark in ((9, 10, 32, 1), (1, 2, 1, 16), (2**20, 1, 0, 2**62)):
            values = ([number] * 4, number, n, m, bits, mark)
            call = lambda values=values: OPS["bdia_exact_step.out"](tensors, info, *values, **outs)  # noqa: E731
            signatures.add(str(specialized("exact_step", call)[1][1:]))
    assert len(signatures) == 1


def test_float64_is_narrowed_by_way_of_float32() -> None:
    ptx = compiled(*OTHERS["float64 to half"]).asm["ptx"]
    assert "cvt.rn.f32.f64" in ptx
    assert not re.search(r"cvt\.rn\.b?f16\.f64", ptx)


def test_quotients_and_roots_are_correctly_rounded() -> None:
    assert compiled("multistep", DENSE["inverse float32"][1]).asm["ptx"].count("div.rn.f32") == 5
    assert compiled("noise", DENSE["normal float32"][1]).asm["ptx"].count("sqrt.rn.f32") == 4


TARGETS = [*(GPUTarget("cuda", arch, 32) for arch in (80, 100, 120)), GPUTarget("hip", "gfx942", 64)]
VARIANTS = {name: case[:2] for cases in (DENSE, LOSSES, RESIDENTS, EXACT) for name, case in cases.items()} | OTHERS


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_elsewhere(name: str, target: GPUTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if target.backend == "hip":
        skip_amd_where_old()
        monkeypatch.setattr(operands, "WARPS", 2)
        check_amd(compiled(*VARIANTS[name], target))
        return
    binary = compiled(*VARIANTS[name], target)
    check_arithmetic(binary)
    check_resources(binary, tmp_path, stack=ON_THE_STACK.get((name, target.arch), 0))


def skip_amd_where_old() -> None:
    if rounding.OLD:
        pytest.skip("before Triton 3.6 quotients are in PTX, and AMD's GPUs are refused")


def check_amd(binary: Any) -> None:
    """Nothing is contracted, and nothing is in scratch memory."""
    assert not re.search(r"\b(contract|fast|afn|arcp|reassoc)\b|llvm\.fmuladd", binary.asm["llir"])
    assert "scratch_" not in binary.asm["amdgcn"]
    assert re.search(r"\.vgpr_spill_count: +0", binary.asm["amdgcn"])


ON_AMD = ["bdia mixed", "affine noisy bfloat16", "denoised float32", "normal float32", "renoise bfloat16"]


@pytest.mark.parametrize("case", ON_AMD)
def test_amd_moves_128_bits_at_a_time(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_amd_where_old()
    monkeypatch.setattr(operands, "WARPS", 2)
    binary = compiled(*DENSE[case][:2], TARGETS[-1])
    check_amd(binary)
    assert "store_dwordx4" in binary.asm["amdgcn"]


def test_triton_is_imported_late() -> None:
    code = "import sys, bicm_kernels; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
