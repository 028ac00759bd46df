"""Every overload of every op under torch's own opcheck: schema, fake, aliasing and autograd registration."""

from __future__ import annotations

import pytest
import torch

from tests.support.overloads import SAMPLES, overload_of


def test_every_overload_has_a_sample() -> None:
    names = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if "bicm_kernels::" in name}
    assert {name for name in names if not name.partition(".")[0].endswith("_traced")} == set(SAMPLES)


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name: str) -> None:
    assert SAMPLES[name]
    for *positional, keywords in SAMPLES[name]:
        torch.library.opcheck(overload_of(name), tuple(positional), keywords)
