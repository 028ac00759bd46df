"""Whether what tables were made from is as it was: what a scheduler asks before every step, in one call.

The native library answers where it is loaded; the functions here mean the same, and are used where it is not. `own` is
an object's attributes, the dictionary itself.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bicm_kernels import backend
from bicm_kernels.torch_internals import transformed

#: An attribute's name, its value as it was read, and its version counter, if it has one.
Source = tuple[str, Any, int | None]

#: Bits of `ready`'s answer: the inputs are as they were, and every argument may go to a kernel; every tensor with
#: dimensions is float32, and none carries a derivative to record; a tensor is of another dtype than float32; those with
#: dimensions are of one shape, strided and on the CPU, besides SINGLE.
READY, SINGLE, OTHER, ALIKE = 1, 2, 4, 16


class Inputs(NamedTuple):
    """What was read of an object's attributes: see `note`."""

    sources: tuple[Source, ...]
    absent: tuple[str, ...]
    configuration: str
    options: tuple[tuple[str, Any], ...]
    records: bool


def note(*noted: Any) -> Any:
    """Note what was read: sources, names of absent attributes, the name of the attribute that holds options as its own
    attributes, these options and their values, and whether a source that requires a gradient makes a difference.
    """
    return Inputs(*noted)


def _same(now: Any, then: Any) -> bool:
    # Two tensors of equal numbers may differ later.
    return now is then or not (isinstance(now, Tensor) or isinstance(then, Tensor) or now != then)


def unchanged(inputs: Any, own: dict[str, Any]) -> bool:
    """Whether every source is the same object, not written to, and every option has its value."""
    try:
        records = inputs.records and torch.is_grad_enabled()
        for name, value, version in inputs.sources:
            now = own[name]
            if not _same(now, value) or (version is not None and now._version != version):
                return False
            if records and isinstance(now, Tensor) and now.requires_grad:
                return False
        if any(name in own for name in inputs.absent):
            return False
        # The originals read attributes of the configuration, which may differ from its items.
        options = vars(own[inputs.configuration]) if inputs.options else {}
        return all(_same(options[name], value) for name, value in inputs.options)
    except Exception:  # an attribute or option that is gone, or that does not compare
        return False


_unchanged = unchanged  # the name becomes the native library's


def ready(inputs: Any, own: dict[str, Any], args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """What is known of a call, as bits; 0 where the caller has to find out for itself."""
    if torch.compiler.is_compiling() or not _unchanged(inputs, own):
        return 0
    answer, shape = READY | SINGLE | ALIKE, None
    for x in (*args, *kwargs.values()):
        if not isinstance(x, Tensor):
            continue
        if type(x) is not Tensor:
            return 0
        single = x.dtype is torch.float32
        answer |= 0 if single else OTHER
        if (not single and x.dim()) or (x.requires_grad and torch.is_grad_enabled()):
            answer &= ~(SINGLE | ALIKE)
        if x.dim():
            shape = x.shape if shape is None else shape
            if not x.is_cpu or x.layout is not torch.strided or x.shape != shape:
                answer &= ~ALIKE
    return answer if shape else answer & ~ALIKE


def foreseen(own: dict[str, Any], tensor: Any) -> Any:
    """What the attribute ``_pending`` holds for a tensor, once: (weak reference, version, step, result, inputs)."""
    pending = own.get("_pending")
    if pending is None or torch.compiler.is_compiling():
        return None
    own["_pending"] = None
    made_for, version, step, result, inputs = pending
    if made_for() is tensor and step == own.get("_step_index") and tensor._version == version:
        # Autograd has no record of the result as a function of the tensor.
        recorded = torch.is_grad_enabled() and tensor.requires_grad
        if not recorded and _unchanged(inputs, own):
            if own.get("is_scale_input_called") is False:
                own["is_scale_input_called"] = True
            return result
    own["_foresees"] = False  # the caller changes the tensor first: nothing is to be made ahead again
    return None


def output(cls: Any, *items: Any) -> Any:
    """An object of a subclass of OrderedDict: names and values in turn become items and attributes."""
    result = cls.__new__(cls)
    attributes = result.__dict__
    for name, value in zip(items[::2], items[1::2], strict=True):
        attributes[name] = value
        OrderedDict.__setitem__(result, name, value)
    return result


def place_in(row: Tensor, element: Any) -> int | None:
    """Which element of a 1-d tensor a 0-d one is, by its address, without a device sync; None for other tensors."""
    plain = type(element) is Tensor and type(row) is Tensor and not transformed()
    if not plain or element.dtype is not row.dtype or element.dim() or row.dim() != 1 or element.device != row.device:
        return None
    spacing = row.stride(0) * row.element_size()
    distance = element.data_ptr() - row.data_ptr()
    if spacing <= 0 or distance % spacing or not 0 <= distance // spacing < len(row):
        return None
    return distance // spacing


#: The same, in Python: for tests.
TWINS = {f.__name__: f for f in (note, unchanged, ready, foreseen, output, place_in)}

if hasattr(backend.library, "place_in"):
    globals().update({name: getattr(backend.library, name) for name in TWINS})
