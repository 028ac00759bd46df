"""Accelerated schedulers and BDIA-DDIM in Stable Diffusion's pipelines, with small random networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="needs the extra [diffusers]")
pytest.importorskip("transformers", reason="Stable Diffusion's pipelines need it")

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel

from bicm_diffusion.adapters.diffusers import BDIADDIMScheduler, accelerate_scheduler
from bicm_diffusion.adapters.diffusers.scheduler import Accelerated

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
WIDTH = 8


@pytest.fixture(scope="module")
def components() -> dict[str, Any]:
    """Stable Diffusion's parts, the smallest that there are; no tokenizer, for prompts come as embeddings."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(WIDTH, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
    )
    vae = AutoencoderKL(
        block_out_channels=(WIDTH, 16),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        norm_num_groups=4,
    )
    text = CLIPTextConfig(
        vocab_size=9,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    parts = {"unet": unet, "vae": vae, "text_encoder": CLIPTextModel(text)}
    missing = dict.fromkeys(("tokenizer", "safety_checker", "feature_extractor"))
    return {**parts, **missing, "requires_safety_checker": False}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def run(components: dict[str, Any], scheduler: Any, image: bool = False, **arguments: Any) -> Tensor:
    """Latents of two prompts, with guidance; with `image`, from two images by img2img."""
    cls = StableDiffusionImg2ImgPipeline if image else StableDiffusionPipeline
    pipeline = cls(scheduler=scheduler, **components)
    pipeline.set_progress_bar_config(disable=True)
    if image:
        arguments["image"] = torch.rand(2, 3, 16, 16, generator=generator())
        arguments["strength"] = 0.6
    else:
        arguments |= {"height": 16, "width": 16}
    prompts = torch.randn(2, 5, WIDTH, generator=generator())
    defaults = {"num_inference_steps": 6, "generator": generator(), "output_type": "latent"}
    embeddings = {"prompt_embeds": prompts, "negative_prompt_embeds": torch.zeros_like(prompts)}
    return pipeline(**embeddings, **{**defaults, **arguments}).images


SCHEDULERS = [
    (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}, {}),
    (DDIMScheduler, {"clip_sample": False, "timestep_spacing": "trailing"}, {"eta": 0.5}),
    (EulerDiscreteScheduler, {}, {}),
    (EulerDiscreteScheduler, {"use_karras_sigmas": True, "prediction_type": "v_prediction"}, {}),
    (DPMSolverMultistepScheduler, {}, {}),
    (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}, {}),
    (LCMScheduler, {}, {"guidance_scale": 1.0}),
]
NAMES = ["DDIM", "DDIM, eta", "Euler", "Euler, Karras, v", "DPM++", "SDE-DPM++, Karras", "LCM"]


@pytest.mark.parametrize("image", [False, True], ids=["from noise", "from images"])
@pytest.mark.parametrize(("cls", "config", "arguments"), SCHEDULERS, ids=NAMES)
def test_accelerated_schedulers_make_the_original_s_images(
    components: dict[str, Any], cls: type[Any], config: dict[str, Any], arguments: dict[str, Any], image: bool
) -> None:
    config = {**STABLE_DIFFUSION, **config}
    theirs = run(components, cls(**config), image, **arguments)
    scheduler = accelerate_scheduler(cls(**config))
    for _ in range(2):  # a pipeline is called again with the scheduler that it left behind
        ours = run(components, scheduler, image, **arguments)
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-4 * theirs.abs().max().item())


def test_generators_give_every_image_its_own_noise(components: dict[str, Any]) -> None:
    config = {**STABLE_DIFFUSION, "algorithm_type": "sde-dpmsolver++"}
    ends = []
    for scheduler in (
        DPMSolverMultistepScheduler(**config),
        accelerate_scheduler(DPMSolverMultistepScheduler(**config)),
    ):
        generators = [torch.Generator().manual_seed(7) for _ in range(2)]
        ends.append(run(components, scheduler, generator=generators))
    torch.testing.assert_close(ends[1], ends[0], rtol=0.0, atol=1e-4 * ends[0].abs().max().item())


def test_a_saved_pipeline_loads_with_the_original_scheduler(components: dict[str, Any], tmp_path: Path) -> None:
    scheduler = accelerate_scheduler(EulerDiscreteScheduler(**STABLE_DIFFUSION))
    StableDiffusionPipeline(scheduler=scheduler, **components).save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded.scheduler) is EulerDiscreteScheduler and not isinstance(loaded.scheduler, Accelerated)


def load(directory: Path) -> StableDiffusionPipeline:
    missing = dict.fromkeys(("tokenizer", "safety_checker", "feature_extractor"))
    return StableDiffusionPipeline.from_pretrained(directory, local_files_only=True, **missing)


def test_a_saved_pipeline_loads_with_bdia(components: dict[str, Any], tmp_path: Path) -> None:
    scheduler = BDIADDIMScheduler(gamma=0.75, exact=True, **STABLE_DIFFUSION)
    StableDiffusionPipeline(scheduler=scheduler, **components).save_pretrained(tmp_path)
    loaded = load(tmp_path).scheduler
    assert type(loaded) is BDIADDIMScheduler and loaded.config.gamma == 0.75 and loaded.config.exact


@pytest.mark.parametrize("image", [False, True], ids=["from noise", "from images"])
def test_bdia_with_gamma_zero_is_ddim(components: dict[str, Any], image: bool) -> None:
    theirs = run(components, DDIMScheduler(clip_sample=False, **STABLE_DIFFUSION), image)
    ours = run(components, BDIADDIMScheduler(gamma=0.0, **STABLE_DIFFUSION), image)
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-4 * theirs.abs().max().item())
    other = run(components, BDIADDIMScheduler(gamma=1.0, **STABLE_DIFFUSION), image)
    assert other.isfinite().all() and (other - theirs).abs().max() > 1e-3


@pytest.mark.parametrize("gamma", [1.0, 0.75])
@pytest.mark.parametrize("exact", [True, False])
def test_latents_are_inverted_and_retraced_by_pipelines(components: dict[str, Any], gamma: float, exact: bool) -> None:
    scheduler = BDIADDIMScheduler(gamma=gamma, exact=exact, **STABLE_DIFFUSION)
    image = torch.randint(-255, 256, (2, 4, 8, 8), generator=generator()) / 256
    assert scheduler.turn_round() is None
    noise = run(components, scheduler, latents=image)
    again = run(components, scheduler, latents=scheduler.turn_round())
    assert (noise - image).abs().max() > 0.1
    if exact:
        assert torch.equal(again, image)
    else:
        assert 0.0 < (again - image).abs().max() < 1e-3
    # From noise to an image and back.
    start = torch.randint(-512, 513, image.shape, generator=generator()) / 256
    sample = run(components, scheduler, latents=start)
    back = run(components, scheduler, latents=scheduler.turn_round())
    assert sample.isfinite().all() and torch.equal(back, start) == exact
