"""BDIA-DDIM as a diffusers scheduler: against its equations, against DDIM, both ways, and in a pipeline."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="needs the extra [diffusers]")

from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)

from bicm_diffusion import (
    Schedule,
    bdia_invert,
    bdia_sample,
    edict_invert,
    edict_sample,
    obelm_invert,
    obelm_sample,
)
from bicm_diffusion.adapters.diffusers import BDIADDIMScheduler
from tests.support.diffusers_cases import network


def model(x: Tensor, t: Any) -> Tensor:
    return network(x, int(t) // 100)


def run(scheduler: Any, x: Tensor) -> Tensor:
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x).prev_sample
    return x


def start(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.5])
def test_equals_the_library_s_sampler(gamma: float) -> None:
    scheduler = BDIADDIMScheduler(gamma=gamma, exact=False)
    scheduler.set_timesteps(10)
    times = [0, *reversed(scheduler.timesteps.tolist())]
    squares = [1.0, *(scheduler.alphas_cumprod[t].item() for t in times[1:])]
    schedule = Schedule(
        tuple(float(t) for t in times), tuple(a**0.5 for a in squares), tuple((1 - a) ** 0.5 for a in squares)
    )
    expected = bdia_sample(lambda z, t: model(z, t[0]), start(), schedule, gamma=gamma, exact=False)
    z = run(scheduler, start())
    torch.testing.assert_close(z, expected.z, rtol=0, atol=1e-11)
    torch.testing.assert_close(scheduler.last_sample, expected.previous, rtol=0, atol=1e-11)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_gamma_zero_is_ddim(prediction: str) -> None:
    config = {"prediction_type": prediction}
    ours, theirs = BDIADDIMScheduler(gamma=0.0, **config), DDIMScheduler(clip_sample=False, **config)
    for s in (ours, theirs):
        s.set_timesteps(8)
    x = start()
    for t in theirs.timesteps:
        output = model(x, t)
        mine, expected = ours.step(output, t, x), theirs.step(output, t, x)
        torch.testing.assert_close(mine.prev_sample, expected.prev_sample, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mine.pred_original_sample, expected.pred_original_sample, rtol=1e-5, atol=1e-4)
        x = mine.prev_sample


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("gamma", "tolerance"), [(1.0, 1e-10), (0.96, 1e-9)])
def test_a_trajectory_is_retraced_from_its_pair(prediction: str, gamma: float, tolerance: float) -> None:
    scheduler = BDIADDIMScheduler(gamma=gamma, prediction_type=prediction, exact=False)
    x = start()
    scheduler.set_timesteps(20)
    z = run(scheduler, x)
    # The pair in the other order: retracing starts from the inner state.
    inner = scheduler.last_sample
    scheduler.set_timesteps(20, inverse=True, last_sample=z)
    assert len(scheduler.timesteps) == 19
    assert (run(scheduler, inner) - x).abs().max() < tolerance


def test_an_image_is_inverted_and_reconstructed() -> None:
    scheduler, image = BDIADDIMScheduler(exact=False), 0.3 * start()
    scheduler.set_timesteps(20, inverse=True)
    assert scheduler.timesteps.tolist()[:3] == [0, 0, 50]
    latent, inner = run(scheduler, image), None
    inner = scheduler.last_sample
    scheduler.set_timesteps(20, last_sample=latent)
    again = run(scheduler, inner)
    assert (again - image).abs().max() < 1e-9 < (latent - image).abs().max()


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("gamma", [1.0, 0.96, 0.5])
def test_integers_retrace_a_trajectory_to_the_bit(prediction: str, gamma: float) -> None:
    exact, rounding = (BDIADDIMScheduler(gamma=gamma, prediction_type=prediction, exact=e) for e in (True, False))
    x = start(torch.float32).mul(256).round() / 256  # on the grid
    for scheduler in (exact, rounding):
        scheduler.set_timesteps(20)
    z = run(exact, x)
    torch.testing.assert_close(z, run(rounding, x), rtol=0, atol=1e-4 * z.abs().max().item())
    inner = exact.turn_round()
    assert torch.equal(exact.turn_round(), inner)  # asking again changes nothing
    exact.set_timesteps(20)
    assert len(exact.timesteps) == 19 and torch.equal(run(exact, inner), x)
    # And once more the first way.
    inner = exact.turn_round()
    exact.set_timesteps(20)
    assert torch.equal(run(exact, inner), z)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deep", "pickled"])
@pytest.mark.parametrize("taken", [0, 1, 3])
@pytest.mark.parametrize("exact", [True, False])
def test_a_copy_goes_on_like_the_scheduler(exact: bool, taken: int, copied: Any) -> None:
    scheduler, x = BDIADDIMScheduler(gamma=0.9, exact=exact), start(torch.float32)
    scheduler.set_timesteps(6)
    for t in scheduler.timesteps[:taken]:
        x = scheduler.step(model(x, t), t, x).prev_sample
    other, y = copied((scheduler, x))
    alone, z = copied(scheduler), x.clone()  # which the scheduler has not seen
    for t in scheduler.timesteps[taken:]:
        x, y, z = (s.step(model(q, t), t, q).prev_sample for s, q in ((scheduler, x), (other, y), (alone, z)))
        assert torch.equal(x, y) and torch.equal(x, z)
    other.timesteps[0] += 1
    with pytest.raises(ValueError, match="timesteps: expected what set_timesteps made"):
        other.step(y, 0, y)


def test_turning_round_with_floats_is_the_pair_s_retracing() -> None:
    scheduler, other = (BDIADDIMScheduler(gamma=0.9, exact=False) for _ in range(2))
    for s in (scheduler, other):
        s.set_timesteps(8)
    z, _ = run(scheduler, start()), run(other, start())
    inner = scheduler.turn_round()
    scheduler.set_timesteps(8)
    other.set_timesteps(8, inverse=True, last_sample=z)
    assert torch.equal(run(scheduler, inner), run(other, inner))


def test_functions_and_schedulers_are_exact_by_default() -> None:
    functions = (bdia_sample, bdia_invert, edict_sample, edict_invert, obelm_sample, obelm_invert)
    for function in (*functions, BDIADDIMScheduler.__init__):
        assert inspect.signature(function).parameters["exact"].default is True
    scheduler, x = BDIADDIMScheduler(), start(torch.float32)
    scheduler.set_timesteps(6)
    z = run(scheduler, x)
    scheduler.turn_round()
    inner = scheduler.turn_round()
    assert inner is not None
    scheduler.set_timesteps(6)
    run(scheduler, inner)
    last = scheduler.turn_round()
    assert last is not None
    scheduler.set_timesteps(6)
    assert torch.equal(run(scheduler, last), z)


def test_what_integers_cannot_follow_is_refused() -> None:
    scheduler, x = BDIADDIMScheduler(exact=True), start(torch.float32)
    scheduler.set_timesteps(4)
    first, second = scheduler.timesteps[:2]
    y = scheduler.step(model(x, first), first, x).prev_sample
    with pytest.raises(ValueError, match="turn_round: expected the end of a loop, 3 steps are left"):
        scheduler.turn_round()
    with pytest.raises(ValueError, match="sample: with exact=True, expected the state that the last step"):
        scheduler.step(y, second, y + 0.5)
    with pytest.raises(ValueError, match="gamma: with exact=True, expected 0 or at least 1/1024"):
        BDIADDIMScheduler(gamma=1e-4)
    scheduler.set_timesteps(4)
    run(scheduler, 1e9 * x)
    with pytest.raises(OverflowError, match="sample 0 left the range of its integers"):
        scheduler.turn_round()
    scheduler.set_timesteps(4)
    run(scheduler, x)
    inner = scheduler.turn_round()
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="sample: with exact=True"):
        run(scheduler, inner + 1.0)


def test_a_loop_may_start_half_way() -> None:
    ends = []
    for announced in (True, False):
        scheduler = BDIADDIMScheduler()
        scheduler.set_timesteps(10)
        if announced:
            scheduler.set_begin_index(4)
        z = start()
        for t in scheduler.timesteps[4:]:
            z = scheduler.step(model(z, t), t, z).prev_sample
        ends.append(z)
    assert torch.equal(*ends)


def test_configuration_is_saved_and_taken_from_ddim_s(tmp_path: Path) -> None:
    BDIADDIMScheduler(gamma=0.9, beta_schedule="scaled_linear").save_config(tmp_path)
    again = BDIADDIMScheduler.from_pretrained(tmp_path)
    assert again.config.gamma == 0.9 and again.config.beta_schedule == "scaled_linear"
    theirs = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", set_alpha_to_one=False, prediction_type="v_prediction", clip_sample=False
    )
    ours = BDIADDIMScheduler.from_config(theirs.config, gamma=0.5)
    assert ours.config.gamma == 0.5 and ours.config.prediction_type == "v_prediction"
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    assert ours.final_alpha_cumprod == theirs.final_alpha_cumprod


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_in_a_pipeline(gamma: float) -> None:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = UNet2DModel(sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8, **blocks)
    pipeline = DDIMPipeline(unet, DDIMScheduler(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for scheduler in (pipeline.scheduler, BDIADDIMScheduler.from_config(pipeline.scheduler.config, gamma=gamma)):
        pipeline.scheduler = scheduler
        generator = torch.Generator().manual_seed(1)
        run = pipeline(batch_size=1, num_inference_steps=4, generator=generator, output_type="np")
        images.append(torch.from_numpy(run.images))
    assert images[1].isfinite().all()
    assert torch.allclose(*images, atol=1e-4) == (gamma == 0.0)


def test_what_is_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match="gamma: expected a value in"):
        BDIADDIMScheduler(gamma=1.5)
    with pytest.raises(ValueError, match="prediction_type: expected one of"):
        BDIADDIMScheduler(prediction_type="flow")
    scheduler, x = BDIADDIMScheduler(gamma=0.0), start()
    with pytest.raises(ValueError, match="inverse: expected gamma > 0"):
        scheduler.set_timesteps(4, inverse=True)
    with pytest.raises(ValueError, match="timesteps: expected a call of set_timesteps"):
        BDIADDIMScheduler().step(x, 0, x)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="eta: expected 0"):
        scheduler.step(x, 750, x, eta=1.0)
    with pytest.raises(ValueError, match="timestep: expected one of"):
        scheduler.step(x, 749, x)


@pytest.mark.parametrize(
    ("config", "kwargs", "named"),
    [
        ({"clip_sample": True}, {}, "clip_sample"),
        ({"clip_sample": False, "thresholding": True}, {}, "thresholding"),
        ({"clip_sample": True, "thresholding": True}, {"use_karras_sigmas": True}, "clip_sample, thresholding, use_k"),
    ],
)
def test_options_that_no_step_heeds_are_named_once(
    config: dict[str, Any], kwargs: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scheduler = BDIADDIMScheduler.from_config(DDIMScheduler(**config).config, **kwargs)
    (told,) = [one for one in caught if "ignores" in str(one.message)]
    assert f"BDIADDIMScheduler ignores {named}" in str(told.message) and told.filename == __file__
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="BDIADDIMScheduler ignores")
        BDIADDIMScheduler.from_config(scheduler.config)
        BDIADDIMScheduler.from_config(DDIMScheduler(clip_sample=False).config)
        scheduler.save_config(tmp_path)
        BDIADDIMScheduler.from_pretrained(tmp_path)


def test_a_scheduler_is_no_configuration() -> None:
    with pytest.raises(
        TypeError, match=r"config: expected a scheduler's configuration, got a DDIMSch.*; pass its .config"
    ):
        BDIADDIMScheduler.from_config(DDIMScheduler())


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (DDIMScheduler(rescale_betas_zero_snr=True), "rescale_betas_zero_snr: expected False, got True"),
        (FlowMatchEulerDiscreteScheduler(), "config: expected one with a beta_schedule, got one with num_train"),
        (EDMEulerScheduler(), "config: expected one with a beta_schedule, got one with sigma_min"),
    ],
)
def test_configurations_of_other_levels_are_refused(theirs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BDIADDIMScheduler.from_config(theirs.config)
