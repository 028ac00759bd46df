"""Bytes and launches: the least possible for every elementwise op, and docs/evidence.md says what was counted."""

from __future__ import annotations

import pytest

from tests.evidence.document import written

from .evidence import KINDS, ROWS, table


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ROWS)
def test_bytes_and_launches(name: str, kind: str) -> None:
    found = ROWS[name](*KINDS[kind])
    # A block reads each number of its samples once: a few bytes beside the 8 KiB and more that it moves.
    assert found.numbers < 0.05
    if any(word in name for word in ("loss", "huber", "gaussian")):
        # Beside the tensors, the sums: one of each chunk is written and read, and one of each sample written.
        assert found.least <= found.counted < found.least + 0.01
    else:
        assert found.counted == found.least
    # Losses that keep their gradients scale them in a second one; of a density it is the caller who weighs them.
    twice = "forward and backward" in name if "gaussian" in name else "loss" in name or "huber" in name
    assert found.launches == 1 + twice


def test_the_document_is_up_to_date() -> None:
    assert written("counted") == table(), "run `make evidence`"
