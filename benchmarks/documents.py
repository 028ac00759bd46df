"""Measurements as JSON, with the machine and the settings, and back."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.measurement import Measurement, cores
from benchmarks.overhead import Overhead
from benchmarks.sizes import Skipped
from benchmarks.timing import Timing
from bicm_kernels import __version__, backend

SCHEMA = 2
PEERS = ("diffusers", "k-diffusion")


def processor() -> str:
    """The processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def version_of(name: str) -> str | None:
    """A distribution's version, None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """The environment of the figures."""
    about: dict[str, Any] = {
        "processor": processor(),
        "cores": cores(),
        "memory": psutil.virtual_memory().total,
        "system": platform.platform(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "bicm-kernels": __version__,
        "backend": backend.describe(),
    }
    about |= {name: version for name in PEERS if (version := version_of(name))}
    if torch.cuda.is_available():
        about |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return about


def document(
    measurements: Sequence[Measurement],
    overheads: Sequence[Overhead] = (),
    settings: Mapping[str, Any] | None = None,
    skipped: Sequence[Skipped] = (),
) -> dict[str, Any]:
    """Everything as JSON: seconds with their quartiles, bytes, ratios, the machine and the settings."""
    rows = [
        asdict(m)
        | {
            "elements": m.elements,
            "bytes_per_second": m.bandwidth(),
            "ratios": {name: m.ratio(name) for name in m.times if name != "ours"},
        }
        for m in measurements
    ]
    return {
        "schema": SCHEMA,
        "environment": environment(),
        "settings": dict(settings or {}),
        "measurements": rows,
        "skipped": [asdict(row) for row in skipped],
        "overhead": [asdict(row) for row in overheads],
    }


def read(path: Path) -> dict[str, Any]:
    """A document of `document`, its measurements as objects. Raises ValueError where the file is something else."""
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema {schema}, expected {SCHEMA}: measure again with this version")
    known = {field.name for field in fields(Measurement)}
    rows = [{name: value for name, value in row.items() if name in known} for row in found["measurements"]]
    for row in rows:
        row["shape"] = tuple(row["shape"])
        row["times"] = {name: Timing(**timing) for name, timing in row["times"].items()}
    overheads = [Overhead(**row | {"time": Timing(**row["time"])}) for row in found["overhead"]]
    return found | {"measurements": [Measurement(**row) for row in rows], "overhead": overheads}
