"""Pairs as dictionaries of tensors only, for safetensors, torch.save and NumPy files."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from bicm_diffusion.described import described
from bicm_diffusion.samplers.prediction import Preconditioned
from bicm_diffusion.samplers.record import Record
from bicm_diffusion.schedules import Schedule

VERSION = 1
#: The names of the entries besides a pair's tensors: settings as bytes of JSON, levels, checksums.
ABOUT, LEVELS, ORIGIN = "about", "levels", "origin"


def pack(
    kind: str, tensors: Mapping[str, Tensor], words: Mapping[str, Any], record: Record | None
) -> dict[str, Tensor]:
    """Return a pair's tensors and its other data as tensors."""
    state = {name: x.detach().contiguous() for name, x in tensors.items()}
    about: dict[str, Any] = {"version": VERSION, "kind": kind, **words}
    if record is not None:
        table = record.table()
        about |= {
            "method": record.method,
            "index": record.index,
            "settings": {name: _coded(value) for name, value in record.settings.items()},
            "levels": list(table),
            "asked": record.levels.asked if isinstance(record.levels, Schedule) else None,
            "conditions": record.digest(),
        }
        state[LEVELS] = torch.tensor(list(table.values()), dtype=torch.float64)
        if record.origin is not None:
            state[ORIGIN] = record.origin
    state[ABOUT] = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    return state


def unpack(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor], dict[str, Any], Record | None]:
    """Return kind, tensors, settings and record of a packed pair; raises ValueError for other input."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state: expected the state_dict of a pair, got {described(state)}")
    if not isinstance(state.get(ABOUT), Tensor):
        names = list(map(str, state))
        given = str(names[:8])[:-1] + (", …]" if len(names) > 8 else "]")
        raise ValueError(f"state: expected the state_dict of a pair, with {ABOUT!r} in it, got the names {given}")
    try:
        about = json.loads(bytes(state[ABOUT].tolist()))
        assert {"version", "kind"} <= about.keys()
    except (ValueError, TypeError, AttributeError, AssertionError):
        raise ValueError(f"state: expected the state_dict of a pair, got another {ABOUT!r} than one has") from None
    if about["version"] != VERSION:
        raise ValueError(f"state: expected version {VERSION} of a pair's state_dict, got {about['version']}")
    tensors = {name: x for name, x in state.items() if name not in (ABOUT, LEVELS, ORIGIN)}
    if LEVELS not in state:
        return about["kind"], tensors, about, None
    table = dict(zip(about["levels"], map(tuple, state[LEVELS].tolist()), strict=True))
    levels = table if about["asked"] is None else Schedule(**table, asked=about["asked"])
    settings = {name: _decoded(value) for name, value in about["settings"].items()}
    record = Record(about["method"], levels, settings, about["index"], state.get(ORIGIN), about["conditions"])
    return about["kind"], tensors, about, record


def write(state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write a packed pair as a safetensors file."""
    seen: set[int] = set()
    apart = {}
    for name, x in state.items():
        place = x.untyped_storage().data_ptr()  # shared memory is stored once
        apart[name] = x.clone() if place in seen else x
        seen.add(place)
    _safetensors().save_file(apart, path)


def read(path: str | os.PathLike[str], device: str | torch.device) -> dict[str, Tensor]:
    """Read a packed pair from a safetensors file; raises ValueError for other files."""
    library = _safetensors()
    from safetensors import SafetensorError

    if os.path.isdir(path):
        raise ValueError(f"path: expected a safetensors file, as save_pair writes it, got the folder {os.fspath(path)}")
    try:
        state: dict[str, Tensor] = library.load_file(path, device=str(device))
    except SafetensorError as error:
        saved = zipfile.is_zipfile(path)
        hint = "; torch.load(path, weights_only=True) reads what torch.save wrote" if saved else ""
        raise ValueError(
            f"path: expected a safetensors file, as save_pair writes it, got {os.fspath(path)}{hint}"
        ) from error
    if ABOUT not in state:
        raise ValueError(
            f"path: expected a pair's file, as save_pair writes it, got {os.fspath(path)}, a safetensors file of "
            "other tensors"
        )
    return state


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "a pair's file needs safetensors: pip install 'bicm-kernels[diffusion]'; torch.save(pair, …) does not"
        ) from error
    return safetensors.torch


def _coded(value: Any) -> Any:
    if isinstance(value, Preconditioned):
        return asdict(value)
    if isinstance(value, tuple):
        return {"tuple": [_coded(x) for x in value]}
    if isinstance(value, Tensor):
        return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    return value


def _decoded(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(_decoded(x) for x in value["tuple"])
    if "tensor" in value:
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]))
    return Preconditioned(**value)
