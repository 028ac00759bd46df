"""Which implementation runs and why; one digest on every instruction set."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bicm_kernels as bk
from bicm_kernels import backend, loaders
from tests.support import instruction_sets

Python = Callable[..., "subprocess.CompletedProcess[str]"]
KERNELS = Path(bk.__file__).parent
DIFFUSION = KERNELS.parent / "python" / "bicm_diffusion"

# --- the choice ---------------------------------------------------------------------------------------------

DESCRIBE = "import bicm_kernels as bk; print(bk.backend.describe())"


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, "cpu: native (C++, "),
        ("auto", "cpu: native (C++, "),
        ("native", "cpu: native (C++, "),
        ("reference", "cpu: reference (plain PyTorch, slow)"),
    ],
)
def test_the_environment_chooses(python: Python, choice: str | None, expected: str) -> None:
    done = python(DESCRIBE, BICM_KERNELS_BACKEND=choice, BICM_KERNELS_ISA=None)
    assert done.stdout.startswith(expected)
    assert done.stderr == ""


@pytest.mark.parametrize("choice", ["nonsense", "", "Native"])
def test_an_unknown_backend_is_refused(python: Python, choice: str) -> None:
    done = python(DESCRIBE, check=False, BICM_KERNELS_BACKEND=choice)
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    expected = f"the backend must be one of auto, native, triton, reference, got {choice!r}"
    assert last == f"ValueError: BICM_KERNELS_BACKEND: {expected}"


COLD = """
import torch
import bicm_kernels as bk
from bicm_kernels import backend, loaders
backend._running.clear()
step = torch.compile(lambda x: bk.ddim_step(x, x, a=0.5, b=0.5), fullgraph=True, backend="eager")
print(bool((step(torch.ones(2, 3)) == 1.0).all()), *backend._running)
"""


def test_a_graph_may_be_traced_before_the_first_call_on_its_device(python: Python) -> None:
    assert python(COLD).stdout.split() == ["True", "cpu"]


def test_threads_start_an_implementation_once(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def start(device_type: str) -> tuple[str, str]:
        started.append(device_type)
        time.sleep(0.05)
        return "triton", "made"

    monkeypatch.setattr(backend, "_start", start)
    monkeypatch.setattr(backend, "_running", {})
    threads = [threading.Thread(target=backend.running, args=("a device",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert started == ["a device"]


@pytest.mark.parametrize("choice", [None, "native"])
def test_an_unknown_instruction_set_is_refused(python: Python, choice: str | None) -> None:
    done = python(DESCRIBE, check=False, BICM_KERNELS_BACKEND=choice, BICM_KERNELS_ISA="sse9")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("ValueError: ")
    for word in ("BICM_KERNELS_ISA=sse9", "scalar, avx2, avx512, avx512bf16 and neon"):
        assert word in done.stderr.splitlines()[-1]


# Without the library, as after an installation without a compiler.
WITHOUT = """
import importlib.util, sys, warnings
import torch
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "bicm_kernels._C" else found(name, *rest)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import bicm_kernels as bk
    x = torch.linspace(-1, 1, 12).reshape(3, 4)
    for _ in range(3):
        n = bk.normal((3, 4), seed=5)
        y = bk.bdia_step(x, n, x, a=1.1, b=0.2, a_last=0.9, b_last=0.3, gamma=0.8)
        z = bk.add_noise(x, 0.5, seed=bk.fold_in(1, 2))
    print(bk.backend.describe())
for warning in caught:
    if "bicm_kernels" in str(warning.message):
        print(warning.category.__name__, warning.filename, warning.message)
print([x.flatten().tolist() for x in (n, y, z)])
"""


def test_a_source_tree_takes_no_other_tree_s_library(python: Python, tmp_path: Path) -> None:
    """As an editable installation of that one would offer it."""
    copy = tmp_path / "tree" / "bicm_kernels"
    shutil.copytree(Path(bk.__file__).parent, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    program = f"""
import importlib.util, sys
sys.path.insert(0, {str(copy.parent)!r})
find, library = importlib.util.find_spec, {bk.backend.library.__file__!r}
def offered(name, *rest):
    return importlib.util.spec_from_file_location(name, library) if name == "bicm_kernels._C" else find(name, *rest)
importlib.util.find_spec = offered
import bicm_kernels
"""
    done = python(program, check=False, BICM_KERNELS_BACKEND="native")
    assert "ImportError: BICM_KERNELS_BACKEND=native cannot run on cpu" in done.stderr
    assert "the native library was not built" in done.stderr


def test_a_linked_library_is_the_tree_s_own(python: Python, tmp_path: Path) -> None:
    copy = tmp_path / "tree" / "bicm_kernels"
    shutil.copytree(Path(bk.__file__).parent, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (copy / "_C.abi3.so").symlink_to(bk.backend.library.__file__)
    program = f"import sys\nsys.path.insert(0, {str(copy.parent)!r})\n{DESCRIBE}"
    assert python(program, BICM_KERNELS_BACKEND="native").stdout.startswith("cpu: native")


def test_without_the_library_the_reference_runs_and_says_so_once(python: Python) -> None:
    described, warning, numbers = python(WITHOUT, BICM_KERNELS_BACKEND="auto").stdout.splitlines()
    assert described.startswith("cpu: reference (plain PyTorch, slow; native: the native library was not built")
    assert warning.startswith("UserWarning")
    assert "slow PyTorch reference" in warning
    assert "not built" in warning
    x = torch.linspace(-1, 1, 12).reshape(3, 4)
    n = bk.normal((3, 4), seed=5)
    y = bk.bdia_step(x, n, x, a=1.1, b=0.2, a_last=0.9, b_last=0.3, gamma=0.8)
    z = bk.add_noise(x, 0.5, seed=bk.fold_in(1, 2))
    assert numbers == str([t.flatten().tolist() for t in (n, y, z)])


def test_forcing_a_missing_library_is_an_error(python: Python) -> None:
    done = python(WITHOUT, check=False, BICM_KERNELS_BACKEND="native")
    assert done.returncode != 0
    assert "ImportError: BICM_KERNELS_BACKEND=native cannot run on cpu" in done.stderr
    assert "install with a C++ compiler" in done.stderr


def test_use_and_choose() -> None:
    before = backend.describe()
    assert backend.running("cpu") == "native"
    with backend.use("reference"):
        assert backend.running("cpu") == "reference"
        assert not backend.cpu_is_compiled
        assert backend.direct is None
        with backend.use("native"):
            assert backend.cpu_is_compiled
            assert backend.direct is not None
        assert backend.running("cpu") == "reference"
    assert backend.describe() == before
    with pytest.raises(RuntimeError, match="inside"), backend.use("reference"):
        raise RuntimeError("inside")
    assert backend.describe() == before
    with pytest.raises(ValueError, match="the backend must be one of auto, native, triton, reference, got 'gpu'"):
        backend.choose("gpu")
    with pytest.raises(ValueError, match="got 'gpu'"), backend.use("gpu"):
        pass
    assert backend.describe() == before


def test_triton_without_a_gpu_is_an_error(python: Python, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_devices", lambda: ["cpu"])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    before = backend.describe()
    with pytest.raises(ImportError, match="the backend triton cannot run on cpu: triton: Triton has no CPU backend"):
        backend.choose("triton")
    with pytest.raises(ImportError, match="no CPU backend"), backend.use("triton"):
        pass
    assert backend.describe() == before
    if not torch.cuda.is_available():
        done = python(DESCRIBE, check=False, BICM_KERNELS_BACKEND="triton", TRITON_INTERPRET=None)
        assert done.returncode != 0
        assert "ImportError: BICM_KERNELS_BACKEND=triton cannot run on cpu" in done.stderr.splitlines()[-1]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU, as far as the choice can tell."""
    pytest.importorskip("triton")
    monkeypatch.setattr(backend, "_devices", lambda: ["cpu", "cuda"])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def registered(name: str) -> bool:
    """Whether Triton's kernel stands for CUDA tensors."""
    return f"bicm_kernels/{name}/CUDA" in torch.library._impls


@pytest.mark.usefixtures("gpu")
def test_triton_with_a_gpu_leaves_the_cpu_without() -> None:
    x = torch.ones(1, 4)
    with backend.use("triton"):
        assert backend.running("cuda") == "triton"
        assert registered("ddim_step")
        cpu, cuda = backend.describe().splitlines()
        assert cpu.startswith("cpu: nothing (the backend triton cannot run on cpu: ")
        assert cuda == "cuda: triton (Triton)"
        with pytest.raises(ImportError, match="the backend triton cannot run on cpu"):
            bk.ddim_step(x, x, a=1.0, b=0.5)
        assert backend.release_memory() >= 0
        with backend.use("triton"):  # the kernels that are there serve again
            assert registered("ddim_step")
        assert registered("ddim_step")
    assert not registered("ddim_step")
    assert torch.equal(bk.ddim_step(x, x, a=1.0, b=0.5), 1.5 * x)


@pytest.mark.usefixtures("gpu")
def test_triton_that_is_too_old_is_refused_with_one_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    for version, hip, oldest in (("3.4.0", None, "3.5"), ("3.5.1", "6.4", "3.6")):
        monkeypatch.setattr(triton, "__version__", version)
        monkeypatch.setattr(torch.version, "hip", hip)
        reason = f"triton: Triton {version} is too old for cuda: expected {oldest} or later"
        with pytest.raises(ImportError, match=f"the backend triton cannot run on cuda: {reason}"):
            backend.choose("triton")
    monkeypatch.setattr(torch.version, "hip", None)
    for version in ("3.5.0", "3.10.0+git"):
        monkeypatch.setattr(triton, "__version__", version)
        with backend.use("triton"):
            assert backend.running("cuda") == "triton"


@pytest.mark.usefixtures("gpu")
def test_triton_that_is_not_installed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "triton" else find(name, *rest))
    before = backend.running("cpu")
    with pytest.raises(ImportError, match="the backend triton cannot run on cuda: triton: Triton is not installed"):
        backend.choose("triton")
    assert backend.running("cpu") == before


def not_built() -> str:
    raise ImportError("the native library was not built")


def unknown_instructions() -> str:
    raise ValueError("no such instruction set")


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("fault", [not_built, unknown_instructions])
@pytest.mark.parametrize("before", ["auto", "native", "reference", "triton"])
def test_a_choice_that_fails_changes_nothing(
    before: str, fault: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with backend.use(before):
        described, running, direct = backend.describe(), dict(backend._running), backend.direct
        kernels = registered("ddim_step")
        assert kernels or before != "triton"
        with monkeypatch.context() as patch:
            patch.setattr(loaders, "native_cpu", fault)
            for _ in range(2):
                with pytest.raises((ImportError, ValueError), match=r"native library was not built|instruction set"):
                    backend.choose("native")
                with pytest.raises((ImportError, ValueError)), backend.use("native"):
                    pass
        assert backend.direct is direct
        assert backend._running == running
        assert backend.describe() == described
        assert registered("ddim_step") is kernels
        if before != "triton":
            bk.ddim_step(torch.ones(1, 4), torch.ones(1, 4), a=1.0, b=0.5)


INTERPRETED = """
import torch, bicm_kernels as bk
from bicm_kernels import backend, loaders
backend.choose("triton")
def missing():
    raise ImportError("not built")
loaders.native_cpu, kept = missing, loaders.native_cpu
try:
    backend.choose("native")
except ImportError as error:
    print(error)
x = torch.ones(2, 4)
print(backend.describe(), bk.ddim_step(x, x, a=1.0, b=0.5).unique().tolist())
loaders.native_cpu = kept
backend.choose("native")
print(backend.running("cpu"), bk.ddim_step(x, x, a=1.0, b=0.5).unique().tolist())
"""


def test_interpreted_triton_survives_a_choice_that_fails(python: Python) -> None:
    pytest.importorskip("triton")
    printed = python(INTERPRETED, TRITON_INTERPRET="1").stdout.splitlines()
    assert printed == [
        "the backend native cannot run on cpu: native: not built",
        "cpu: triton (Triton, interpreted) [1.5]",
        "native [1.5]",
    ]


# --- what the environment says once ---------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["", "-1", "1.5", "1e3", "64M", "²", " 8", "many"])
def test_a_wrong_amount_of_memory_is_refused(python: Python, value: str) -> None:
    done = python(DESCRIBE, check=False, BICM_KERNELS_KEPT_MEMORY=value)
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert last == f"ValueError: BICM_KERNELS_KEPT_MEMORY: expected a whole number of MiB, got {value!r}"


@pytest.mark.parametrize("value", ["", "auto", "Torch"])
def test_an_unknown_generator_is_refused(python: Python, value: str) -> None:
    done = python(DESCRIBE, check=False, BICM_KERNELS_GENERATOR=value)
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert last == f"ValueError: BICM_KERNELS_GENERATOR: expected native or torch, got {value!r}"


def test_the_contributors_are_told_every_variable() -> None:
    told = (KERNELS.parent / "CONTRIBUTING.md").read_text()
    read = {
        name
        for path in [*KERNELS.rglob("*.py"), *(KERNELS.parent / "csrc").rglob("*.cpp"), KERNELS.parent / "setup.py"]
        for name in re.findall(r'"(BICM_(?:KERNELS|CUDA)\w*)"', path.read_text())
    }
    assert {"BICM_KERNELS_KEPT_MEMORY", "BICM_KERNELS_GENERATOR", "BICM_KERNELS_ISA"} <= read
    assert {name for name in read if f"`{name}" not in told} == set()


def test_the_reference_runs_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def spy(name: str) -> Callable[..., Any]:
        original = getattr(bk.reference, name)
        return lambda *args, **kwargs: calls.append(name) or original(*args, **kwargs)

    names = [
        "normal",
        "uniform",
        "add_noise",
        "ddim_step",
        "bdia_step",
        "bdia_inverse_step",
        "affine_step",
        "denoised_step",
    ]
    for name in names:
        monkeypatch.setattr(bk.reference, name, spy(name))
    x, bdia = torch.zeros(2, 3), {"a": 1.0, "b": 0.5, "a_last": 1.0, "b_last": 0.5}

    def all_of_them() -> None:
        bk.normal((2, 3), seed=1)
        bk.uniform((2, 3), seed=1)
        bk.add_noise(x, 1.0, seed=1)
        bk.ddim_step(x, x, a=1.0, b=0.5)
        bk.bdia_step(x, x, x, **bdia)
        bk.bdia_inverse_step(x, x, x, **bdia)
        bk.affine_step([x], [1.0])
        bk.denoised_step([x], [1.0], [1.0], x0_weight=1.0)

    all_of_them()
    assert calls == []
    with backend.use("reference"):
        all_of_them()
    assert [name for name in calls if name in names] == names


def test_import_is_light(python: Python) -> None:
    """The kernels come without Triton, the compiler, and what only the diffusion package needs."""
    heavy = ("triton", "torch._dynamo", "torch._inductor", "sklearn", "matplotlib", "scipy", "rich", "tqdm")
    program = f"""
import sys, torch
before = set(sys.modules)
import bicm_kernels
print(sorted(set({heavy}) & (set(sys.modules) - before)))
"""
    assert python(program).stdout.strip() == "[]"


def test_the_library_registers_every_op() -> None:
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("bicm_kernels::")]
    assert len(names) >= 26
    for name in names:
        # A twin for TorchScript calls its op, which has the fake and the derivative.
        twin = name.partition(".")[0].endswith("_traced")
        composed = "CompositeExplicitAutograd" if name.partition(".")[0].endswith("_tracked") else "CPU"
        key = "CompositeImplicitAutograd" if twin else composed
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), name
        assert twin or torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta"), name


# --- instruction sets ---------------------------------------------------------------------------------------

DIGEST = """
import hashlib, itertools, torch, bicm_kernels as bk
dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
digest = hashlib.sha256()
def add(*tensors):
    for x in tensors:
        digest.update(x.contiguous().view(torch.uint8).numpy().tobytes())
def digest_all():
    for dtype, shape in itertools.product(dtypes, [(1, 1), (3, 67), (5, 1025), (2, 40_003), (300, 3, 8, 8)]):
        n = bk.normal(shape, seed=1, dtype=dtype)
        u = bk.uniform(shape, seed=2**63, step=3, sample_id=7, dtype=dtype)
        e = (4 * n.float()).to(torch.bfloat16)
        if len(shape) == 4:
            n, e = n.to(memory_format=torch.channels_last), e.transpose(2, 3).contiguous().transpose(2, 3)
        add(n, u, bk.add_noise(n, torch.linspace(0, 3, shape[0]), scale=0.9, seed=3))
        numbers = dict(a=1.01, b=-0.3, a_last=0.98, b_last=0.2)
        add(bk.bdia_step(n, u, e, gamma=0.9, **numbers), bk.bdia_inverse_step(n, u, e, gamma=0.9, **numbers))
        add(bk.ddim_step(u, (e, n), a=1.1, b=-0.7, guidance_scale=3.5))
        noise = dict(noise_weight=0.1, seed=4)
        add(bk.affine_step([n, u, e, n, u], [0.1, 0.2, 0.3, -0.4, 0.5], **noise))
        more = dict(x0_weight=0.7, clip=1.0, next_scale=0.3, **noise)
        add(*bk.denoised_step([n, u], [1.5, -2.0], [0.1, 0.2], **more))
    add(bk.fold_in(3, torch.arange(1000)))
    return digest.hexdigest()
print(bk.backend.describe())
for count in (1, 2):
    torch.set_num_threads(count)
    digest = hashlib.sha256()
    print(digest_all())
"""


@pytest.fixture(scope="module")
def best_digest() -> str:
    space: dict[str, Any] = {}
    exec(DIGEST.partition("print")[0], space)
    return str(space["digest_all"]())


@pytest.mark.parametrize("instructions", instruction_sets.EVERY)
def test_instruction_sets_and_threads_give_one_digest(python: Python, best_digest: str, instructions: str) -> None:
    instruction_sets.need(instructions)
    described, one, two = python(DIGEST, BICM_KERNELS_ISA=instructions).stdout.splitlines()
    drawn = "" if instructions in instruction_sets.DRAW_LIKE_TORCH else "; torch_randn is torch.randn"
    assert described == f"cpu: native (C++, {instructions}{drawn})"
    assert one == two == best_digest
