"""Fixtures that every test shares. They import torch themselves: sanitizers run tests that do without it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from torch import Tensor

# A missing library must fail here: the reference, which passes every test of bits, must not stand in for it.
os.environ.setdefault("BICM_KERNELS_BACKEND", "native")

# Failures must repeat from run to run, and a shared machine has no deadlines. The GPU's tests do without hypothesis.
with suppress(ImportError):
    from hypothesis import settings

    settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=60, database=None)
    settings.load_profile("repeatable")

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    words = "run at most so many cases of a test, a third as many of a slow one, spread evenly; 0: all"
    parser.addoption("--cases", type=int, default=0, help=words)
    parser.addoption("--share", default="0/1", help="K/N: run every Nth test from the Kth on, counted from 0")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    choose_cases(config, items)
    place, _, shares = config.getoption("--share").partition("/")
    config.hook.pytest_deselected(items=[item for k, item in enumerate(items) if k % int(shares) != int(place)])
    items[:] = items[int(place) :: int(shares)]


def choose_cases(config: pytest.Config, items: list[pytest.Item]) -> None:
    most = config.getoption("--cases")
    if not most:
        return
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept: set[pytest.Item] = set()
    for some in cases.values():
        count = most if not any(item.get_closest_marker("slow") for item in some) else max(1, most // 3)
        # The first, the last and some between them: parameters vary slowly from the left and fast from the right.
        kept |= {some[place * (len(some) - 1) // max(1, count - 1)] for place in range(count)}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.fixture(scope="session")
def same_bits() -> Callable[[Tensor, Tensor], None]:
    """Assert that two tensors agree in dtype, shape and every bit; a NaN is a NaN, whatever its payload."""
    import torch

    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}

    def check(actual: Tensor, expected: Tensor) -> None:
        assert actual.dtype == expected.dtype
        assert actual.shape == expected.shape
        if actual.dtype.is_floating_point:
            nan = expected.isnan()
            assert torch.equal(actual.isnan(), nan), "NaNs stand elsewhere"
            whole = integers[actual.element_size()]
            actual, expected = (x.detach().contiguous().view(whole)[~nan] for x in (actual, expected))
        differ = (actual != expected).sum().item()
        assert differ == 0, f"{differ} of {actual.numel()} elements differ"

    return check


@pytest.fixture(scope="session")
def threads() -> Callable[[int], AbstractContextManager[None]]:
    """A context in which torch runs on so many threads."""
    import torch

    @contextmanager
    def use(count: int) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    return use


@pytest.fixture(params=["native", "reference"])
def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test on the kernels and again on the reference."""
    from bicm_kernels import backend

    with backend.use(request.param):
        yield request.param


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """The calls that `direct` is asked for beside the dispatcher, and whether it takes them."""
    from bicm_kernels import backend, scale_input
    from tests.support.ways import Spy

    scale_input(torch.ones(1, 1), 0.0)  # looks for implementations that are new since the last call
    calls: list[tuple[str, bool]] = []
    monkeypatch.setattr(backend, "direct", Spy(calls))
    return calls


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a program in a fresh interpreter with variables added to its environment (None takes one away)."""

    from tests.support import fresh

    paths = [str(ROOT), str(ROOT / "python")]

    def run(program: str, check: bool = True, **variables: str | None) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        environment |= {name: value for name, value in variables.items() if value is not None}
        for name in [name for name, value in variables.items() if value is None]:
            environment.pop(name, None)
        done = fresh.run(program, environment, tmp_path, paths)
        assert not check or done.returncode == 0, done.stderr
        return done

    return run
