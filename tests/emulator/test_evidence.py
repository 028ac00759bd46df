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
    if "loss" in name or "huber" in name:
        # Beside the tensors, the sums: one of each chunk is written and read, and one of each sample written.
        assert found.least <= found.counted < found.least + 0.01
        assert found.launches == 2
    else:
        assert found.counted == found.least
        assert found.launches == 1


def test_the_document_is_up_to_date() -> None:
    assert written("counted") == table(), "run `make evidence`"
