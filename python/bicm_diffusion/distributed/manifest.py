"""The manifest of a run: the settings that determine its samples, in a file next to them."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bicm_diffusion.distributed.atomic import write_text
from bicm_diffusion.distributed.formats import FORMATS
from bicm_diffusion.distributed.shards import listed, shards_in

MANIFEST = "manifest.json"
VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """The settings that determine the samples: their number, the batch size, the file format, the caller's settings.

    count, batch: integers of at least 1, NumPy's too. settings: JSON values, and values with one JSON form:
    tuples, NumPy's numbers, arrays and tensors, paths, dtypes and devices, which are stored as lists, numbers and text.
    Raises TypeError or ValueError naming the argument, for settings with the path to it: `settings['sampler'][0]`.

    >>> Manifest(6, 2, {"sigma": np.float64(0.5), "levels": (1, 2)}).settings
    {'sigma': 0.5, 'levels': [1, 2]}
    """

    count: int
    batch: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    save_as: str = "safetensors"
    version: int = VERSION

    def __post_init__(self) -> None:
        count, batch = _integer(self.count), _integer(self.batch)
        if count is None or batch is None or count < 1 or batch < 1:
            kind = TypeError if count is None or batch is None else ValueError
            raise kind(f"count, batch: expected integers of at least 1, got {self.count!r} and {self.batch!r}")
        if self.save_as not in FORMATS:
            raise ValueError(f"save_as: expected one of {', '.join(map(repr, FORMATS))}, got {self.save_as!r}")
        if not isinstance(self.settings, Mapping):
            raise TypeError(f"settings: expected a mapping, got {type(self.settings).__name__}")
        plain = {"count": count, "batch": batch, "settings": _plain(self.settings, "settings")}
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    def claim(self, directory: Path) -> None:
        """Write the manifest, or check that the existing one describes the same samples.

        Raises ValueError naming the differences, because a run with other settings is never continued, and where there
        are shards without a manifest, because their settings are unknown.
        """
        path = directory / MANIFEST
        if path.exists():
            told = differences(self, load_manifest(directory), "the run began with")
            if told:
                raise ValueError(f"{path} belongs to another run: {told}")
            return
        if directory.exists() and (orphans := shards_in(directory)):
            raise ValueError(
                f"{directory}: expected a {MANIFEST} with {listed(orphans)}, got none, so that it is unknown which "
                f"settings made them: restore it, move them away, or choose another directory"
            )
        directory.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")


def load_manifest(directory: Path) -> Manifest:
    """Return the manifest in a directory.

    Raises FileNotFoundError where there is none, and ValueError naming the file where it is not complete, or was
    written by another version.
    """
    path = directory / MANIFEST
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: {directory} holds no run")
    advice = f"restore it, or remove it and the shards in {directory} to begin again"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["version"]
        if version == VERSION:
            return Manifest(**{field.name: content[field.name] for field in fields(Manifest)})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no whole manifest ({type(error).__name__}: {error}): {advice}") from error
    raise ValueError(f"{path}: expected version {VERSION}, got {version!r}: {advice}")


def differences(mine: Manifest, theirs: Manifest, who: str) -> str:
    """Return what differs, as `count=23 where {who} 22`; of the settings only those that differ; empty if nothing."""
    told = []
    for name, value in asdict(mine).items():
        other = getattr(theirs, name)
        if not _same(value, other):
            if name == "settings":
                names = [
                    key for key in {**value, **other} if not _same(value.get(key, _ABSENT), other.get(key, _ABSENT))
                ]
                value, other = ({key: part[key] for key in names if key in part} for part in (value, other))
            told.append(f"{name}={value!r} where {who} {other!r}")
    return "; ".join(told)


_ABSENT = object()


def _same(value: Any, other: Any) -> bool:
    """Whether two plain values are equal; NaN is equal to NaN."""
    return bool(value == other) or (_ABSENT not in (value, other) and json.dumps(value) == json.dumps(other))


def _integer(value: Any) -> int | None:
    if isinstance(value, (bool, np.bool_)):
        return None
    try:
        return int(operator.index(value))
    except TypeError:
        return None


def _plain(value: Any, name: str) -> Any:
    """Return a value as it is after a round trip through JSON; `name` is the path to it."""
    if isinstance(value, np.generic | np.ndarray | Tensor):
        value = value.tolist()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, PurePath | torch.dtype | torch.device):
        return str(value)
    if isinstance(value, str):
        return str.__str__(value)  # an enumeration's value rather than its name
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        return _plain_mapping(value, name)
    raise TypeError(
        f"{name}: expected what JSON holds (None, bool, int, float, str, lists, mappings), NumPy's numbers, a tensor, "
        f"a path, a dtype or a device, got {type(value).__name__}"
    )


def _plain_mapping(value: Mapping[Any, Any], name: str) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for key, item in value.items():
        number = _integer(key)
        if number is None and not isinstance(key, str):
            raise TypeError(f"{name}: expected names of type str, got {key!r}")
        text = str.__str__(key) if isinstance(key, str) else str(number)
        if text in plain:
            raise ValueError(f"{name}: expected names that differ as text, got {text!r} twice")
        plain[text] = _plain(item, f"{name}[{key!r}]")
    return plain
