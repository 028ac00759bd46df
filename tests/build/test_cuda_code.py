"""What nvcc makes of the CUDA kernels, without a GPU: rounding as written, registers only, wide accesses.

The machine code is that of the library as it was built, for every architecture in it; the PTX, which names how an
operation rounds, is compiled once.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.evidence.resources import LIBRARY, output, tool

SOURCES = sorted((Path(__file__).parents[2] / "csrc" / "cuda").glob("*.cu"))
ARITHMETIC = "fma|mad|mul|add|sub|div|sqrt|rcp|rsqrt|ex2|lg2|sin|cos"
REGISTERS = 128  # at which two blocks of 256 threads fit on a processor


#: What CUDA's float64 logarithm is made of: of a deviation's, once per sample.
LOGARITHM = ("rcp.approx.ftz.f64", "fma.rn.f64")
#: One block of 256 threads fits on a processor: up to nine operands of any strides, or float64.
WIDE, WIDE_REGISTERS = re.compile(r"gaussian(_gradient)?_kernelINS0_(7Strided|6PackedId)"), 202


def compile_ptx(source: Path, folder: Path, fmad: str = "false") -> str:
    result = folder / f"{source.stem}.ptx"
    output("nvcc", "-arch=compute_90", f"--fmad={fmad}", "-O3", "-std=c++17", "-ptx", source, "-o", result)
    return result.read_text()


def entries(ptx: str) -> Iterator[tuple[str, str]]:
    """(mangled name, body) of every kernel."""
    for part in re.split(r"^(?:\.\w+ )?\.entry ", ptx, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition("(")
        yield name.strip(), body


def operations(body: str) -> Counter[str]:
    """How often a kernel computes with floating numbers, by operation."""
    pattern = rf"^\s+(?:@!?%p\d+ )?((?:{ARITHMETIC})\.[\w.]*f(?:16|32|64)\w*)"
    return Counter(re.findall(pattern, body, re.MULTILINE))


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The PTX of every kernel."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    folder = tmp_path_factory.mktemp("ptx")
    with ThreadPoolExecutor(2) as pool:
        texts = pool.map(lambda source: compile_ptx(source, folder), SOURCES)
        return {name: body for text in texts for name, body in entries(text)}


def loose(found: Counter[str]) -> list[str]:
    """Operations that are contracted or approximate."""
    rounded = re.compile(r"(mul|add|sub|div|sqrt|rcp)\.rn\.f(32|64)")
    return [name for name in found if not rounded.fullmatch(name)]


@pytest.mark.slow
def test_no_operation_is_contracted_or_approximate(ptx: dict[str, str]) -> None:
    """ptxas never fuses operations that name their rounding, and takes no short cut for their quotients."""
    found: Counter[str] = Counter()
    for name, body in ptx.items():
        counts = operations(body)
        found += Counter({key: n for key, n in counts.items() if not ("gaussian" in name and key in LOGARITHM)})
    assert {"mul.rn.f32", "add.rn.f32", "div.rn.f32", "sqrt.rn.f32"} <= set(found)
    assert loose(found) == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_contraction_would_be_seen(tmp_path: Path) -> None:
    """The check, tested: the noise compiled as nvcc does it when it is not told otherwise."""
    source = next(path for path in SOURCES if path.stem == "noise")
    assert "fma.rn.f32" in loose(operations(compile_ptx(source, tmp_path, fmad="true")))


#: Kernels that compute in float64 for any dtype: increments of integers, and terms with their own weights.
EXACT = re.compile("17reversible_kernel|25fixed_point_decode_kernel|weighed_(sums|gradient)_kernel")
#: Kernels that compute in float64 what exists once per sample; the others do where a tensor is float64 alone.
PER_SAMPLE = re.compile(
    r"(?:(gaussian(?:_gradient)?)_kernel|(pseudo_huber|gradient|resident|cluster)_kernel\w+?Lb(\d))"
)


@pytest.mark.slow
def test_float32_kernels_compute_in_float32(ptx: dict[str, str]) -> None:
    """Per sample there is as much float64 in kernels of one, four and eight elements a thread: none is per element."""
    per_sample: dict[tuple[str | None, ...], set[int]] = {}
    checked = 0
    for name, body in ptx.items():
        if "PackedIdE" in name or "StridedIdE" in name or EXACT.search(name):
            continue
        count = sum(n for operation, n in operations(body).items() if operation.endswith("f64"))
        kernel = PER_SAMPLE.search(name)
        if kernel:
            per_sample.setdefault(kernel.groups(), set()).add(count)
        else:
            assert count == 0, name
        checked += 1
    assert checked > 40
    assert len(per_sample) == 10
    assert all(len(counts) == 1 for counts in per_sample.values()), per_sample


needs_library = pytest.mark.skipif(
    not LIBRARY.exists() or tool("cuobjdump") is None, reason="no CUDA library was built, or there is no cuobjdump"
)


@needs_library
def test_registers_only() -> None:
    listing = output(tool("cuobjdump"), "--dump-resource-usage", LIBRARY)
    usage = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", listing)
    assert len(usage) > 80
    for name, registers, stack, shared, local in usage:
        assert (stack, local) == ("0", "0"), name
        assert int(registers) <= (WIDE_REGISTERS if WIDE.search(name) else REGISTERS), name
        assert int(shared) <= 2048, name


def expected_accesses(name: str) -> tuple[int, int] | None:
    """128-bit loads and stores of a kernel on dense tensors; of an exact step, for 4-byte and for 8-byte elements."""
    if exact := re.search(r"reversible_kernelINS0_10DenseFixedELi(\d)ELNS1_4TaskE(\d)E", name):
        # Beside the terms a partner, then the state, then the buffer, which is also written.
        terms, task = int(exact[1]), int(exact[2])
        return 3 * (terms + 1 + task), 3 * (1 + task // 2)
    if "fixed_point_decode_kernelINS0_10DenseFixedE" in name:
        return 3, 3
    dtype = re.search(r"6PackedI(d|f|NS0_\w+?E)E", name)
    if dtype is None:
        return None
    width = 2 if dtype[1] == "d" else 1
    if multistep := re.search(r"multistep_kernel\w+?Li(\d)ELi(\d+)E", name):
        # Parts: a guided step has a partner; a scaled one writes another result, and so does one with x0.
        terms, parts = int(multistep[1]) or 5, int(multistep[2])
        return (terms + (parts & 1)) * width, (1 + (parts >> 2 & 1) + (parts >> 3 & 1)) * width
    if "weighed_" in name:
        return None  # weights lie in any strides
    if "generated_pair_kernel" in name:
        return 2 * width, 2 * width
    if "noisy_pair_kernel" in name:
        if width == 2:
            return None  # for sm_100 nvcc loads two numbers of float64 one by one
        return width, 2 * width
    if "noise_kernel" in name:
        return 0, width
    if "scale_kernel" in name:
        return width, width
    loss = PER_SAMPLE.search(name)
    assert loss is not None, name
    if loss[1]:
        return None  # how many tensors there are is known at run time; the emulator counts their bytes
    inputs = 2 + int(loss[3])
    return inputs * width, (0 if loss[2] == "pseudo_huber" else inputs) * width


@needs_library
def test_aligned_groups_move_128_bits_at_a_time() -> None:
    """One access per operand and 16 bytes of its group, as often as its loop is unrolled; no local memory."""
    listing = output(tool("cuobjdump"), "--list-elf", LIBRARY)
    architectures = sorted(set(re.findall(r"sm_\d+", listing)))
    assert architectures
    with ThreadPoolExecutor(2) as pool:
        dumps = pool.map(lambda a: output(tool("cuobjdump"), "-sass", "-arch", a, LIBRARY), architectures)
        for architecture, text in zip(architectures, dumps, strict=True):
            assert dense_kernels(text, architecture) >= 60


def dense_kernels(text: str, architecture: str) -> int:
    """Check a disassembly; how many kernels on dense tensors there were."""
    dense = 0
    for kernel in text.split("Function : ")[1:]:
        name = kernel.split("\n", 1)[0]
        expected = expected_accesses(name)
        if expected is None:
            continue
        assert not re.search(r"\b(?:LDL|STL)\b", kernel), (architecture, name)
        if "cluster_kernel" in name:
            # Before the blocks read one another's sums and behind it; there is nothing of it where clusters are not.
            barriers = Counter(re.findall(r"\bUCGABAR_(ARV|WAIT)\b", kernel))
            clusters = int(architecture[3:]) >= 90
            assert barriers == ({"ARV": 2, "WAIT": 2} if clusters else {}), (architecture, name)
            expected = expected if clusters else (0, 0)
        found = Counter(re.findall(r"\b(LDG|STG)\.E(?:\.\w+)*\.128\b", kernel))
        for access, count in zip(("LDG", "STG"), expected, strict=True):
            # A loop may be unrolled.
            whole = found[access] % count == 0 if count and found[access] else found[access] == count
            assert whole, (architecture, name, access, found[access], count)
        dense += 1
    return dense
