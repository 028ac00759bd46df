"""Train a diffusers U-Net on 32×32 images with any of the objectives, on one GPU, several, or a CPU.

    python examples/cifar10.py --objective ict --data FOLDER
    torchrun --nproc_per_node 8 examples/cifar10.py --objective gc --mu 0.5 --batch-size 512 --data cifar10

FOLDER contains images, in nested folders or not; `cifar10` is torchvision's data set, if that is installed.
A killed run resumes when started again with the same arguments. Needs the extras [diffusers] and [diffusion].

The defaults are the papers' for CIFAR-10 where they suit a run of 400,000 steps; --steps, --width and --batch-size make
it smaller. ECT starts from a denoiser: train one with --objective denoising, then --start its checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from diffusers import UNet2DModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

import bicm_kernels as bk
from bicm_diffusion import LevelTable, bct_loss, draw_levels, edm_sample, karras_levels, karras_schedule, level_count
from bicm_diffusion.objectives import (
    cd_loss,
    denoising_loss,
    draw_denoising_levels,
    draw_ect_times,
    ect_loss,
    gc_loss,
    ict_loss,
    optimal_pairing,
)
from bicm_diffusion.train import Step, TrainingOptions, train

SIZE, T_MAX = 32, 80.0
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


class Images(Dataset[Any]):
    """Images in [-1, 1], (3, 32, 32), each mirrored with probability 1/2 by torch's generator, which the loop keys."""

    def __init__(self, data: str) -> None:
        if data == "cifar10":
            try:
                from torchvision.datasets import CIFAR10
            except ImportError as error:
                raise SystemExit("--data: cifar10 needs torchvision; without it, give a folder of images") from error
            self.images: Any = [image for image, _ in CIFAR10("build/cifar10", download=True)]
        else:
            self.images = sorted(path for path in Path(data).rglob("*") if path.suffix.lower() in SUFFIXES)
        if not len(self.images):
            raise ValueError(f"--data: expected images in {data}, found none")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        image = self.images[index]
        image = (Image.open(image) if isinstance(image, Path) else image).convert("RGB")
        if image.size != (SIZE, SIZE):
            image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
        return x.flip(2) if torch.rand(()) < 0.5 else x


class Network(nn.Module):
    """F(c_in(t)·x, t), and with u for bidirectional models: both levels are embedded, as ln(t)/4."""

    def __init__(self, width: int, dropout: float, *, two_times: bool) -> None:
        super().__init__()
        self.unet = UNet2DModel(
            sample_size=SIZE,
            block_out_channels=(width, 2 * width, 2 * width),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2,
            norm_num_groups=min(32, width),
            attention_head_dim=width,
            dropout=dropout,
            class_embed_type="timestep" if two_times else None,
        )

    def forward(self, scaled: Tensor, t: Tensor, u: Tensor | None = None) -> Tensor:
        # The U-Net expects times up to a thousand.
        other = None if u is None else 250 * u.log()
        return self.unet(scaled, 250 * t.log(), class_labels=other, return_dict=False)[0]


@dataclass(frozen=True)
class Objective:
    """loss(network, x, step) with the command's arguments; form: the parameterization that it trains."""

    loss: Callable[[nn.Module, Tensor, Step], Any]
    form: str


def objectives(arguments: argparse.Namespace, denoiser: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Objective]:
    """Every objective by its name."""

    def levels(x: Tensor, step: Step) -> Any:
        count = level_count(step.step, step.options.steps, s0=arguments.s0, s1=arguments.s1)
        return draw_levels(LevelTable(karras_levels(count, t_max=T_MAX)), len(x), **step.key)

    def denoising(network: nn.Module, x: Tensor, step: Step) -> Any:
        return denoising_loss(network, x, draw_denoising_levels(len(x), **step.key), **step.key)

    def batch_ot(network: nn.Module, x: Tensor, step: Step) -> Any:
        drawn = levels(x, step)
        return ict_loss(network, x, drawn, **cm, **{**step.key, "sample_id": optimal_pairing(x, **step.key)})

    def ect(network: nn.Module, x: Tensor, step: Step) -> Any:
        stage = step.step * arguments.stages // step.options.steps
        times = draw_ect_times(len(x), stage=stage, q=arguments.q, **step.key)
        return ect_loss(network, x, times, mu=arguments.mu if arguments.generate else 0.0, **step.key)

    def gc(network: nn.Module, x: Tensor, step: Step) -> Any:
        predictor = step.average if arguments.predictor == "ema" else None
        return gc_loss(network, x, levels(x, step), mu=arguments.mu, predictor=predictor, **cm, **step.key)

    cm = {"parameterization": "cm"}
    return {
        "denoising": Objective(denoising, "edm"),
        "ict": Objective(lambda network, x, step: ict_loss(network, x, levels(x, step), **cm, **step.key), "cm"),
        "cd": Objective(
            lambda network, x, step: cd_loss(network, x, levels(x, step), denoiser=denoiser, **cm, **step.key), "cm"
        ),
        "bct": Objective(lambda network, x, step: bct_loss(network, x, levels(x, step), **step.key), "bcm"),
        "gc": Objective(gc, "cm"),
        "batch-ot": Objective(batch_ot, "cm"),
        "ect": Objective(ect, "edm"),
    }


def predicted(network: nn.Module, x: Tensor, t: Tensor, form: str) -> Tensor:
    """f(x, t), or the denoiser of "edm", from F."""
    t = t.expand(len(x)).float().contiguous()
    times = (t, torch.full_like(t, 0.002)) if form == "bcm" else (t,)
    return bk.denoise(x, network(bk.scale_input(x, t), *times), t, parameterization=form)


@torch.no_grad()
def samples(network: nn.Module, objective: str, form: str, count: int, device: torch.device) -> Tensor:
    """New images: one evaluation of a consistency model, or 18 steps with a denoiser."""
    z = T_MAX * bk.normal((count, 3, SIZE, SIZE), seed=1, device=device)
    if objective != "denoising":
        return predicted(network, z, torch.tensor(T_MAX, device=device), form)
    return edm_sample(lambda x, t: predicted(network, x, t, form), z, karras_schedule(18), prediction="x0")


def save_picture(images: Tensor, path: Path) -> None:
    """Write images (N, 3, H, W) in [-1, 1] as a grid, eight per row."""
    rows = [torch.cat(list(row), dim=2) for row in images.split(8) if len(row) == min(8, len(images))]
    pixels = ((torch.cat(rows, dim=1).clamp(-1, 1) + 1) * 127.5).round().byte()
    Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(path)


def averaged(path: Path) -> dict[str, Tensor]:
    """The averaged weights in a checkpoint."""
    return {name[8:]: x for name, x in load_file(path).items() if name.startswith("average.")}


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["denoising", "ict", "cd", "bct", "gc", "batch-ot", "ect"]
    parser.add_argument("--objective", choices=names, default="ict")
    parser.add_argument("--data", required=True, help="a folder of images, or cifar10")
    parser.add_argument("--output", type=Path, default=Path("build/cifar10-run"), help="folder to write to")
    parser.add_argument("--steps", type=int, default=400_000)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--micro-batch", type=int, help="samples that a process evaluates together")
    parser.add_argument("--width", type=int, default=128, help="channels at 32×32; twice as many below")
    parser.add_argument("--dropout", type=float, default=0.3, help="0 for GC")
    parser.add_argument("--optimizer", choices=["radam", "adamw", "lion"], default="radam", help="GC: lion")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--ema", type=float, default=0.99993)
    parser.add_argument("--bfloat16", action="store_true", help="evaluate under autocast")
    parser.add_argument("--compile", action="store_true", help="compile the network")
    parser.add_argument("--parallel", choices=["ddp", "fsdp2"], default="ddp")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--s0", type=int, default=10, help="levels at first")
    parser.add_argument("--s1", type=int, default=1280, help="levels at last")
    parser.add_argument("--mu", type=float, default=0.5, help="fraction of generated samples; ECT: 0.3 with --generate")
    parser.add_argument("--generate", action="store_true", help="ECT with generated samples")
    parser.add_argument("--predictor", choices=["ema", "online"], default="ema", help="who generates them in GC")
    parser.add_argument("--q", type=float, default=2.0, help="ratio by which ECT's times converge per stage")
    parser.add_argument("--stages", type=int, default=8, help="ECT's stages in a run")
    parser.add_argument("--start", type=Path, help="checkpoint to start from; CD: that of its denoiser")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint-every", type=int, default=1000)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    arguments = parsed(words)
    torch.manual_seed(arguments.seed)
    network = Network(arguments.width, arguments.dropout, two_times=arguments.objective == "bct")
    teacher = Network(arguments.width, 0.0, two_times=False).eval().requires_grad_(False)
    if arguments.start is not None:
        (teacher if arguments.objective == "cd" else network).load_state_dict(averaged(arguments.start))
    elif arguments.objective in ("cd", "ect"):
        raise SystemExit("--start: expected the checkpoint of a run with --objective denoising")
    known = objectives(arguments, lambda x, t: predicted(teacher.to(x.device), x, t, "edm"))
    objective = known[arguments.objective]
    options = TrainingOptions(
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        micro_batch=arguments.micro_batch,
        optimizer=arguments.optimizer,
        learning_rate=arguments.learning_rate,
        ema=arguments.ema,
        precision="bfloat16" if arguments.bfloat16 else "float32",
        compiled=arguments.compile,
    )
    asked = ("objective", "mu", "generate", "predictor", "q", "s0", "s1", "stages", "dropout")
    told = {name: getattr(arguments, name) for name in asked}
    run = train(
        network,
        Images(arguments.data),
        objective.loss,
        options,
        workers=arguments.workers,
        parallel=arguments.parallel,
        blocks=lambda network: [*network.unet.down_blocks, network.unet.mid_block, *network.unet.up_blocks],
        notes={"command": told},
        checkpoint=arguments.output / "checkpoint.safetensors",
        checkpoint_every=arguments.checkpoint_every,
        progress=True,
    )
    images = samples(run.average, arguments.objective, objective.form, 32, run.processes.device)
    if run.processes.rank == 0:
        save_picture(images, arguments.output / "samples.png")
        print(f"{arguments.output / 'samples.png'}: {run.step} steps, standard deviation {images.std().item():.3f}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
