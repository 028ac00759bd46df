"""The comparison of objectives on the digits: what it starts from, that it is whole, and that it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

for package in ("sklearn", "safetensors", "matplotlib"):
    pytest.importorskip(package, reason="an extra of this package")

from click.testing import CliRunner

from bicm_diffusion import vp_alpha_sigma, vp_time
from bicm_kernels import denoise, scale_input
from examples.digits.__main__ import main
from examples.digits.data import SIDE, load_split
from examples.digits.denoising import load_denoiser
from examples.digits.network import NO_LABEL
from examples.digits.objectives import METHODS, Setting, measure_coupling, run_method
from examples.digits.small_network import FromDenoiser, SmallNetwork


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small layers gain nothing from a second thread; on a busy machine the two wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_ect_starts_from_the_trained_denoiser() -> None:
    """D of "edm" is (z - sigma·eps)/alpha of the variance-preserving process, at every level."""
    t = torch.tensor([0.0, 0.1, 1.0, 20.0], dtype=torch.float64)
    x = torch.randn(4, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    network = load_denoiser(dtype=torch.float64)
    ours = denoise(x, FromDenoiser(network)(scale_input(x, t), t), t, parameterization="edm")
    alpha, sigma = (a[:, None, None, None] for a in vp_alpha_sigma(vp_time(t)))
    eps = network(alpha * x, vp_time(t), torch.full((4,), NO_LABEL))
    torch.testing.assert_close(ours, (alpha * x - sigma * eps) / alpha, rtol=1e-9, atol=1e-9)


def test_the_network_is_that_of_the_prototype_and_knows_both_levels() -> None:
    network = SmallNetwork()
    assert 450_000 < sum(p.numel() for p in network.parameters()) < 600_000
    torch.nn.init.normal_(network.last.weight)
    x, t = torch.randn(2, 1, SIDE, SIDE), torch.ones(2)
    assert not torch.equal(network(x, t), network(x, 2 * t)) and not torch.equal(network(x, t), network(x, t, t))


SMALL = Setting(steps=6, tuning_steps=2, coupling_steps=3, batch_size=16, width=16, s1=20)


def test_methods_differ_and_seeds_repeat() -> None:
    chosen = [METHODS[0], *(method for method in METHODS if method.kind in ("bct", "ot") or method.mu == 0.7)]
    frozen = SmallNetwork().eval()
    found = [run_method(method, 0, SMALL, frozen)[0] for method in chosen]
    assert len({result.frechet for result in found}) == len(chosen) == 6
    again = run_method(chosen[-1], 0, SMALL, frozen)[0]
    assert again.frechet == found[-1].frechet and again.velocity == found[-1].velocity
    assert len(found[0].curve) == 6 and [result.transport is None for result in found].count(True) == 1


def test_batch_ot_and_generated_samples_cost_less_transport() -> None:
    """R̃ here is that of an untrained denoiser, but c needs none: Σ(x - z)² over pairs that are matched, or not."""
    ict, ot = (next(method for method in METHODS if method.kind == kind) for kind in ("ict", "ot"))
    independent, paired = (measure_coupling(method, 0, SMALL, None)[0] for method in (ict, ot))
    x = load_split().train.images
    assert independent == pytest.approx(1 + x.square().mean().item(), rel=0.02) and paired < independent - 0.01


@pytest.mark.slow
def test_the_command_writes_a_table_and_pictures_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("examples.digits.objectives.METHODS", (*METHODS[:3], METHODS[8], METHODS[9], METHODS[13]))
    monkeypatch.setattr(
        "examples.digits.objectives_picture.METHODS", (*METHODS[:3], METHODS[8], METHODS[9], METHODS[13])
    )
    monkeypatch.setattr("examples.digits.objectives_picture.SHOWN", ("BCT", METHODS[8].name))
    words = [
        "objectives",
        "--output",
        str(tmp_path),
        "--seeds",
        "2",
        "--steps",
        "3",
        "--coupling-steps",
        "2",
        "--width",
        "8",
    ]
    first = CliRunner().invoke(main, words, catch_exceptions=False)
    assert first.exit_code == 0 and "| batch-OT |" in first.stdout and "real digits" in first.stdout
    for name in ("objectives.png", "two-diracs.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    runs = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*.json")}
    assert len(runs) == 12
    again = CliRunner().invoke(main, words, catch_exceptions=False)
    assert again.stdout == first.stdout and {path: path.stat().st_mtime_ns for path in runs} == runs
