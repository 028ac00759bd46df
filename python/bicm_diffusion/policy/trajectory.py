"""A recorded rollout: the states around its stochastic steps, their log-probabilities, and the samples."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bicm_diffusion.described import described
from bicm_diffusion.extras import extra

_TENSORS = ("states", "log_probs", "sample", "sample_ids")


@dataclass(frozen=True)
class Trajectory:
    """A batch of rollouts.

    sample: z_0, (B, …). steps: the indices i of stochastic steps, from N down. log_probs: of z_{i-1} given z_i, (T, B)
    for T steps. levels: the indices whose states were kept, from N down; states: those, (L, B, …). sample_ids: of the
    noise, (B,) int64. seed: of the rollout, None where it was a tensor.
    """

    sample: Tensor
    steps: tuple[int, ...]
    log_probs: Tensor
    levels: tuple[int, ...]
    states: Tensor
    sample_ids: Tensor
    seed: int | None = None

    def state(self, i: int) -> Tensor:
        """Return z_i, (B, …); raises ValueError where it was not kept."""
        if i not in self.levels:
            raise ValueError(f"i: expected one of the levels that were kept, {self.levels}, got {i!r}")
        return self.states[self.levels.index(i)]

    def log_prob(self, i: int) -> Tensor:
        """Return the log-probability (B,) of the step from i to i - 1; raises ValueError where it drew no noise."""
        if i not in self.steps:
            raise ValueError(f"i: expected one of the stochastic steps, {self.steps}, got {i!r}")
        return self.log_probs[self.steps.index(i)]

    def rows(self, samples: Any) -> Trajectory:
        """Return the trajectory of some samples, by any index of a (B,) tensor, such as a slice."""
        return Trajectory(
            self.sample[samples],
            self.steps,
            self.log_probs[:, samples],
            self.levels,
            self.states[:, samples],
            self.sample_ids[samples],
            self.seed,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file (needs safetensors)."""
        about = {"steps": self.steps, "levels": self.levels, "seed": self.seed}
        tensors = {
            name: getattr(self, name).detach().cpu().clone(memory_format=torch.contiguous_format) for name in _TENSORS
        }
        _safetensors().save_file(tensors, path, metadata={"trajectory": json.dumps(about)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trajectory:
        """Return the trajectory of a file that `save` wrote; raises ValueError for other files."""
        library = _safetensors()
        tensors = library.load_file(path)
        with library.safe_open(path, framework="pt") as file:
            about = (file.metadata() or {}).get("trajectory")
        if about is None or tensors.keys() != set(_TENSORS):
            raise ValueError(f"path: expected a file that Trajectory.save wrote, got {os.fspath(path)!r}")
        words = json.loads(about)
        return cls(**tensors, steps=tuple(words["steps"]), levels=tuple(words["levels"]), seed=words["seed"])


def joined(parts: Sequence[Trajectory]) -> Trajectory:
    """Return one trajectory of several batches or shards, in order.

    Raises TypeError for another type, ValueError where none is given or their steps differ.
    """
    if not parts:
        raise ValueError("parts: expected at least one Trajectory, got none")
    for part in parts:
        if not isinstance(part, Trajectory):
            raise TypeError(f"parts: expected Trajectories, got {described(part)}")
        if (part.steps, part.levels) != (parts[0].steps, parts[0].levels):
            raise ValueError(f"parts: expected the steps {parts[0].steps}, got {part.steps}")
    seeds = {part.seed for part in parts}
    return Trajectory(
        torch.cat([part.sample for part in parts]),
        parts[0].steps,
        torch.cat([part.log_probs for part in parts], 1),
        parts[0].levels,
        torch.cat([part.states for part in parts], 1),
        torch.cat([part.sample_ids for part in parts]),
        seeds.pop() if len(seeds) == 1 else None,
    )


def _safetensors() -> Any:
    with extra("diffusion"):
        import safetensors
        import safetensors.torch
    return _Files(safetensors.torch.save_file, safetensors.torch.load_file, safetensors.safe_open)


@dataclass(frozen=True)
class _Files:
    save_file: Any
    load_file: Any
    safe_open: Any
