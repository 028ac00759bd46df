"""Every op on a GPU: the CPU's bits, every time, in any batch, on any stream, in a graph, without waiting."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from calls import CALLS, DTYPES, EXACT, LOSSES, SHAPES, Call, Results, on_another_stream, states
from torch import Tensor

import bicm_kernels as bk
from bicm_diffusion import vp_schedule
from bicm_diffusion.samplers import bdia_invert, bdia_sample
from bicm_kernels import backend
from tests.support.calls import CALLS as OP_CALLS
from tests.support.calls import op_of, opened, with_host_numbers
from tests.support.gpu_comparison import SUMS, WITH_NUMBERS, close

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu

SameBits = Callable[[Tensor, Tensor], None]
IMAGES = (4, 3, 32, 32)


def on_the_cpu(call: Call, inputs: list[Tensor]) -> Results:
    before = backend._choice
    with backend.use("native"):
        results = call([x.cpu() for x in inputs])
    assert backend._choice == before
    return results


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", EXACT)
def test_the_bits_of_the_cpu(
    gpu_backend: str, same_bits: SameBits, name: str, dtypes: tuple[torch.dtype, torch.dtype], shape: tuple[int, ...]
) -> None:
    inputs = states(shape, dtypes, "cuda")
    results = [x.cpu() for x in EXACT[name](inputs)]
    for actual, expected in zip(results, on_the_cpu(EXACT[name], inputs), strict=True):
        same_bits(actual, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_the_cpu(
    gpu_backend: str, name: str, dtypes: tuple[torch.dtype, torch.dtype], shape: tuple[int, ...]
) -> None:
    inputs = states(shape, dtypes, "cuda")
    results = [x.cpu() for x in LOSSES[name](inputs)]
    for actual, expected in zip(results, on_the_cpu(LOSSES[name], inputs), strict=True):
        close(actual, expected)


@pytest.mark.parametrize("name", CALLS)
def test_float64(gpu_backend: str, name: str) -> None:
    """float32 against the reference in float64: no more than a few roundings apart."""
    inputs = states(IMAGES, DTYPES["float32"], "cuda")
    results = [x.cpu() for x in CALLS[name](inputs)]
    with backend.use("reference"):
        exact = CALLS[name]([x.cpu().double() for x in inputs])
    for actual, expected in zip(results, exact, strict=True):
        close(actual, expected, 3e-6)


@pytest.mark.parametrize("name", CALLS)
def test_determinism(gpu_backend: str, same_bits: SameBits, name: str) -> None:
    inputs = states(IMAGES, DTYPES["mixed"], "cuda")
    first = CALLS[name](inputs)
    for _ in range(20):
        for actual, expected in zip(CALLS[name](inputs), first, strict=True):
            same_bits(actual.cpu(), expected.cpu())


@pytest.mark.parametrize("kind", ["vector", "elementwise"])
def test_a_sample_does_not_know_its_batch(gpu_backend: str, same_bits: SameBits, kind: str) -> None:
    x, y = states((37, 3, 64, 64), DTYPES["float32"], "cuda")[:2]
    whole = bk.pseudo_huber(x, y, c=0.1, kind=kind, reduction="none")
    noisy = bk.add_noise(x, 0.7, seed=1)
    for b in (0, 17, 36):
        one = bk.pseudo_huber(x[b : b + 1], y[b : b + 1], c=0.1, kind=kind, reduction="none")
        same_bits(one.cpu(), whole[b : b + 1].cpu())
        same_bits(bk.add_noise(x[b : b + 1], 0.7, seed=1, sample_id=b).cpu(), noisy[b : b + 1].cpu())


def test_nothing_waits(gpu_backend: str, request: pytest.FixtureRequest) -> None:
    z, eps = states(IMAGES, DTYPES["float32"], "cuda")[1:3]
    step, seed = torch.zeros((), dtype=torch.int64, device="cuda"), torch.ones(4, dtype=torch.int64, device="cuda")
    a = torch.ones(4, device="cuda")

    def run() -> None:
        bk.ddim_step(z, eps, a=a, b=0.1)
        bk.affine_step([z, eps], [a, 0.1], noise_weight=a, seed=seed, step=step)
        bk.renoise(z, eps, a, 0.1, a, seed=1, step=step)
        bk.noisy_pair(z, a, 2.0, seed=1, step=step)
        bk.consistency_loss(z, eps.detach().requires_grad_(), a, 0.1, z, weight=a).backward()

    run()
    request.getfixturevalue("no_synchronisation")
    run()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "k"), WITH_NUMBERS)
def test_numbers_on_the_cpu(
    gpu_backend: str, same_bits: SameBits, request: pytest.FixtureRequest, name: str, k: int, dtype: torch.dtype
) -> None:
    """As schedulers have them, `alphas_cumprod[t]`: nothing is copied, nothing waits."""

    def run(device: str) -> list[Tensor]:
        call = with_host_numbers(OP_CALLS[name][k], dtype, lambda x: x.to(device, copy=True))
        return opened(op_of(name)(**call, **({"device": device} if name in ("normal", "uniform") else {})))

    with backend.use("native"):
        expected = run("cpu")
    run("cuda")
    call = with_host_numbers(OP_CALLS[name][k], dtype, lambda x: x.to("cuda"))
    request.getfixturevalue("no_synchronisation")
    results = opened(op_of(name)(**call, **({"device": "cuda"} if name in ("normal", "uniform") else {})))
    torch.cuda.set_sync_debug_mode("default")
    for place, (actual, wanted) in enumerate(zip(results, expected, strict=True)):
        check = close if place >= SUMS.get(name, len(results)) else same_bits
        check(actual.cpu(), wanted)


def loop(z: Tensor, step: Tensor, steps: int) -> Tensor:
    """A stochastic sampler: the step advances on the device."""
    for _ in range(steps):
        eps = torch.tanh(z)
        z = bk.affine_step([z, eps], [0.98, -0.03], noise_weight=0.2, seed=5, step=step)
        step.add_(1)
    return z


def test_a_captured_loop_draws_new_noise_at_every_replay(gpu_backend: str, same_bits: SameBits) -> None:
    z, step = states(IMAGES, DTYPES["float32"], "cuda")[0], torch.zeros((), dtype=torch.int64, device="cuda")
    expected = z.clone()
    for _ in range(3):
        expected = loop(expected, step, 5)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        loop(z.clone(), step, 5)
    stream.synchronize()
    step.zero_()
    state, graph = z.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        state.copy_(loop(state, step, 5))
    for _ in range(3):
        graph.replay()
    same_bits(state.cpu(), expected.cpu())


@pytest.mark.parametrize("sampler", [bdia_sample, bdia_invert])
def test_captured_samplers(gpu_backend: str, same_bits: SameBits, sampler: Callable[..., object]) -> None:
    schedule, z = vp_schedule(6), states(IMAGES, DTYPES["float32"], "cuda")[0]

    def run() -> Results:
        return tuple(sampler(lambda z, times: torch.tanh(z), z, schedule, gamma=0.9))  # type: ignore[arg-type]

    expected = run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for x in captured:
        x.zero_()
    graph.replay()
    for actual, wanted in zip(captured, expected, strict=True):
        same_bits(actual.cpu(), wanted.cpu())


def test_a_captured_training_step(gpu_backend: str, same_bits: SameBits) -> None:
    call, inputs = LOSSES["consistency mean"], states((16, 3, 32, 32), DTYPES["mixed"], "cuda")
    expected = call(inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(inputs)
    for _ in range(3):
        graph.replay()
    for actual, wanted in zip(captured, expected, strict=True):
        same_bits(actual.cpu(), wanted.cpu())


@pytest.mark.parametrize("name", CALLS)
def test_another_stream(gpu_backend: str, same_bits: SameBits, name: str) -> None:
    """The inputs come late: an op on the wrong stream would read them too early."""
    inputs = states(IMAGES, DTYPES["float32"], "cuda")
    expected = CALLS[name](inputs)
    results = on_another_stream(CALLS[name], inputs)
    for actual, wanted in zip(results, expected, strict=True):
        same_bits(actual.cpu(), wanted.cpu())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", CALLS)
def test_another_device(gpu_backend: str, same_bits: SameBits, name: str) -> None:
    expected = CALLS[name](states(IMAGES, DTYPES["float32"], "cuda:0"))
    results = CALLS[name](states(IMAGES, DTYPES["float32"], "cuda:1"))
    assert torch.cuda.current_device() == 0
    for actual, wanted in zip(results, expected, strict=True):
        assert actual.device == torch.device("cuda:1")
        same_bits(actual.cpu(), wanted.cpu())


def test_more_elements_than_32_bits_count(gpu_backend: str, same_bits: SameBits) -> None:
    count = 2**31 + 4096
    if torch.cuda.mem_get_info()[0] < 6 * count:
        pytest.skip("needs 13 GB of free memory")
    x = bk.normal((1, count), seed=3, dtype=torch.float16, device="cuda")
    assert bool(x[:, -4096:].any())
    y = bk.ddim_step(x, x, a=0.5, b=0.25)[:, -4096:].cpu()
    same_bits(y, on_the_cpu(lambda x: (bk.ddim_step(*x, a=0.5, b=0.25),), [x[:, -4096:]] * 2)[0])


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("check", ["memcheck", "racecheck", "synccheck"])
def test_the_gpus_own_sanitizer(check: str) -> None:
    program = (
        "import sys; sys.path.insert(0, 'tests/gpu')\n"
        "import torch\n"
        "from calls import CALLS, DTYPES, states\n"
        "for call in CALLS.values():\n"
        "    for shape in ((3, 67), (2, 40_003)):\n"
        "        call(states(shape, DTYPES['mixed'], 'cuda'))\n"
        "torch.cuda.synchronize()\n"
    )
    command = ["compute-sanitizer", "--tool", check, "--error-exitcode", "9", sys.executable, "-c", program]
    done = subprocess.run(
        command, env=os.environ | {"BICM_KERNELS_BACKEND": "native"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
