"""Memory of large results on the CPU: reused when nobody looks at it any more, and never before."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode

import bicm_kernels as bk
from bicm_kernels import backend
from tests.support.torch_versions import KEEPS_RESULTS

pytestmark = pytest.mark.skipif(backend.running("cpu") != "native", reason="the native library keeps the memory")

Python = Callable[..., "subprocess.CompletedProcess[str]"]

CSRC = Path(bk.__file__).parents[1] / "csrc"
LARGE = (2, 3, 128, 128)
MIB = 2**20


def copy_of(x: Tensor) -> Tensor:
    """The op with the fewest questions: 1·x."""
    return bk.scale_input(x, 0.0, sigma_data=1.0)


def in_graphs(x: Tensor) -> Tensor:
    """The same through torch's dispatcher, which calls that are watched take."""
    with torch.profiler.profile():
        return copy_of(x)


WAYS: dict[str, Callable[[Tensor], Tensor]] = {"called by Python": copy_of, "through the dispatcher": in_graphs}


@pytest.fixture(autouse=True)
def empty() -> Iterator[None]:
    backend.release_memory()
    yield
    backend.release_memory()


@pytest.fixture(params=WAYS)
def op(request: pytest.FixtureRequest) -> Callable[[Tensor], Tensor]:
    return WAYS[request.param]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_block_is_used_again(op: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    if op is in_graphs and not KEEPS_RESULTS:
        pytest.skip("torch before 2.11: C makes no tensor of foreign memory")
    x = torch.randn(LARGE, dtype=dtype)
    first = op(x)
    place = first.data_ptr()
    second = op(x)
    assert second.data_ptr() != place
    del first
    assert op(x).data_ptr() == place


@pytest.mark.parametrize("look", ["view", "numpy", "storage", "detach", "cell"])
def test_but_not_while_somebody_looks(op: Callable[[Tensor], Tensor], look: str) -> None:
    x = torch.randn(LARGE)
    result = op(x)
    place = result.data_ptr()
    kept = {
        "view": lambda: result[1, :, 3],
        "numpy": lambda: result.numpy()[0, 0],
        "storage": lambda: result.untyped_storage(),
        "detach": lambda: result.detach(),
        "cell": lambda: lambda: result,
    }[look]()
    if look != "cell":
        del result
    others = [op(-x) for _ in range(3)]
    assert place not in [other.data_ptr() for other in others]
    if look == "view":
        assert torch.equal(kept, x[1, :, 3])
    del kept, others


LAYOUTS = ["contiguous", "channels_last", "transposed", "sliced", "expanded", "overlapping itself"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_come_out_as_they_went_in(op: Callable[[Tensor], Tensor], layout: str) -> None:
    base = torch.randn(LARGE)
    x = {
        "contiguous": base,
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "transposed": base.transpose(1, 3),
        "sliced": torch.randn(2, 3, 128, 256)[..., ::2],
        "expanded": base[:, :1].expand(LARGE),
        # From the first element to the last as far as a dense tensor goes, and yet no place for a result.
        "overlapping itself": base.flatten().as_strided((2, 128, 128), (2**15 - 255, 1, 1)),
    }[layout]
    result = op(x)
    assert torch.equal(result, x)
    assert result.stride() == torch.empty_like(x).stride()
    assert result.data_ptr() % 64 == 0


def test_what_is_kept_is_given_back_on_demand() -> None:
    results = [copy_of(torch.randn(LARGE)) for _ in range(5)]
    assert backend.release_memory() == 0
    bytes_used = sum(result.nbytes for result in results)
    del results
    assert backend.release_memory() == bytes_used
    assert backend.release_memory() == 0


def test_no_more_than_a_bound_is_kept() -> None:
    x = torch.zeros(8 * MIB)[None]
    results = [copy_of(x) for _ in range(12)]
    del results
    assert 200 * MIB <= backend.release_memory() <= 256 * MIB
    kept, larger = copy_of(torch.zeros(1, MIB)), copy_of(torch.zeros(1, 65 * MIB))
    size = kept.nbytes
    del kept
    del larger
    assert backend.release_memory() == size, "what is larger than all that may be kept takes no other's place"


BOUNDED = """
import torch, bicm_kernels as bk
from bicm_kernels import backend
MIB = 2**20

def copy_of(x):
    return bk.scale_input(x, 0.0, sigma_data=1.0)

def in_graphs(x):
    with torch.profiler.profile():
        return copy_of(x)

for op in (copy_of, in_graphs):
    results = [op(torch.full((1, MIB), float(k))) for k in range(300)]
    assert all(bool((result == k).all()) for k, result in enumerate(results))
    resizable = results[0].untyped_storage().resizable()
    results.clear()
    larger = op(torch.ones(1, 70 * MIB))
    del larger
    print(resizable, backend.release_memory() // MIB)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("most", "kept"), [("0", "True 0"), ("3", "True 0"), ("5", "False 4"), ("64", "False 64"), (None, "False 256")]
)
def test_the_environment_bounds_what_is_kept(python: Python, most: str | None, kept: str) -> None:
    # Before torch 2.11 C makes no tensor of foreign memory: all results of the dispatcher are of torch's allocator.
    through_dispatcher = kept if KEEPS_RESULTS else "True 0"
    assert python(BOUNDED, BICM_KERNELS_KEPT_MEMORY=most).stdout.splitlines() == [kept, through_dispatcher]


def test_any_number_is_a_bound(python: Python) -> None:
    program = "from bicm_kernels import backend; print(backend.running('cpu'))"
    assert python(program, BICM_KERNELS_KEPT_MEMORY="9" * 30).stdout.strip() == "native"


SANITIZED = """
#include "memory.h"
int main() {
  bicm::keep_at_most(int64_t{1} << 30);
  return bicm::take_block(int64_t{1} << 20) == nullptr ? 0 : 1;
}
"""


@pytest.mark.parametrize("sanitizer", [None, "address"])
def test_a_build_for_the_sanitizer_leaves_memory_to_torch(tmp_path: Path, sanitizer: str | None) -> None:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    (tmp_path / "program.cpp").write_text(SANITIZED)
    sources = [str(tmp_path / "program.cpp"), str(CSRC / "torch" / "memory.cpp")]
    flags = [f"-fsanitize={sanitizer}"] if sanitizer else []
    command = [compiler, "-std=c++17", "-O1", "-pthread", *flags, f"-I{CSRC / 'torch'}", *sources]
    subprocess.run([*command, "-o", str(tmp_path / "program")], check=True)
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([str(tmp_path / "program")], env=environment, check=False)
    assert done.returncode == (0 if sanitizer else 1)


@pytest.mark.parametrize(("before", "after", "again"), [(4, 1, False), (1, 4, False), (4, 3, True), (3, 4, False)])
def test_a_block_serves_results_that_nearly_fill_it(before: int, after: int, again: bool) -> None:
    result = copy_of(torch.zeros(1, before * MIB))
    place = result.data_ptr()
    del result
    other = copy_of(torch.ones(1, after * MIB))
    assert (other.data_ptr() == place) is again
    assert bool((other == 1).all())
    assert backend.release_memory() == (0 if again else 4 * before * MIB)


def test_the_block_that_fits_best_is_taken() -> None:
    results = [copy_of(torch.zeros(1, size * MIB)) for size in (4, 3, 5)]
    place = results[1].data_ptr()
    results.clear()
    assert copy_of(torch.zeros(1, 3 * MIB)).data_ptr() == place


def test_small_results_are_torch_s_own() -> None:
    assert copy_of(torch.randn(1, 100)).untyped_storage().resizable()


def test_results_are_tensors_like_any_other(op: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(LARGE)
    result = op(x)
    assert type(result) is torch.Tensor and result.is_leaf and not result.requires_grad
    for other in (copy.deepcopy(result), pickle.loads(pickle.dumps(result)), result.clone(), result.share_memory_()):
        assert torch.equal(other, x)
    assert torch.equal(result.add_(1.0), x + 1.0)
    with torch.inference_mode():
        assert op(x).is_inference()
    assert not op(x).is_inference()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("draw", [bk.normal, bk.uniform])
@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")], ids=str)
def test_drawn_numbers_lie_in_it_too(draw: Callable[..., Tensor], dtype: torch.dtype, device: object) -> None:
    noise = draw(LARGE, seed=1, dtype=dtype, device=device)
    assert (noise.dtype, noise.shape, noise.is_contiguous()) == (dtype, LARGE, True)
    address, bits = noise.data_ptr(), noise.clone()
    del noise
    again = draw(list(LARGE), seed=1, dtype=dtype)
    assert torch.equal(again, bits) and again.data_ptr() == address
    del again
    assert backend.release_memory() == bits.nbytes


def test_where_drawn_numbers_lie_is_torch_s_to_say() -> None:
    with torch.device("meta"):
        assert bk.normal(LARGE, seed=1).is_meta
    with FakeTensorMode():
        assert isinstance(bk.normal(LARGE, seed=1), FakeTensor)
    assert bk.normal(LARGE, seed=1, device="meta").is_meta
    with torch.inference_mode():
        assert bk.normal(LARGE, seed=1).is_inference()
    backend.release_memory()
    for shape in ((0, 3), (2, 0), (2, *[1] * 9)):
        assert bk.normal(shape, seed=1).shape == shape
    with pytest.raises(RuntimeError):
        bk.normal((2**40, 2**40), seed=1)
    assert backend.release_memory() == 0


def test_gradients_lie_in_it_too() -> None:
    F = torch.randn(LARGE, requires_grad=True)
    loss = bk.pseudo_huber(bk.denoise(torch.randn(LARGE), F, 1.0), torch.randn(LARGE))
    (gradient,) = torch.autograd.grad(loss, F)
    held = gradient.clone()
    copies = [copy_of(torch.randn(LARGE)) for _ in range(8)]
    assert torch.equal(gradient, held)
    del copies


def test_threads_share_it() -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        x = torch.full(LARGE, float(number))
        for _ in range(200):
            result = copy_of(x)
            if not bool((result == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _in_child(x: Tensor) -> None:
    torch.set_num_threads(1)  # a forked process has none of its parent's threads, and would wait for them
    for _ in range(3):
        assert torch.equal(copy_of(x), x)
    backend.release_memory()


def test_a_forked_process_goes_on() -> None:
    x = torch.randn(LARGE)
    held, dropped = copy_of(x), copy_of(x)
    del dropped
    child = multiprocessing.get_context("fork").Process(target=_in_child, args=(x,))
    child.start()
    child.join(timeout=60)
    assert child.exitcode == 0
    assert torch.equal(held, x)


def test_the_reference_keeps_nothing() -> None:
    with backend.use("reference"):
        result = copy_of(torch.randn(LARGE))
        assert result.untyped_storage().resizable()
        del result
        assert backend.release_memory() == 0


def test_what_the_kernels_kept_is_given_back_under_another_backend() -> None:
    result = copy_of(torch.randn(LARGE))
    size = result.nbytes
    del result
    with backend.use("reference"):
        assert backend.release_memory() == size


def test_what_is_written_past_the_cache_has_blocks_of_its_own() -> None:
    """A loop frees the results in turn; a denoised sample's memory must not become another result's."""
    x, y = torch.randn(2, 8, 4, 128, 128)[:2].repeat(1, 2, 1, 1, 1)
    places: dict[str, set[int]] = {"x0": set(), "others": set()}
    scaled = None
    for step in range(9):
        if step == 3:  # by then every result has found its memory
            places = {"x0": set(), "others": set()}
        out, x0, following = bk.denoised_step((x, y), (1.0, -0.5), (0.9, 0.1), x0_weight=0.0, next_scale=0.5)
        places["x0"].add(x0.data_ptr())
        places["others"] |= {out.data_ptr(), following.data_ptr()}
        del x0
        x = out
        del out
        scaled = following
        del following
    assert scaled is not None
    assert not places["x0"] & places["others"]
    assert len(places["x0"]) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_results_past_the_cache_are_the_same_bits(dtype: torch.dtype) -> None:
    whole = torch.randn(2, 16, 4, 128, 129, generator=torch.Generator().manual_seed(0)).to(dtype)

    def step(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return bk.denoised_step((x, y), (1.3, -0.5), (0.9, 0.1), x0_weight=0.2, clip=1.0, next_scale=0.5)

    results = step(*whole)
    parts = zip(*(step(*whole[:, i : i + 1]) for i in range(16)), strict=True)
    assert all(torch.equal(x, torch.cat(part)) for x, part in zip(results, parts, strict=True))
