"""What the code blocks of README and docs/ use without defining it: the reader's network, image and pipeline."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

Names = dict[str, Any]


def predictor(z: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """A noise predictor."""
    return 0.3 * torch.tanh(z)


def image(*shape: int) -> torch.Tensor:
    """Numbers that 8-bit images have, which the grid of exact states holds."""
    return torch.randint(0, 256, shape) / 128 - 1


class Prompted:
    """A small Stable Diffusion pipeline that takes prompts without a tokenizer."""

    def __init__(self, network: Any, scheduler: Any) -> None:
        self.network, self.scheduler = network, scheduler

    @property
    def unet(self) -> Any:
        return self.network.unet

    def encode_prompt(self, prompt: str, **options: Any) -> Any:
        """As the pipeline's, of a tokenizer's part: (1, L, C) for one prompt unless more images are asked for."""
        return self.network.encode_prompt(None, **options, prompt_embeds=torch.full((1, 5, 8), 0.5))

    def __call__(self, prompt: str | list[str], **options: Any) -> Any:
        self.network.scheduler = self.scheduler
        count = len(prompt) if isinstance(prompt, list) else 1
        embeddings = torch.full((count, 5, 8), 0.5)
        known = {"height": 16, "width": 16, "num_inference_steps": 4}
        prompts = {"prompt_embeds": embeddings, "negative_prompt_embeds": 0 * embeddings}
        return self.network(**prompts, **{**known, **options})


class Flow:
    """A loop as flow-matching pipelines have it."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def __call__(self, prompt: str, *, latents: torch.Tensor, output_type: str) -> Any:
        self.scheduler.set_timesteps(6)
        for t in self.scheduler.timesteps:
            latents = self.scheduler.step(0.3 * torch.tanh(latents), t, latents).prev_sample
        return SimpleNamespace(images=latents)


def stable_diffusion() -> Names:
    from diffusers import DDIMScheduler

    from examples.edit_in_pipeline import random_pipeline

    network = random_pipeline()
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    pipeline = Prompted(network, DDIMScheduler(clip_sample=False, **config))
    return {"pipeline": pipeline, "latents": image(1, 4, 8, 8), "prompt": "a cat"}


def unconditional() -> Names:
    """A pipeline whose network has the same bits for a sample in any batch."""
    import diffusers
    from diffusers.models.unets.unet_2d import UNet2DOutput

    class Pointwise(diffusers.UNet2DModel):  # type: ignore[misc]
        def forward(self, sample: torch.Tensor, timestep: object, **_: object) -> UNet2DOutput:
            return UNet2DOutput(sample=0.3 * sample.clamp(-1, 1))

    layers = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    network = Pointwise(sample_size=8, block_out_channels=(32, 32), **layers)
    pipeline = diffusers.DDIMPipeline(network, diffusers.DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return {"pipeline": pipeline}


def loop() -> Names:
    return {"unet": lambda x, t: SimpleNamespace(sample=0.3 * torch.tanh(x)), "image": image(1, 4, 8, 8)}


def flow() -> Names:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return {"pipeline": Flow(FlowMatchEulerDiscreteScheduler(shift=3.0)), "latents": image(1, 4, 8, 8)}


def processes() -> Names:
    from bicm_diffusion import vp_schedule

    return {"model": predictor, "schedule": vp_schedule(4)}


def readme() -> Names:
    return unconditional()


#: By page, and in a page by a line of the block before which names are added.
GIVEN: dict[str, dict[str, Callable[[], Names]]] = {
    "README.md": {"": readme},
    "docs/start-pipelines.md": {"": stable_diffusion},
    "docs/adapters.md": {
        "": unconditional,
        "from_diffusers(pipeline.unet": stable_diffusion,
        "def loop(sample": loop,
        "import BDIAFlowMatchScheduler": flow,
        "def sample(shard)": processes,
    },
}

#: Numbers that a test makes smaller.
SMALLER = {"50_000": "100", "steps=50": "steps=5"}
