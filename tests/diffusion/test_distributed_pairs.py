"""Pairs of noise and image: made once, by any batch, read one by one and at once, continued after a stop."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bicm_diffusion.distributed import PairDataset, sample_pairs, sample_shards
from bicm_diffusion.objectives import sign_loss
from bicm_diffusion.train import TrainingOptions, train
from bicm_kernels import normal

SHAPE = (1, 2, 2)
OPTIONS: dict[str, Any] = {"shape": SHAPE, "seed": 4, "latent_std": 2.0, "settings": {"steps": 3}, "progress": False}


def squares(noise: Tensor) -> Tensor:
    return noise.square()


def test_noise_is_that_of_the_key_whatever_the_batch(tmp_path: Path) -> None:
    expected = 2.0 * normal((7, *SHAPE), seed=4)
    for batch in (1, 3, 7):
        sample_pairs(squares, 7, tmp_path / str(batch), batch=batch, **OPTIONS)
        pairs = PairDataset(tmp_path / str(batch))
        noise, images = pairs.tensors()
        assert torch.equal(noise, expected) and torch.equal(images, expected.square())
        items = [pairs[k] for k in range(len(pairs))]
        assert torch.equal(torch.stack([noise for noise, _ in items]), noise)
        assert torch.equal(torch.stack([image for _, image in items]), images)


def test_a_stopped_run_goes_on_and_is_not_read_before_it_is_whole(tmp_path: Path) -> None:
    asked: list[int] = []

    def stopped(noise: Tensor) -> Tensor:
        asked.append(len(noise))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return squares(noise)

    with pytest.raises(KeyboardInterrupt):
        sample_pairs(stopped, 6, tmp_path, batch=2, **OPTIONS)
    with pytest.raises(ValueError, match="pair 2 of 6 has not been written"):
        PairDataset(tmp_path)[3]
    with pytest.raises(ValueError, match=r"'pair_seed': 4|settings"):
        sample_pairs(squares, 6, tmp_path, batch=2, **{**OPTIONS, "seed": 5})
    sample_pairs(stopped, 6, tmp_path, batch=2, **OPTIONS)
    assert asked == [2, 2, 2, 2]
    noise, images = PairDataset(tmp_path).tensors()
    assert torch.equal(images, noise.square())


@pytest.mark.parametrize("damage", ["short", "cut"])
def test_a_damaged_shard_is_named(damage: str, tmp_path: Path) -> None:
    sample_pairs(squares, 6, tmp_path, batch=2, **OPTIONS)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-5])
    else:
        save_file({"samples": torch.zeros(1, *SHAPE)}, shard)
    with pytest.raises(ValueError, match=f"{shard.name} cannot be read"):
        list(PairDataset(tmp_path))  # type: ignore[call-overload]


def test_what_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    for given, error, message in (
        ({"latent_std": torch.tensor([2.0])}, TypeError, "latent_std: expected a number"),
        ({"settings": {"pair_seed": 1}}, ValueError, "settings: expected other names than 'pair_seed'"),
    ):
        with pytest.raises(error, match=message):
            sample_pairs(squares, 2, tmp_path, batch=2, **{**OPTIONS, **given})
    with pytest.raises(ValueError, match=r"sample: expected images \(2, 1, 2, 2\), as its noise is, got \(2, 1, 2\)"):
        sample_pairs(lambda noise: noise[..., 0], 2, tmp_path, batch=2, **OPTIONS)
    with pytest.raises(TypeError, match=r"sample: expected a tensor \(2, …\), got a list"):
        sample_pairs(lambda noise: noise.tolist(), 2, tmp_path / "list", batch=2, **OPTIONS)
    for result in ([0.0, 1.0], torch.tensor(1.0)):
        with pytest.raises(TypeError, match=r"sample: expected a tensor \(2, …\), got a"):
            sample_shards(lambda shard, x=result: x, 2, tmp_path / "x", batch=2, settings={}, progress=False)  # type: ignore[misc]


def test_other_runs_and_indices_are_refused(tmp_path: Path) -> None:
    sample_shards(lambda shard: shard.sample_ids[:, None].float(), 3, tmp_path, batch=2, settings={}, progress=False)
    with pytest.raises(ValueError, match="expected pairs, as sample_pairs writes, got a run without"):
        PairDataset(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no run"):
        PairDataset(tmp_path / "none")
    sample_pairs(squares, 3, tmp_path / "pairs", batch=2, **OPTIONS)
    with pytest.raises(IndexError, match=r"index: expected one in \[0, 3\), got 3"):
        PairDataset(tmp_path / "pairs")[3]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_of_training_reads_them(workers: int, tmp_path: Path) -> None:
    """As items, in processes of a loader too, and after open files were left behind in a pickle."""
    sample_pairs(squares, 8, tmp_path, batch=3, **OPTIONS)
    pairs = PairDataset(tmp_path)
    assert torch.equal(pairs[5][1], pickle.loads(pickle.dumps(pairs))[5][1])

    def loss(network: torch.nn.Module, batch: Any, step: Any) -> Any:
        noise, image = batch
        assert torch.equal(image, noise.square())
        return sign_loss(network, image, **step.key, flow=0.0, reg=1.0, pairs=(noise, image))

    network = torch.nn.Conv2d(1, 1, 1)
    options = TrainingOptions(steps=4, batch_size=4)
    assert train(network, pairs, loss, options, workers=workers, device="cpu").step == 4
