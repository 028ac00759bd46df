"""What torch promises nobody: used in one place, known by name, and missed by nothing but speed."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bicm_kernels import torch_internals

ROOT = Path(__file__).resolve().parents[2]
INTERNALS = ROOT / "bicm_kernels" / "torch_internals.py"
NATIVE = sorted((ROOT / "csrc" / "torch").rglob("*.cpp"))

#: The names, by who looks them up.
PYTHON = {
    "_C._autograd._get_current_graph_task_keep_graph",
    "_C._autograd._top_saved_tensors_default_hooks",
    "_C._dispatch_call_boxed",
    "_C._functions.DelayedError",
    "_C._functorch.CInterpreter",
    "_C._functorch.TransformType.Vmap",
    "_C._functorch.get_interpreter_stack",
    "_C._functorch.get_unwrapped",
    "_C._functorch.is_batchedtensor",
    "_C._functorch.is_gradtrackingtensor",
    "_C._functorch.is_legacy_batchedtensor",
    "_C._functorch.peek_interpreter_stack",
    "_C._is_tracing",
    "_C._len_torch_dispatch_stack",
    "_C._len_torch_function_stack",
    "autograd.forward_ad._current_level",
    "jit.is_tracing",
    "library._impls",
}
CPP = {
    "_C._autograd._top_saved_tensors_default_hooks",
    "_C._dynamo.guards._empty_strided_cpu",
    "_C._dynamo.guards._empty_strided_cuda",
    "_C._functorch.peek_interpreter_stack",
    "_C._is_tracing",
    "_C._len_torch_dispatch_stack",
    "_C._len_torch_function_stack",
    "Tensor.__dlpack_c_exchange_api__",
    "autograd.forward_ad._current_level",
    "autograd.profiler._is_profiler_enabled",
    "compiler._is_compiling_flag",
    "library._impls",
}
#: Where the package above takes one itself: it may use public names of the ops alone.
ELSEWHERE = {
    "consistency/frozen.py": {"_C._autograd", "utils._pytree.tree_flatten", "utils._pytree.tree_unflatten"},
    "adapters/diffusers/ddpm.py": {"_assert_async"},
    "adapters/diffusers/scheduler.py": {"_assert_async"},
    "train/trainer.py": {"utils._pytree.tree_map_only"},
}

# In a process that has torch, one child for each name: without it, the package is imported and its ops are called.
WITHOUT = """
import os, sys, traceback
import pytest
import torch

def use():
    import bicm_kernels as bk
    x, y = torch.ones(2, 3), torch.full((2, 3), 2.0, requires_grad=True)
    assert torch.equal(bk.ddim_step(x, x, a=2.0, b=0.5), 2.5 * x)
    assert torch.equal(bk.affine_step([x, x], [torch.ones(2), 1.0]), 2.0 * x)
    bk.denoise(x, y, 1.0, 0.5).sum().backward()
    assert y.grad is not None and y.grad.abs().min() > 0
    for gradient in ("auto", "forward"):
        y.grad = None
        bk.pseudo_huber(y, x, c=0.1, gradient=gradient).backward()
        assert y.grad is not None and y.grad.abs().min() > 0
    out = bk.ddim_step(x, x, a=2.0, b=0.5, out=torch.empty(2, 3))
    assert torch.equal(out, 2.5 * x)

failed = []
for path in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        *folders, name = path.split(".")
        owner = torch
        for folder in folders:
            owner = getattr(owner, folder)
        try:
            delattr(owner, name)
            if name == "_is_tracing":  # torch's own would follow a renaming
                torch.jit.is_tracing = lambda: False
            use()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        failed.append(path)
assert not failed, failed
"""


def private_uses(path: Path) -> Iterator[str]:
    """The dotted names under torch, without torch, of which a part begins with one underscore."""
    tree = ast.parse(path.read_text())
    roots = {"torch": ""}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            module = (node.module or "").partition(".")[2]
            roots |= {alias.asname or alias.name: f"{module}.{alias.name}".strip(".") for alias in node.names}
        if isinstance(node, ast.Import):
            roots |= {x.asname: x.name.partition(".")[2] for x in node.names if x.asname and x.name[:6] == "torch."}
    for node in ast.walk(tree):
        names = []
        while isinstance(node, ast.Attribute):
            names.append(node.attr)
            node = node.value
        if isinstance(node, ast.Name) and node.id in roots:
            found = ".".join(filter(None, [roots[node.id], *reversed(names)]))
            if re.search(r"(^|\.)_[^_]", found):
                yield found


def longest(names: Iterator[str]) -> set[str]:
    """The names without those that another one begins with."""
    found = {*names}
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


def test_one_module_takes_private_names() -> None:
    found: dict[str, set[str]] = {}
    for package in (ROOT / "bicm_kernels", ROOT / "python" / "bicm_diffusion"):
        for path in package.rglob("*.py"):
            if path != INTERNALS and (names := longest(private_uses(path))):
                found[str(path.relative_to(package))] = names
    assert found == ELSEWHERE


def test_the_names_are_listed() -> None:
    text = INTERNALS.read_text()
    found = {*re.findall(r'find\("([\w.]+)"', text)} | longest(private_uses(INTERNALS))
    assert found == PYTHON
    native = "".join(path.read_text() for path in NATIVE)
    paths = {name.removeprefix("torch.") for name in re.findall(r'"(torch\.[\w.]+)"', native)}
    private = {name for name in paths if re.search(r"(^|\.)_", name) and not name.endswith("__dict__")}
    words = {
        "_is_profiler_enabled": "autograd.profiler",
        "_current_level": "autograd.forward_ad",
        "_is_compiling_flag": "compiler",
    }
    assert private | {f"{words[word]}.{word}" for word in words if f'"{word}"' in native} == CPP


@pytest.mark.slow
def test_the_package_works_without_each(python: Callable[..., Any]) -> None:
    # torch.library and torch.compiler themselves do not work without these.
    names = sorted((PYTHON | CPP) - {"library._impls", "compiler._is_compiling_flag"})
    program = f"import sys\nsys.argv[1:] = {names!r}\n{WITHOUT}"
    python(program, BICM_KERNELS_BACKEND="native")


def test_a_function_may_lack_its_node() -> None:
    class Function:
        pass

    torch_internals.call_backward_at_once(Function)
    assert not hasattr(Function, "apply")
