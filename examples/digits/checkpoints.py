"""Files of a training run: checkpoints and weights, each written beside the old one and moved over it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write the content; a kill at any moment leaves the former file or the new one, whole."""
    _replace(path, lambda file: torch.save(dict(content), file))


def load_checkpoint(path: Path, configurations: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what `save_checkpoint` wrote; raises ValueError where it holds other configurations."""
    content: dict[str, Any] = torch.load(path, weights_only=True)
    for name, wanted in configurations.items():
        if content[name] != wanted:
            raise ValueError(f"checkpoint: {path} was made with {name} {content[name]}, expected {wanted}")
    return content


def save_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write weights and their metadata as safetensors, in one atomic move."""
    data = save(dict(weights), dict(metadata))
    _replace(path, lambda file: file.write(data))


def load_weights(path: Path, command: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return weights and metadata; raises FileNotFoundError, which names the command, where there is no such file."""
    if not path.exists():
        raise FileNotFoundError(f"path: {path} does not exist; {command} makes it")
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118


def load_network(path: Path, command: str, make: Callable[[dict[str, Any]], Network], *, dtype: torch.dtype) -> Network:
    """Return a trained network, ready for evaluation, computing in `dtype`; make(its configuration) builds it.

    Raises FileNotFoundError, which names the command, where there is no such file.
    """
    tensors, metadata = load_weights(path, command)
    network = make(json.loads(metadata["network"]))
    network.load_state_dict(tensors)
    return network.requires_grad_(False).eval().to(dtype)


def _replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
