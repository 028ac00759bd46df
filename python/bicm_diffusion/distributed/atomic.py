"""Atomic writes: files and folders are complete or absent whenever a process is killed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file or a folder under another name, and move it to `path` once it is on disk."""
    partial = _partial(path)
    write(partial)
    for written in [*partial.glob("*"), partial]:
        _sync(written)
    partial.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a file of text."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def remove_whole(path: Path) -> None:
    """Remove a file or a folder; a folder is never visible with only some of its files."""
    remains = path.replace(_partial(path))
    _remove(remains)


def clear_partial(directory: Path) -> None:
    """Remove the temporary files of a killed run."""
    for name in ("samples-*.partial", "manifest.*.partial"):
        for path in directory.glob(name):
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _partial(path: Path) -> Path:
    return path.with_suffix(f".{os.getpid()}.partial")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
