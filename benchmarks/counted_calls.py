"""The calls whose instructions are counted; run under Callgrind by ``instruction_counts``, once per instruction set.

A call's count is that of 2N calls less that of N, over N; an element's is that of a call on many elements less that of
a call on fewer. Fixed costs of a measurement and one-time costs are in neither.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.instruction_counts import INSTRUCTION_SETS

if TYPE_CHECKING:
    from benchmarks.cases import Case

Call = Callable[[], object]
Make = Callable[[int], Call]

#: Calls and elements of the smaller and of the larger measurement: enough to average costs of every tenth call.
CALLS, LONG_CALLS = (8, 40), (2, 6)
FEW, MANY = 8_192, 49_152
#: The same where results are written with non-temporal stores.
STREAMED = (2_162_688, 2_228_224)
SMALL = 16
#: Rows that are counted with launchers that do nothing: a call on a GPU, from Python to the launch.
ON_GPU = (
    *("ddim_step", "bdia_step", "affine_step_5", "denoised_step", "add_noise", "noisy_pair", "bdia_exact_step"),
    *("gaussian_step", "scale_input"),
)
#: Random numbers are drawn for this many elements, and repeated: drawing is slow under Callgrind.
DRAWN = 4_096


@dataclass(frozen=True)
class Row:
    """A call by the number of its elements, and which counts are made of it."""

    name: str
    make: Make
    calls: tuple[int, int] | None = CALLS
    #: The instruction sets on which elements are counted.
    loops: tuple[str, ...] = INSTRUCTION_SETS
    sizes: tuple[int, int] = (FEW, MANY)


def repeated(x: Tensor, elements: int) -> Tensor:
    """A row of a given length, from the elements of another one."""
    return x.repeat(1, -(-elements // x.shape[1]))[:, :elements].contiguous()


def of_case(case: Case, dtype: torch.dtype = torch.float32, every: int = 1) -> Make:
    """A benchmark's call, as it is timed; ``every`` second element of its tensors."""

    def make(elements: int) -> Call:
        given = case.inputs((1, min(elements, DRAWN)), dtype)
        inputs = [x if x.dim() == 1 else repeated(x, elements * every)[:, ::every] for x in given]
        call = case.measured(case.ours)
        return lambda: call(*inputs, **case.coefficients)

    return make


def rows() -> Iterator[Row]:
    """Every benchmark's call, the ops without a benchmark, and staged and streamed calls of each family."""
    import bicm_kernels as bk
    from benchmarks.registry import ABOVE_OPS, FAMILIES

    # A peer's version would move the counts of its adapters.
    cases = {case.name: case for family, cases in FAMILIES.items() if family != "peers" for case in cases}
    best = INSTRUCTION_SETS[:1]
    above_ops = {case.name for family in ABOVE_OPS for case in FAMILIES[family]}
    for name, case in cases.items():
        calls = LONG_CALLS if case.trains or case in FAMILIES["consistency"] else CALLS
        yield Row(name, of_case(case), calls, loops=() if name in above_ops else INSTRUCTION_SETS)

    def states(elements: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(2, min(elements, DRAWN), generator=torch.Generator().manual_seed(1))
        return repeated(x[:1], elements), repeated(x[1:], elements)

    def call_on_states(function: Callable[[Tensor, Tensor], object]) -> Make:
        def make(elements: int) -> Call:
            x, y = states(elements)
            return lambda: function(x, y)

        return make

    def exact(function: Callable[..., object], *, ratio: tuple[int, int], **names: Any) -> Make:
        def make(elements: int) -> Call:
            x, eps = states(elements)
            q, info = bk.fixed_point_encode(x), torch.zeros(1, elements, dtype=torch.int64)
            return lambda: function(q, q, eps, info, ratio)

        return make

    bdia: dict[str, Any] = {"a": 0.98, "b": 0.03, "a_last": 0.97, "b_last": 0.04}
    integers, mask = torch.arange(MANY), torch.ones(1, dtype=torch.bool)

    def draws(elements: int) -> Call:
        generator = torch.Generator().manual_seed(1)
        return lambda: bk.torch_randn((1, elements), generator=generator)

    yield Row("fold_in", lambda n: lambda: bk.fold_in(3, integers[:n]))
    yield Row("torch_randn", draws, loops=best)
    yield Row("noisy_pair", call_on_states(lambda x, y: bk.noisy_pair(x, 0.5, 0.7, x_hat=y, mask=mask, seed=1, step=2)))
    yield Row("ddim_step, out", call_on_states(lambda x, y: bk.ddim_step(x, y, a=0.98, b=0.03, out=y)))
    yield Row("denoise cm", call_on_states(lambda x, y: bk.denoise(x, y, 2.0, parameterization="cm")))
    for step, ratio in ((bk.exact_affine_step, (9, 10)), (bk.exact_affine_inverse_step, (9, 10))):
        yield Row(
            step.__name__,
            exact(lambda p, q, e, i, r, step=step: step(p, [q, e], [0.5, 0.1], i, ratio=r), ratio=ratio),
        )
    yield Row(
        "bdia_exact_inverse_step",
        exact(lambda p, q, e, i, r: bk.bdia_exact_inverse_step(p, q, e, i, gamma=r, **bdia), ratio=(1, 1)),
    )
    yield Row("fixed_point_decode", exact(lambda p, q, e, i, r: bk.fixed_point_decode(q), ratio=(1, 1)))

    for name in ("bdia_step", "denoised_step", "add_noise", "normal", "consistency_loss"):
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            label = f"{name}, {str(dtype).removeprefix('torch.')}"
            yield Row(label, of_case(cases[name], dtype), calls=None, loops=best)
    for name in ("bdia_step", "denoised_step", "add_noise", "consistency_loss", "bdia_exact_step_9_10"):
        yield Row(f"{name}, every second", of_case(cases[name], every=2), calls=None, loops=best)
    for name in ("bdia_step", "denoised_step"):
        yield Row(f"{name}, past the cache", of_case(cases[name]), calls=None, loops=best, sizes=STREAMED)


class Asked:
    """The direct functions, and whether one of them was called."""

    def __init__(self, functions: Any) -> None:
        self.functions = functions
        self.asked = False

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.functions, name)
        self.asked = True
        return found


def repeat(call: Call, count: int) -> None:
    """Make a call repeatedly."""
    for _ in range(count):
        call()


def takes_the_short_way(call: Call) -> bool:
    """Whether a call tries the direct functions."""
    from bicm_kernels import backend

    kept, backend.direct = backend.direct, Asked(backend.direct)
    try:
        call()
        return bool(backend.direct.asked)
    finally:
        backend.direct = kept


def count(callgrind: ctypes.CDLL, instructions: str) -> None:
    """Count on one instruction set; Callgrind writes a file for every number of calls."""
    os.environ["BICM_KERNELS_ISA"] = instructions
    from bicm_kernels import backend

    def measure(section: str, name: str, call: Call, calls: int, each: int = 1) -> None:
        callgrind.zero()
        repeat(call, calls)
        callgrind.write_down(f"{section}|{name}|{calls * each}".encode())

    wanted = list(rows())
    called = [row for row in wanted if row.calls and instructions == INSTRUCTION_SETS[0]]
    small = {row.name: row.make(SMALL) for row in called}
    large = {row.name: [row.make(size) for size in row.sizes] for row in wanted if instructions in row.loops}
    kept = backend.direct
    short = [row for row in called if row.name != "torch_randn" and takes_the_short_way(small[row.name])]
    ways = {"calls": (kept, called), "calls through the dispatcher": (None, short)}

    for backend.direct, some in ways.values():
        for row in some:
            repeat(small[row.name], 100)  # warm up the interpreter's specialisation
    backend.direct = kept
    for pair in large.values():
        for call in pair:
            repeat(call, 3)
    freeze()
    callgrind.begin()
    for section, (backend.direct, some) in ways.items():
        for row in some:
            repeat(small[row.name], 2)
            for calls in row.calls or ():
                measure(section, row.name, small[row.name], calls)
    backend.direct = kept
    for row in wanted:
        for size, call in zip(row.sizes, large.get(row.name, ()), strict=False):
            repeat(call, 1)
            measure(f"elements, {instructions}", row.name, call, 2, size)


def count_on_gpu(callgrind: ctypes.CDLL) -> None:
    """Count calls past the dispatcher on a GPU that is not there."""
    from benchmarks.fake_gpu import FakeGpus

    with tempfile.TemporaryDirectory() as directory:
        gpus = FakeGpus(Path(directory))
    # What torch does on the CPU costs the interpreter as much.
    guards: Any = torch._C._dynamo.guards
    guards._empty_strided_cuda = guards._empty_strided_cpu
    from bicm_kernels import backend

    if not backend.library.use_launchers(gpus.nothing()):
        raise RuntimeError("the library takes no launchers")
    calls = {row.name: row.make(SMALL) for row in rows() if row.name in ON_GPU}
    for name, call in calls.items():
        before = gpus.library.launches()
        repeat(call, 100)
        if gpus.library.launches() - before < 99:  # but for the first, which looks for implementations
            raise RuntimeError(f"{name} did not bypass the dispatcher")
    freeze()
    callgrind.begin()
    for name, call in calls.items():
        repeat(call, 2)
        for number in CALLS:
            callgrind.zero()
            repeat(call, number)
            callgrind.write_down(f"calls on GPUs|{name}|{number}".encode())


def freeze() -> None:
    """Let no garbage collection fall into a measurement."""
    gc.collect()
    gc.freeze()
    gc.disable()


def main(library: str) -> int:
    """Count on every instruction set, each in a separate process: importing torch takes the longest."""
    torch.set_num_threads(1)
    callgrind = ctypes.CDLL(library)
    callgrind.write_down.argtypes = [ctypes.c_char_p]
    children: list[int] = []
    for instructions in (*INSTRUCTION_SETS, None):
        child = os.fork()
        if child:
            children.append(child)
            continue
        try:
            count(callgrind, instructions) if instructions else count_on_gpu(callgrind)
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
