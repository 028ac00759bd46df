"""What versions of torch cannot do, as reasons to skip or to expect a failure; `docs/versions.md` lists them."""

from __future__ import annotations

import pytest
import torch

#: Tensors made of foreign memory by C, which the dispatcher's results need to come from the free list.
KEEPS_RESULTS = torch.__version__ >= "2.11"


def since(version: str, reason: str) -> pytest.MarkDecorator:
    """Skip a test with an older torch."""
    return pytest.mark.skipif(torch.__version__ < version, reason=f"torch before {version}: {reason}")
