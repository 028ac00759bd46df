"""Bytes and launches: the least possible for every elementwise op, and docs/evidence.md says what was counted."""

from __future__ import annotations

import pytest

from .evidence import DOCUMENT, KINDS, ROWS, section, table


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ROWS)
def test_bytes_and_launches(name: str, kind: str) -> None:
    found = ROWS[name][0](*KINDS[kind])
    if "loss" in name or "huber" in name:
        # Beside the tensors, a few numbers for each sample and each block that reads them.
        assert found.least <= found.counted < found.least + 0.02
        assert found.launches == 2
    else:
        assert found.counted == found.least
        assert found.launches == 1


def test_the_document_is_up_to_date() -> None:
    _, written, _ = section(DOCUMENT.read_text())
    assert written == table(), "run `make evidence`"
