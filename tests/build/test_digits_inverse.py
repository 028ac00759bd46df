"""Inverse problems of digits: the command runs, and solvers do on few images what they are for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="the digits come with scikit-learn, an extra of this package")
pytest.importorskip("safetensors", reason="the weights are read with safetensors, an extra of this package")

from click.testing import CliRunner

from examples.digits import classifiers
from examples.digits.__main__ import main
from examples.digits.consistency_objective import load_network
from examples.digits.denoising import load_denoiser
from examples.digits.inverse import SOLVERS, Models, Problem, Size, outcome, problems, with_peak
from examples.digits.inverse_report import digits


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small layers gain nothing from a second thread; on a busy machine the two wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models() -> Models:
    return Models(load_denoiser(), load_network())


@pytest.fixture(scope="module")
def asked() -> list[Problem]:
    return problems(digits(10))


@pytest.mark.slow
def test_the_command_draws_a_picture_and_prints_every_table(tmp_path: Path) -> None:
    picture = tmp_path / "inverse.png"
    done = CliRunner().invoke(main, ["inverse", "--quick", "--output", str(picture)], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert picture.stat().st_size > 10_000
    for word in ("down-sampling", "inpainting", "a class", "ablations", "CM inversion, τ = 0.3", "posterior mean"):
        assert word in done.output
    assert all(done.output.count(solver.name) >= 3 for solver in SOLVERS)


@pytest.mark.slow
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: solver.name)
def test_solvers_fit_what_was_measured(solver: object, models: Models, asked: list[Problem]) -> None:
    """Twenty steps and ten images; the residual of an unguided sample is of the images' size."""
    found = [outcome(solver, models, problem, Size(10, 20, 5), 0) for problem in asked]  # type: ignore[arg-type]
    for result in found[:2]:
        assert result.residual < 0.2 and result.error < 0.2 and math.isnan(result.seen)
    assert found[2].seen >= 0.9 and found[2].judged >= 0.5 and math.isnan(found[2].residual)
    assert all(result.frechet > 0 and result.seconds > 0 for result in found)


def test_measured_digits_are_distinct_and_begin_with_one_of_every_class() -> None:
    ten, all_of_them = digits(10), digits(297)
    assert ten.labels.tolist() == list(range(10)) and len(all_of_them.images) == 297
    assert torch.equal(all_of_them.images[:10], ten.images)
    assert len({image.numpy().tobytes() for image in all_of_them.images}) == 297


def test_the_judge_is_another_network_than_the_guide() -> None:
    guide, judge = classifiers.guide(), classifiers.judge()
    assert [type(layer) for layer in guide] != [type(layer) for layer in judge]  # type: ignore[attr-defined]
    images = digits(50).images
    assert not torch.allclose(guide(images), judge(images), atol=0.1)


def test_the_peak_counts_what_is_given_back() -> None:
    def much() -> torch.Tensor:
        return torch.ones(64, 2**18).sum(0)[:1]

    result, peak = with_peak(much)
    assert result.item() == 64.0
    assert math.isnan(peak) or 50 < peak < 200
