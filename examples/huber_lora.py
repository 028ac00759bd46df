"""Fine-tune a LoRA of a diffusers U-Net with an elementwise pseudo-Huber loss, from keyed draws.

The noise prediction is compared by mean(√(r² + c²) − c) over the elements of a sample, with c chosen per sample from
its time step. Time steps and noise are keyed by (seed, step, index of the image): the loss of an image does not depend
on its batch, and a run that is repeated draws the same numbers on any device.

    python examples/huber_lora.py --steps 20

Needs the extra [diffusers], and peft. The U-Net here is small and random; load your own with
`UNet2DConditionModel.from_pretrained`.
"""

from __future__ import annotations

import argparse

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor

import bicm_kernels as bk

SEED = 0
TIME_STEPS = 1  # a purpose of this program's seed, see `fold_in`


def keyed_integers(count: int, batch: int, *, seed: int, step: int, sample_id: Tensor) -> Tensor:
    """Integers in [0, count), (batch,) int64: uniform numbers in (0, 1], scaled and rounded up."""
    u = bk.uniform((batch, 1), seed=seed, step=step, sample_id=sample_id, dtype=torch.float64)
    return (u[:, 0] * count).ceil().long() - 1


def huber_constant(t: Tensor, count: int, least: float = 0.1) -> Tensor:
    """c per sample: 1 at t = 0, falling exponentially to `least` at the noisiest time step."""
    return least ** (t.double() / count)


def small_unet() -> UNet2DConditionModel:
    """A small random U-Net with cross-attention."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
    )


def huber_loss(
    unet: torch.nn.Module, x: Tensor, text: Tensor, ids: Tensor, scheduler: DDPMScheduler, *, step: int
) -> Tensor:
    """The mean loss of a batch of latents x (B, …), ids (B,) int64 their indices in the data set."""
    count = scheduler.config.num_train_timesteps
    key = {"step": step, "sample_id": ids}
    t = keyed_integers(count, len(x), seed=bk.fold_in(SEED, TIME_STEPS), **key)
    alpha_bar = scheduler.alphas_cumprod.double()[t]
    noisy = bk.add_noise(x, (1 - alpha_bar).sqrt(), scale=alpha_bar.sqrt(), seed=SEED, **key)
    noise = bk.normal(x.shape, seed=SEED, **key)  # the same numbers again, recomputed
    with torch.autocast(x.device.type, torch.bfloat16):
        prediction = unet(noisy, t, encoder_hidden_states=text).sample
    return bk.pseudo_huber(prediction, noise, c=huber_constant(t, count), kind="elementwise")


def train(steps: int, *, batch: int = 4) -> list[float]:
    """Train a LoRA on synthetic latents; returns the losses."""
    torch.manual_seed(SEED)
    unet, scheduler = small_unet(), DDPMScheduler()
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    latents, text = torch.randn(16, 4, 8, 8), torch.randn(16, 5, 8)
    losses = []
    for step in range(steps):
        ids = (torch.arange(batch) + step * batch) % len(latents)
        loss = huber_loss(unet, latents[ids], text[ids], ids, scheduler, step=step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    for step, loss in enumerate(train(parser.parse_args().steps)):
        print(f"step {step}: loss {loss:.4f}")


if __name__ == "__main__":
    main()
