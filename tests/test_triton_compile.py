"""The Triton kernels compiled for GPUs that need not be there: wide accesses, no spills, no contraction.

A recorder stands in for a kernel, so that exactly what an op would launch is compiled, alignment included.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from bicm_kernels.triton_kernels import OPS, multistep, noise, operands, pseudo_huber, reversible

SM90 = GPUTarget("cuda", 90, 32)
THREADS, TILE = 128, 1024
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
KERNELS = {"multistep": multistep} | dict.fromkeys(("noise", "pair", "fold"), noise)
KERNELS |= dict.fromkeys(("sums", "finish", "gradients"), pseudo_huber)
KERNELS |= dict.fromkeys(("exact_step", "decode_fixed_point"), reversible)


class Recorder:
    """Takes a kernel's place and keeps the arguments of its launch."""

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self.launches.append((args, kwargs))


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def specialized(name: str, call: Callable[[], object], target: GPUTarget = SM90) -> tuple[Any, list[Any]]:
    """The kernel `name`, and the options, signature and constants that a launch compiles it for."""
    kernel, recorders = getattr(KERNELS[name], name), {key: Recorder() for key in KERNELS}
    with pytest.MonkeyPatch.context() as patch:
        for key, module in KERNELS.items():
            patch.setattr(module, key, recorders[key])
        call()
    ((args, kwargs),) = recorders[name].launches
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*args, **kwargs)
    return kernel, list(kernel._pack_args(backend, kwargs, bound, specialization, options))


def compiled(name: str, call: Callable[[], object], target: GPUTarget = SM90) -> Any:
    """Compile what `call` would launch of the kernel `name`."""
    kernel, (options, *source) = specialized(name, call, target)
    return triton.compile(ASTSource(kernel, *source), target=target, options=options.__dict__)


def resources(binary: Any, folder: Path) -> dict[str, int]:
    """Registers, stack and local memory that ptxas gave a kernel."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", listing)}


def accesses(binary: Any) -> Counter[tuple[str, int]]:
    """How often a thread loads and stores how many bytes of global memory."""
    found = re.findall(r"\b(ld|st)\.global\.(?:\w+::\w+\.)*(?:v(\d)\.)?b(\d+)", binary.asm["ptx"])
    return Counter((kind, int(width or 1) * int(bits) // 8) for kind, width, bits in found)


def check_arithmetic(binary: Any) -> None:
    """Every product and sum rounds by itself, quotients and roots correctly; nothing is flushed to zero."""
    ptx = binary.asm["ptx"]
    for loose in (r"\bfma\.", r"\bmad\.\w*\.?f", r"\.approx", r"\.ftz", r"\bdiv\.full", r"\bcall\b"):
        assert not re.search(loose, ptx), loose


def check_resources(binary: Any, folder: Path, registers: int = 128) -> None:
    """Nothing spills, and enough threads fit on a multiprocessor."""
    used = resources(binary, folder)
    assert used["STACK"] == used["LOCAL"] == 0
    assert used["REG"] <= registers


def states(*dtypes: torch.dtype, shape: tuple[int, ...] = (4, 3, 64, 64)) -> list[Tensor]:
    return [torch.empty(shape, dtype=dtype) for dtype in dtypes]


BDIA = [0.9, 0.1, 0.8, 0.2, 0.96]
KEY = (7, 1, 2)
NETWORKS = {"float32": (F32, F32), "bfloat16": (BF16, BF16), "mixed": (F32, BF16)}

# What is launched with Python numbers on dense tensors: kernel, call, and the tensors it must read.
Case = tuple[str, Callable[[], object], list[Tensor], list[Tensor]]


def step(name: str, tensors: list[Tensor], *arguments: Any, outs: int = 1) -> Case:
    return "multistep", lambda: OPS[name](tensors, *arguments), tensors, tensors[:1] * outs


def levels() -> tuple[float, ...]:
    """t, u and sigma_data."""
    return (2.0, 0.5, 0.5)


def preconditioning(kind: str, state: torch.dtype, network: torch.dtype) -> dict[str, Case]:
    pair, one = states(state, network), states(state)
    renoise = (*levels()[:2], 0.7, 0.6, 0.5, False, *KEY)
    noise = (0.3, 0.5, *KEY, None, None, 0.5)
    return {
        f"scale_input {kind}": ("multistep", lambda: OPS["scale_input"](one[0], 2.0, 0.5), one, one),
        f"denoise {kind}": ("multistep", lambda: OPS["denoise"](*pair, *levels(), False, False), pair, one),
        f"denoise cm {kind}": ("multistep", lambda: OPS["denoise"](*pair, *levels(), True, True), pair, one),
        f"renoise {kind}": ("multistep", lambda: OPS["renoise"](*pair, *renoise), pair, one * 2),
        f"noisy_pair {kind}": ("pair", lambda: OPS["noisy_pair"](one[0], *noise), one, one * 2),
    }


def dense_cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for kind, (state, network) in NETWORKS.items():
        cases |= preconditioning(kind, state, network)
        cases[f"ddim {kind}"] = step("ddim_step", states(state, network), BDIA[:2], 0.0)
        cases[f"bdia {kind}"] = step("bdia_step", states(state, state, network), BDIA, 0.0)
        cases[f"inverse {kind}"] = step("bdia_inverse_step", states(state, state, network), BDIA, 0.0)
        guided = states(state, state, network, network)
        cases[f"bdia guided {kind}"] = step("bdia_step", guided, BDIA, 7.5)
        pair = states(state, network)
        cases[f"affine noisy {kind}"] = step("affine_step", pair, BDIA[:2], 0.0, 0.5, *KEY)
        everything = ([0.9, 0.1], [0.2, 0.3], 7.5, 0.5, 1.0, 0.5, 0.7, *KEY)
        cases[f"denoised {kind}"] = step("denoised_step", states(state, network, network), *everything, outs=3)
        plain = ([0.9, 0.1], [0.2, 0.3], 0.0, 0.5, None, 0.0, None, None, 0, 0)
        cases[f"denoised plain {kind}"] = step("denoised_step", states(state, network), *plain, outs=2)
        for name in ("normal", "uniform"):
            out = states(state)
            cases[f"{name} {kind}"] = ("noise", lambda name=name, out=out: OPS[name](out[0], *KEY), [], out)
    for terms in (1, 3, 4, 5):
        arguments = (BDIA[:terms], 0.0, 0.0, None, 0, 0)
        cases[f"affine of {terms}"] = step("affine_step", states(*[F32] * terms), *arguments)
    return cases


DENSE = dense_cases()


@pytest.mark.parametrize("case", DENSE.values(), ids=DENSE)
def test_dense_tensors_move_128_bits_at_a_time(case: Case, tmp_path: Path) -> None:
    name, call, read, written = case
    binary = compiled(name, call)
    check_arithmetic(binary)
    check_resources(binary, tmp_path, registers=64)

    def moves(tensors: list[Tensor]) -> int:
        return sum(x.element_size() for x in tensors) * TILE // THREADS // 16

    expected = {("ld", 16): moves(read), ("st", 16): moves(written)}
    assert accesses(binary) == Counter({access: count for access, count in expected.items() if count})


def losses() -> dict[str, Case]:
    """Forward and backward of the losses: what must be read, and what written, 128 bits at a time."""
    cases: dict[str, Case] = {}
    for kind, (state, network) in NETWORKS.items():
        pair, three = states(network, state), states(network, state, state)
        forward = torch.ones(()), torch.empty(4, dtype=F64), 1
        for name, code, c in (("vector", 0, None), ("elementwise", 1, 0.1)):
            distance = (None, c, code, 0)
            consistency = (torch.empty(4), torch.empty(4), torch.empty(4), c, 0.5, 0.002, 0, code, 0)
            for op, inputs, call in (("pseudo_huber", pair, distance), ("consistency_loss", three, consistency)):
                title = f"{op} {name} {kind}"
                cases[title] = ("sums", lambda op=op, x=inputs, call=call: OPS[op](*x, *call), inputs, [])
                backward = f"{op}_backward"
                cases[f"{title} backward"] = (
                    "gradients",
                    lambda op=backward, x=inputs, call=call, forward=forward: OPS[op](*forward, *x, *call),
                    inputs,
                    inputs[:1],
                )
    return cases


LOSSES = losses()
DOUBLE = re.compile(r"\b(?:add|mul|sub|div|sqrt|fma)\.\S*f64")


@pytest.mark.parametrize("case", LOSSES.values(), ids=LOSSES)
def test_losses_move_128_bits_at_a_time(case: Case, tmp_path: Path) -> None:
    """Beside them a thread moves the sums and the numbers of its sample, a few bytes each."""
    name, call, read, written = case
    binary = compiled(name, call)
    check_arithmetic(binary)
    check_resources(binary, tmp_path)
    found = accesses(binary)
    for kind, tensors in (("ld", read), ("st", written)):
        assert found[kind, 16] == sum(x.element_size() for x in tensors) * TILE // THREADS // 16
    assert sum(count for (_, size), count in found.items() if size != 16) <= 6
    assert max(size for _, size in found) == 16
    # Sums are added up in double precision once a thread, after the loop over elements.
    assert len(DOUBLE.findall(binary.asm["ptx"])) <= (40 if name == "sums" else 0)


def test_the_end_of_a_loss_compiles(tmp_path: Path) -> None:
    for reduction in range(3):
        x = states(F32, F32, shape=(40, 20_000))
        binary = compiled("finish", lambda x=x, reduction=reduction: OPS["pseudo_huber"](*x, None, None, 0, reduction))
        check_arithmetic(binary)
        check_resources(binary, tmp_path)


I32, I64 = torch.int32, torch.int64
EXACT_BDIA = BDIA[:4]


def exact(name: str, tensors: list[Tensor], numbers: list[float], n: int, m: int, bits: int = 32) -> Case:
    """An exact step: guided if it has a tensor more, with a buffer if it multiplies."""
    (info,) = states(I64)
    buffers = [] if n == m else [info]
    call = lambda: OPS[name](tensors, info, numbers, 7.5, n, m, bits)  # noqa: E731
    return "exact_step", call, [*tensors, *buffers], [tensors[0], *buffers]


def exact_cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for network in (F16, BF16, F32, F64):
        for name, (n, m) in (("unit", (1, 1)), ("ratio", (9, 10))):
            pair, title = states(I64, I64, network), f"{name} {network}"
            cases[f"bdia {title}"] = exact("bdia_exact_step", pair, EXACT_BDIA, n, m)
            cases[f"inverse {title}"] = exact("bdia_exact_inverse_step", pair, EXACT_BDIA, n, m)
        cases[f"bdia guided {network}"] = exact(
            "bdia_exact_step", states(I64, I64, network, network), EXACT_BDIA, 9, 10
        )
        x, code, narrow = states(network, I64, I32)
        cases[f"encode {network}"] = "exact_step", lambda x=x: OPS["fixed_point_encode"](x, 32, I64), [x], [code]
        cases[f"encode int32 {network}"] = (
            "exact_step",
            lambda x=x: OPS["fixed_point_encode"](x, 20, I32),
            [x],
            [narrow],
        )
        for q in (code, narrow):
            decode = lambda q=q, network=network: OPS["fixed_point_decode"](q, 20, network)  # noqa: E731
            cases[f"decode {q.dtype} to {network}"] = "decode_fixed_point", decode, [q], [x]
    cases["affine of 5"] = exact("exact_affine_step", states(I64, F32, I64, F32, F32, BF16), BDIA, 1, 1)
    cases["affine int32"] = exact("exact_affine_step", states(I32, F32, I32), BDIA[:2], 1, 1, 20)
    return cases


EXACT = exact_cases()


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
    assert accesses(binary) == found


@pytest.mark.parametrize("case", ["denoise float32", "renoise mixed", "noisy_pair float32", "normal float32"])
def test_float32_kernels_compute_in_float32(case: str) -> None:
    assert not DOUBLE.search(compiled(*DENSE[case][:2]).asm["ptx"])


def test_a_contracted_product_is_seen() -> None:
    """The check of the arithmetic, tested: the same kernel with contraction allowed fails it."""
    kernel, (options, *source) = specialized("multistep", DENSE["bdia float32"][1])
    loose = {**options.__dict__, "enable_fp_fusion": True}
    with pytest.raises(AssertionError):
        check_arithmetic(triton.compile(ASTSource(kernel, *source), target=SM90, options=loose))


def numbers(*shape: int) -> list[Tensor]:
    return [torch.empty(shape) for _ in range(5)]


def key(*shape: int) -> list[Tensor]:
    return [torch.empty(shape, dtype=torch.int64) for _ in range(3)]


def last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


def noisy(*tensors: Tensor) -> Callable[[], object]:
    return lambda: OPS["affine_step"](list(tensors), BDIA[: len(tensors)], 0.0, 0.5, *KEY)


MIXED = states(F32, F32, BF16)
OTHERS: dict[str, tuple[str, Callable[[], object]]] = {
    "0-d tensors": ("multistep", lambda: OPS["bdia_step.tensor"](MIXED, numbers(), None)),
    "(B,) tensors": ("multistep", lambda: OPS["bdia_step.tensor"](MIXED, numbers(4), None)),
    "(B,) keys": (
        "multistep",
        lambda: OPS["affine_step.tensor"](MIXED[1:], numbers(4)[:2], None, torch.empty(4), *key(4)),
    ),
    "0-d keys": ("noise", lambda: OPS["normal.tensor"](MIXED[2], *key())),
    "float64": ("multistep", lambda: OPS["bdia_step"](states(F64, F64, F64), BDIA, 0.0)),
    "float64 to half": ("multistep", noisy(*states(F16, F64))),
    "points": ("multistep", noisy(*states(F32, shape=(9, 2)))),
    "single numbers": ("multistep", noisy(*states(F32, shape=(9,)))),
    "odd sizes": ("multistep", noisy(*states(F32, shape=(3, 7, 5)))),
    "one element": ("multistep", noisy(*states(F32, shape=(1, 1)))),
    "channels last": ("multistep", noisy(last(MIXED[0]), last(MIXED[2]))),
    "two layouts": ("multistep", lambda: OPS["ddim_step"]([MIXED[0], last(MIXED[1])], [0.9, 0.1], 0.0)),
    "slices": ("multistep", noisy(MIXED[0][:, 1:, ::2, 3:50], MIXED[2][:, 1:, ::2, 3:50])),
    "expanded": ("multistep", noisy(MIXED[0][:1].expand(4, -1, -1, -1), MIXED[2])),
    "fold_in": ("fold", lambda: OPS["fold_in"](torch.empty(9, dtype=torch.int64), torch.tensor(1))),
}


def exact_per_sample(*layout: Any) -> Callable[[], object]:
    """With a ratio, numbers and a mark for each sample, and notes of overflows."""
    last_state, q, eps = (x[layout] for x in states(I64, I64, BF16))
    n, m, mark = (x[: len(q)] for x in key(4))
    outs = {"out": torch.empty_like(q), "info_out": torch.empty_like(q), "overflow": torch.empty_like(mark)}
    coefficients = [x[: len(q)] for x in numbers(4)[:4]]
    return lambda: OPS["bdia_exact_step.tensor_out"](
        [last_state, q, eps], q, coefficients, None, n, m, 32, mark, **outs
    )


OTHERS |= {
    "exact (B,) tensors": ("exact_step", exact_per_sample()),
    "exact slices": ("exact_step", exact_per_sample(slice(None), slice(1, None), slice(None, None, 2))),
    "exact points": ("exact_step", exact_per_sample(slice(None), 0, 0, slice(2))),
}


@pytest.mark.parametrize("wide", [operands.WIDE, 1], ids=["32-bit indices", "64-bit indices"])
@pytest.mark.parametrize("case", OTHERS.values(), ids=OTHERS)
def test_other_variants_compile(
    case: tuple[str, Callable[[], object]], wide: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operands, "WIDE", wide)
    binary = compiled(*case)
    check_arithmetic(binary)
    check_resources(binary, tmp_path)


def test_channels_last_without_noise_is_dense() -> None:
    tensors = [last(x) for x in states(F32, F32, F32)]
    binary = compiled("multistep", lambda: OPS["bdia_step"](tensors, BDIA, 0.0))
    assert set(accesses(binary)) == {("ld", 16), ("st", 16)}


def test_new_numbers_and_keys_compile_nothing() -> None:
    calls = []
    for seed, step, sample_id in ((0, 0, 0), (1, 1, 1), (16, 16, 16), (2**62, 2**31, 2**31), (-1, 7, 5)):
        for number in (0.0, 1.0, 0.3):
            arguments = ([number] * 2, 0.0, 0.5 + number, seed, step, sample_id)
            calls.append(lambda arguments=arguments: OPS["affine_step"](MIXED[1:], *arguments))
    signatures = {str(specialized("multistep", call)[1][1:]) for call in calls}
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


TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 100, 120)}
ELSEWHERE = ["bdia mixed", "affine noisy bfloat16", "denoised float32", "normal float32", "renoise bfloat16"]


@pytest.mark.parametrize("case", ELSEWHERE)
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_other_nvidia_targets(target: GPUTarget, case: str, tmp_path: Path) -> None:
    binary = compiled(*DENSE[case][:2], target)
    check_arithmetic(binary)
    check_resources(binary, tmp_path)
    assert {size for _, size in accesses(binary)} == {16}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_exact_steps_elsewhere(target: GPUTarget, tmp_path: Path) -> None:
    binary = compiled("exact_step", EXACT["inverse ratio torch.bfloat16"][1], target)
    check_arithmetic(binary)
    check_resources(binary, tmp_path)


ON_AMD = {case: DENSE[case] for case in ELSEWHERE} | {"exact": EXACT["bdia ratio torch.float32"]}


@pytest.mark.parametrize("case", ON_AMD.values(), ids=ON_AMD)
def test_amd_target(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operands, "WARPS", 2)
    binary = compiled(*case[:2], GPUTarget("hip", "gfx942", 64))
    assert not re.search(r"\b(contract|fast|afn|arcp|reassoc)\b|llvm\.fmuladd", binary.asm["llir"])
    assert "scratch_" not in binary.asm["amdgcn"]
    assert re.search(r"\.vgpr_spill_count: +0", binary.asm["amdgcn"])
    assert "store_dwordx4" in binary.asm["amdgcn"]


def test_triton_is_imported_late() -> None:
    code = "import sys, bicm_kernels; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
