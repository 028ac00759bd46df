"""Another class for a real digit, and what round trips lose."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="the digits come with scikit-learn, an extra of this package")
pytest.importorskip("safetensors", reason="the weights are read with safetensors, an extra of this package")

from bicm_diffusion import vp_schedule
from examples.digits.data import Digits, load_split, one_per_class
from examples.digits.denoising import load_denoiser
from examples.digits.editing import (
    DDIM,
    EDITORS,
    METHODS,
    Edit,
    edit,
    edit_table,
    round_trip,
    round_trip_table,
    save_edits,
    targets_of,
)
from examples.digits.network import Denoiser
from examples.digits.recognition import recognised

pytestmark = pytest.mark.slow

SCHEDULE = vp_schedule(40)
EXACT = [method for method in METHODS if method.has_exact_inverse]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small layers gain nothing from a second thread; on a busy machine the two wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits() -> Digits:
    return one_per_class(load_split().held_out)


@pytest.fixture(scope="module")
def networks() -> dict[torch.dtype, Denoiser]:
    return {dtype: load_denoiser(dtype=dtype) for dtype in (torch.float64, torch.float32)}


@pytest.fixture(scope="module")
def edits(digits: Digits, networks: dict[torch.dtype, Denoiser]) -> list[Edit]:
    return [edit(method, networks[torch.float32], digits, targets_of(digits), SCHEDULE) for method in EDITORS]


def test_digits_take_the_new_class_and_keep_themselves(edits: list[Edit], digits: Digits) -> None:
    assert (targets_of(digits) != digits.labels).all()
    for done in edits:
        assert (recognised(done.images, targets_of(digits)) > 0.5).mean() >= 0.8
        if done.method is DDIM:
            assert done.error.max() > 0.05
        else:
            assert not done.error.any()


@pytest.mark.parametrize("method", EXACT, ids=lambda method: method.name)
def test_exact_round_trips_lose_nothing(method: object, digits: Digits, networks: dict[torch.dtype, Denoiser]) -> None:
    schedule = vp_schedule(8)
    for from_noise in (True, False):
        kept = {"dtype": torch.float32, "from_noise": from_noise}
        assert round_trip(method, networks, digits, schedule, exact=True, **kept) == 0.0
        assert round_trip(method, networks, digits, schedule, exact=False, **kept) > 0.0


def test_a_state_out_of_range_is_shown_as_lost(digits: Digits, networks: dict[torch.dtype, Denoiser]) -> None:
    half = next(method for method in METHODS if method.options == {"gamma": 0.5})
    found = round_trip(half, networks, digits, vp_schedule(50), dtype=torch.float32, from_noise=False, exact=True)
    assert found == float("inf")


def test_tables_and_picture(
    edits: list[Edit], digits: Digits, networks: dict[torch.dtype, Denoiser], tmp_path: Path
) -> None:
    assert edit_table(edits, digits, SCHEDULE).row_count == len(EDITORS)
    two = Digits(digits.images[:2], digits.labels[:2])
    assert round_trip_table(networks, two, vp_schedule(2), from_noise=False).row_count == len(METHODS)
    pytest.importorskip("matplotlib", reason="the picture is drawn with matplotlib, an extra of this package")
    save_edits(edits, digits, tmp_path / "edit.png")
    assert (tmp_path / "edit.png").read_bytes().startswith(b"\x89PNG")
