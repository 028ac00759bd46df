"""How a batch of samples is stored: one safetensors file, or a folder of PNG images."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bicm_diffusion.extras import extra

#: Grey, RGB and RGBA.
CHANNELS = (1, 3, 4)


#: The first and the last bytes of a PNG file.
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"\x00\x00\x00\x00IEND\xaeB`\x82"


class Format(NamedTuple):
    """The suffix of a shard's name, and how samples first … stop - 1 are written, read and checked at such a path.

    library: the module that writes and reads, imported when needed. fault: why the shard is not complete, or None;
    checks headers and sizes and reads no samples.
    """

    suffix: str
    library: Callable[[], Any]
    write: Callable[[Path, int, Tensor], None]
    fault: Callable[[Path, int, int], str | None]
    read: Callable[[Path, int, int], Tensor]


def to_pixels(samples: Tensor) -> Tensor:
    """Return images (B, C, H, W) as uint8: floats in [-1, 1] to the nearest of 256 levels, others clipped.

    C is 1, 3 or 4 (grey, RGB, RGBA). uint8 is returned unchanged.
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


def _safetensors() -> Any:
    with extra("diffusion", 'or save images with save_as="png"'):
        import safetensors.torch
    return safetensors


def _pillow() -> Any:
    with extra("diffusion", 'or save tensors with save_as="safetensors"'):
        import PIL.Image
    return PIL.Image


def write_tensors(path: Path, first: int, samples: Tensor) -> None:
    """Write the file `path` with the samples as one tensor."""
    _safetensors().torch.save_file({"samples": samples.contiguous().cpu()}, path)


def fault_in_tensors(path: Path, first: int, stop: int) -> str | None:
    """Return why a file does not hold the samples first … stop - 1, or None; checks its header and length."""
    library = _safetensors()
    if not path.is_file():
        return "no file"
    try:
        with library.safe_open(path, framework="pt") as file:
            shape = file.get_slice("samples").get_shape()
    except library.SafetensorError as error:
        return f"no whole safetensors file ({error})"
    return None if shape[:1] == [stop - first] else f"expected {stop - first} samples, got shape {tuple(shape)}"


def read_tensors(path: Path, first: int, stop: int) -> Tensor:
    """Return a file's samples; raises ValueError naming the file where it is not complete."""
    if fault := fault_in_tensors(path, first, stop):
        raise ValueError(unreadable(path, fault))
    samples: Tensor = _safetensors().torch.load_file(path)["samples"]
    return samples


def write_images(path: Path, first: int, samples: Tensor) -> None:
    """Write the folder `path` with one image per sample, named by its id."""
    library = _pillow()
    pixels = to_pixels(samples).permute(0, 2, 3, 1)
    path.mkdir()
    for i, image in enumerate(pixels):
        library.fromarray(image.squeeze(-1).contiguous().numpy()).save(_image_path(path, first + i))


def fault_in_images(path: Path, first: int, stop: int) -> str | None:
    """Return why a folder lacks the images first … stop - 1, or None; checks each file's first and last bytes."""
    for file in (_image_path(path, i) for i in range(first, stop)):
        try:
            with file.open("rb") as content:
                start = content.read(len(PNG_START))
                content.seek(-min(len(PNG_END), content.seek(0, os.SEEK_END)), os.SEEK_END)
                if (start, content.read()) != (PNG_START, PNG_END):
                    return f"{file.name} is no whole PNG file"
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            return f"{file.name}: {error.strerror}"
    return None


def read_images(path: Path, first: int, stop: int) -> Tensor:
    """Return a folder's images, (B, C, H, W) uint8; raises ValueError naming an invalid file."""
    if fault := fault_in_images(path, first, stop):
        raise ValueError(unreadable(path, fault))
    library, images = _pillow(), list[Tensor]()
    for file in (_image_path(path, i) for i in range(first, stop)):
        try:
            with library.open(file) as image:
                pixels = torch.from_numpy(np.array(image))
        except (OSError, SyntaxError, ValueError) as error:  # a broken chunk is a SyntaxError
            raise ValueError(unreadable(path, f"{file.name}: {error}")) from error
        images.append(pixels.reshape(*pixels.shape[:2], -1).permute(2, 0, 1))
        if images[0].shape != images[-1].shape:
            expected, got = (tuple(image.shape) for image in (images[0], images[-1]))
            raise ValueError(unreadable(path, f"{file.name}: expected an image {expected} as before, got {got}"))
    return torch.stack(images)


def _image_path(folder: Path, sample_id: int) -> Path:
    return folder / f"{sample_id:08d}.png"


def unreadable(path: Path, reason: str) -> str:
    """Return the message for a shard that is damaged."""
    return f"{path} cannot be read: {reason}; remove it and run again, which makes it anew"


FORMATS = {
    "safetensors": Format(".safetensors", _safetensors, write_tensors, fault_in_tensors, read_tensors),
    "png": Format("", _pillow, write_images, fault_in_images, read_images),
}
