"""Trained weights: written atomically, and read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from bicm_diffusion.train.checkpoints import save

Network = TypeVar("Network", bound=nn.Module)


def save_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write weights and their metadata as safetensors, atomically."""
    save(path, weights, metadata)


def load_weights(path: Path, command: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return weights and metadata; raises FileNotFoundError with the command that makes the file."""
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
