"""Private names of torch that this package uses, and what happens where one is missing.

Every name is looked up once, here, and only here. A missing name costs speed or one
feature, as its comment says; importing the package never fails for it. The C++ side looks up its names in
`csrc/torch/python.cpp` and `inputs.cpp`, and disables the direct calls where one is missing. Symbols of torch's
libraries (`python.cpp`, `python_watchers.cpp`, `torch_abi.cpp`) are weak: without one, a name of Python's is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def find(path: str, default: Any) -> Any:
    """An attribute of torch by its path, or the default."""
    found: Any = torch
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            return default
    return found


#: How many dispatch modes are active. If missing, one: every call is checked before it runs, and no tensor made of a
#: number is kept for the next call.
dispatch_modes: Callable[[], int] = find("_C._len_torch_dispatch_stack", lambda: 1)

#: How many modes are active that functions of torch are shown to. If missing, none: they do not see losses.
_function_modes: Callable[[], int] = find("_C._len_torch_function_stack", lambda: 0)

#: Whether TorchScript traces. If missing: the public function, which is slower.
is_tracing: Callable[[], bool] = find("_C._is_tracing", find("jit.is_tracing", lambda: False))

#: Whether a gradient is batched (``is_grads_batched=True``). If missing, always: derivatives take the reference.
is_batched_gradient: Callable[[Tensor], bool] = find("_C._functorch.is_legacy_batchedtensor", lambda x: True)

#: Whether a graph is kept for another backward pass. If missing, always: gradients are copied.
keeps_graph: Callable[[], bool] = find("_C._autograd._get_current_graph_task_keep_graph", lambda: True)

#: The hooks that pack what is saved for the backward pass, None where there are none. If missing, always some:
#: gradients are formed in the backward pass unless a call asks for another way.
_saving_hooks: Callable[[bool], Any] = find("_C._autograd._top_saved_tensors_default_hooks", lambda traced: ())

#: The active torch.func transforms. If missing: every call takes the reference, which supports them.
_transform: Callable[[], Any] = find("_C._functorch.peek_interpreter_stack", lambda: None)
_Transform: Any = find("_C._functorch.CInterpreter", None)
_transforms: Callable[[], Any] = find("_C._functorch.get_interpreter_stack", lambda: None)
_vmap: Any = find("_C._functorch.TransformType.Vmap", None)
_is_differentiated: Callable[[Tensor], bool] = find("_C._functorch.is_gradtrackingtensor", lambda x: False)
_unwrapped: Callable[[Tensor], Tensor] = find("_C._functorch.get_unwrapped", lambda x: x)
_is_mapped: Callable[[Tensor], bool] = find("_C._functorch.is_batchedtensor", lambda x: False)
_transforms_are_known = None not in (find("_C._functorch.peek_interpreter_stack", None), _Transform)

#: Implementations registered from Python, as ``library/op/key``. If missing: one that replaces ours on the CPU is used
#: only by calls that go through the dispatcher.
implementations: set[str] = find("library._impls", set())


def transforms_alone() -> bool:
    """Whether a torch.func transform is active, where that can be determined."""
    # isinstance, because Dynamo treats the None of an empty stack as an object that is not None.
    return _transforms_are_known and isinstance(_transform(), _Transform)


if not hasattr(forward_ad, "_current_level"):
    # The level of forward-mode differentiation, -1 outside. If missing, 0: every call takes the reference.
    forward_ad._current_level = 0


def forward_level() -> int:
    """The level of forward-mode differentiation, -1 outside."""
    return forward_ad._current_level


def transformed() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is active, or this cannot be determined."""
    return not _transforms_are_known or isinstance(_transform(), _Transform) or forward_level() >= 0


def saves_through_hooks() -> bool:
    """Whether hooks pack what is saved for the backward pass."""
    return _saving_hooks(True) is not None


def undisturbed() -> bool:
    """Whether no tracing, mode or transform is active; not for code that Dynamo traces."""
    if not _transforms_are_known or _transform() is not None:
        return False
    return forward_ad._current_level < 0 and not (dispatch_modes() or _function_modes() or is_tracing())


def bare(op: Any) -> Callable[..., Any]:
    """An op's overload, called without torch's check for overrides. If missing: the overload."""
    boxed, handle = find("_C._dispatch_call_boxed", None), getattr(op, "_handle", None)
    if boxed is None or handle is None:
        return getattr(op, "_op", op)
    return partial(boxed, handle)


def inside_vmap() -> bool:
    """Whether a transform is ``torch.vmap``. If missing, never: a seed that every slice repeats is not refused."""
    return any(level.key() == _vmap for level in _transforms() or [])


# torch.compiler.assume_constant_result, without importing Dynamo, which takes a second: the stack is constant while a
# graph is traced, and Dynamo guards a graph with it. Where Dynamo does not support the mark, such graphs break here.
inside_vmap._dynamo_marked_constant = True  # type: ignore[attr-defined]


def differs_between_slices(x: Tensor) -> bool:
    """Whether ``torch.vmap`` maps over a tensor, which other transforms may have wrapped since. If missing: no."""
    # Dynamo reads only the innermost transform: a graph of vmap over grad raises.
    while not torch.compiler.is_compiling() and _is_differentiated(x):
        x = _unwrapped(x)
    return _is_mapped(x)


def refusing(message: bytes, tensors: list[Tensor]) -> list[Tensor]:
    """Tensors like these that raise a RuntimeError if differentiated. If missing: they carry no derivative."""
    delayed = find("_C._functions.DelayedError", None)
    if delayed is None:
        return tensors
    refused = delayed(message, len(tensors))(*[x.detach().requires_grad_() for x in tensors])
    return [*refused] if isinstance(refused, tuple) else [refused]


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without its check for transforms. If missing: with it."""
    return getattr(super(torch.autograd.Function, function), "apply", function.apply)


def call_backward_at_once(function: type[torch.autograd.Function]) -> None:
    """Let the engine call ``function.backward`` itself. If missing: by way of a method that looks for another name."""
    node = getattr(function, "_backward_cls", None)
    if node is not None:
        node.apply = function.backward


def unregister(library: torch.library.Library) -> None:
    """Undo a library's registrations. If missing: when it is collected."""
    getattr(library, "_destroy", lambda: None)()
