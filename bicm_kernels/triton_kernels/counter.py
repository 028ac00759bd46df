"""Counting the programs of a launch, the last of which makes one result of what all have found."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def finishes_last(finished, begun):
    """Whether a program is the last of its launch. What it stored before is seen by whom this tells so."""
    tl.debug_barrier()  # all threads have stored before one counts
    # Whatever an aborted launch left is below.
    tl.atomic_max(finished, begun, sem="relaxed")
    return tl.atomic_add(finished, 1, sem="acq_rel") == begun + (tl.num_programs(0) - 1)


#: Words that only grow, and where the next launch begins.
_words: dict[torch.device, tuple[Tensor, int]] = {}
_in_order = threading.Lock()


def begin(device: torch.device, programs: int) -> tuple[Tensor, int]:
    """A word that counts a launch's programs, and what it counts from.

    Launches on the default stream queue and share one: each begins where the one before it ends. On other streams,
    which overlap and where graphs are captured, each has its own, cleared before it.
    """
    if device.type != "cpu" and torch.accelerator.current_stream(device).stream_id:
        return torch.zeros((), dtype=torch.int64, device=device), 0
    if device not in _words:
        _words[device] = torch.zeros((), dtype=torch.int64, device=device), 0
    word, begun = _words[device]
    _words[device] = word, begun + programs
    return word, begun


@contextmanager
def counted(device: torch.device, programs: int | None) -> Iterator[dict[str, Any]]:
    """The arguments by which the programs of the launch inside count themselves; None: none has to know.

    Launches of several threads begin in the order in which they are launched.
    """
    if programs is None:
        yield {"finished": None, "begun": 0}
        return
    with _in_order:
        finished, begun = begin(device, programs)
        yield {"finished": finished, "begun": begun}
