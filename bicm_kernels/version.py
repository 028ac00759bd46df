"""The version of both packages: from pyproject.toml in a source tree, else from the installed distribution."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

DISTRIBUTION = "bicm-kernels"


def _version(root: Path) -> str:
    """Return the version of the package in the directory `root`."""
    project = root / "pyproject.toml"
    # In a source tree the metadata may belong to another installation, or to an older version.
    if project.is_file():
        text = project.read_text(encoding="utf-8")
        found = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
        if f'name = "{DISTRIBUTION}"' in text and found is not None:
            return found[1]
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


__version__ = _version(Path(__file__).resolve().parents[1])
