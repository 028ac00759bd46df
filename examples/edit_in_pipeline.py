"""Edit an image in a Stable Diffusion pipeline: invert it under one prompt, sample it under another (BDIA Alg. 2).

BDIA-DDIM keeps integer states, so that the same prompt in both directions returns the latents to the bit, and every
change in an edit comes from the prompt.

    python examples/edit_in_pipeline.py
    python examples/edit_in_pipeline.py --pipeline path/to/pipeline --image cat.png --source "a cat" --target "a dog"

Needs the extra [diffusers], and transformers. Without --pipeline, a small random pipeline shows the round trip.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from bicm_diffusion.adapters.diffusers import BDIADDIMScheduler


def edit(
    pipeline: Any, latents: Tensor, source: dict[str, Any], target: dict[str, Any], *, steps: int = 40, **options: Any
) -> Tensor:
    """Edited latents (B, …): inverted with the keyword arguments `source`, sampled with `target`."""
    pipeline.scheduler = BDIADDIMScheduler.from_config(pipeline.scheduler.config, gamma=0.96, exact=True)
    options = {"num_inference_steps": steps, "output_type": "latent", **options}
    pipeline.scheduler.turn_round()  # the next call goes from data to noise
    pipeline(latents=latents, **source, **options)
    inner = pipeline.scheduler.turn_round(edit=True)  # the next one goes back from here, with other conditions
    return pipeline(latents=inner, **target, **options).images


def random_pipeline() -> StableDiffusionPipeline:
    """Stable Diffusion's parts, small and random; prompts come as embeddings (B, 5, 8)."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        norm_num_groups=4,
    )
    text = CLIPTextConfig(
        vocab_size=9,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    missing = dict.fromkeys(("tokenizer", "safety_checker", "feature_extractor"))
    pipeline = StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=CLIPTextModel(text),
        scheduler=BDIADDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1),
        requires_safety_checker=False,
        **missing,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def round_trip(steps: int = 10) -> tuple[float, float]:
    """The change of the latents under the same prompt and under another, in the random pipeline."""
    pipeline = random_pipeline()
    latents = torch.randint(-255, 256, (1, 4, 8, 8)) / 256
    prompts = [
        {"prompt_embeds": torch.randn(1, 5, 8), "negative_prompt_embeds": torch.zeros(1, 5, 8)} for _ in range(2)
    ]
    size = {"height": 16, "width": 16}
    ends = [edit(pipeline, latents, prompts[0], prompt, steps=steps, **size) for prompt in prompts]
    same, other = ((end - latents).abs().max().item() for end in ends)
    return same, other


def edit_file(pipeline: str, image: Path, source: str, target: str, output: Path, steps: int) -> None:
    """Edit an image file with a pipeline loaded from a directory."""
    from PIL import Image

    loaded = StableDiffusionPipeline.from_pretrained(pipeline)
    processor = VaeImageProcessor()
    with torch.no_grad():
        pixels = processor.preprocess(Image.open(image).convert("RGB"))
        latents = loaded.vae.encode(pixels).latent_dist.mean * loaded.vae.config.scaling_factor
        # Without guidance in the inversion, as in the paper; 2 or 3 in the sampling strengthens the edit.
        edited = edit(loaded, latents, {"prompt": source}, {"prompt": target}, steps=steps, guidance_scale=1.0)
        decoded = loaded.vae.decode(edited / loaded.vae.config.scaling_factor).sample
    processor.postprocess(decoded)[0].save(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", help="directory of a saved pipeline")
    parser.add_argument("--image", type=Path)
    parser.add_argument("--source", default="", help="prompt that describes the image")
    parser.add_argument("--target", default="", help="prompt that describes the result")
    parser.add_argument("--output", type=Path, default=Path("build/edited.png"))
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()
    if given.pipeline is None:
        same, other = round_trip()
        print(f"the same prompt both ways moves the latents by {same}, another prompt by {other:.2f}")
        return
    if given.image is None:
        parser.error("--pipeline needs --image")
    given.output.parent.mkdir(parents=True, exist_ok=True)
    edit_file(given.pipeline, given.image, given.source, given.target, given.output, given.steps)


if __name__ == "__main__":
    main()
