"""Shapes on the command line."""

from __future__ import annotations

import click

from benchmarks.cases import Shape


def shapes_given(_: click.Context, __: click.Parameter, value: str | None) -> tuple[Shape, ...] | None:
    """Shapes as 1x4x64x64, separated by commas."""
    if value is None:
        return None
    shapes = [tuple(int(n) if n.isdecimal() else 0 for n in item.strip().split("x")) for item in value.split(",")]
    if not all(len(shape) > 1 and min(shape) > 0 for shape in shapes):
        raise click.BadParameter(f"expected shapes like 1x4x64x64 separated by commas, got {value!r}")
    return tuple(shapes)
