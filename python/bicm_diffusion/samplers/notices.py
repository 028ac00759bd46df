"""Warnings of samplers, attributed to the caller's line."""

from __future__ import annotations

import sys
import warnings

#: Frames of these packages are not the user's.
OURS = ("bicm_diffusion", "bicm_kernels", "torch")


class InexactInversionWarning(UserWarning):
    """A floating-point inversion is expected to lose visible detail; the exact one loses nothing."""


class RetraceWarning(UserWarning):
    """A trajectory is not being retraced, or did not return to its start."""


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the first frame outside this package."""
    level, frame = 1, sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in OURS:
        level, frame = level + 1, frame.f_back  # type: ignore[assignment]
    warnings.warn(message, category, stacklevel=level)
