"""How a batch of samples lies on disk: one safetensors file, or a folder of PNG images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

#: Grey, RGB and RGBA.
CHANNELS = (1, 3, 4)


class Format(NamedTuple):
    """The ending of a shard's name, how samples from an id on are written to such a path, and how they are read."""

    suffix: str
    write: Callable[[Path, int, Tensor], None]
    read: Callable[[Path], Tensor]


def to_pixels(samples: Tensor) -> Tensor:
    """Return images (B, C, H, W) as uint8: floats in [-1, 1] to the nearest of 256 levels, what lies beyond clipped.

    C is 1, 3 or 4 (grey, RGB, RGBA). uint8 stays as it is.
    Raises ValueError for another shape or dtype, or where a sample is not finite.

    >>> to_pixels(torch.tensor([-1.0, 0.0, 3.0]).reshape(1, 1, 1, 3)).flatten().tolist()
    [0, 128, 255]
    """
    if samples.dim() != 4 or samples.shape[1] not in CHANNELS:
        raise ValueError(f"sample: images are (batch, 1, 3 or 4, height, width), got {tuple(samples.shape)}")
    if samples.dtype == torch.uint8:
        return samples.cpu()
    if not samples.is_floating_point():
        raise ValueError(f"sample: images are uint8 or floats in [-1, 1], got {samples.dtype}")
    if not samples.isfinite().all():
        raise ValueError("sample: images must be finite, got NaN or infinity")
    # Float64 and one product: the same levels for every dtype and device.
    return ((samples.cpu().double() + 1.0) * 127.5).round().clamp(0.0, 255.0).to(torch.uint8)


def write_images(path: Path, first: int, samples: Tensor) -> None:
    """Write the folder `path` with one image a sample, named by its id."""
    from PIL import Image  # an optional dependency: tensors need only safetensors

    pixels = to_pixels(samples).permute(0, 2, 3, 1)
    path.mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image.squeeze(-1).contiguous().numpy()).save(path / f"{first + i:08d}.png")


def read_images(path: Path) -> Tensor:
    """Return a folder's images, (B, C, H, W) uint8."""
    import numpy as np
    from PIL import Image

    images = []
    for file in sorted(path.glob("*.png"), key=lambda file: int(file.stem)):
        with Image.open(file) as image:
            pixels = torch.from_numpy(np.array(image))
        images.append(pixels.reshape(*pixels.shape[:2], -1).permute(2, 0, 1))
    return torch.stack(images)


FORMATS = {
    "safetensors": Format(
        ".safetensors",
        lambda path, first, samples: save_file({"samples": samples.contiguous().cpu()}, path),
        lambda path: load_file(path)["samples"],
    ),
    "png": Format("", write_images, read_images),
}
