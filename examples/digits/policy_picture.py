"""The picture of the tuned digits: rewards over updates, and samples of the same noise before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from examples.digits.data import SIDE
from examples.digits.policy import Result


def save_picture(results: Mapping[tuple[str, str], Sequence[Result]], path: Path) -> None:
    """Draw for every method and reward the rewards of all seeds, and the first seed's samples."""
    figure = Figure((11, 2.3 * len(results)), layout="constrained")
    axes = figure.subplots(len(results), 2, squeeze=False, width_ratios=(1, 1.6))
    for (curve, strips), ((method, reward), runs) in zip(axes, results.items(), strict=True):
        for seed, run in enumerate(runs):
            curve.plot(range(1, len(run.rewards) + 1), run.rewards, label=f"seed {seed}")
        curve.set(xlabel="update", ylabel="mean reward", title=f"{method}, {reward}")
        curve.legend(fontsize=7)
        strips.imshow(torch.cat([_strip(runs[0].before), _strip(runs[0].after)]).numpy(), cmap="Greys", vmin=-1, vmax=1)
        strips.set(xticks=[], yticks=[SIDE / 2, 1.5 * SIDE + 1], yticklabels=["before", "after"])
        strips.set_title("the same noise", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _strip(images: Sequence[Sequence[float]]) -> Tensor:
    """Images in a row, separated by a column of paper, with a row of paper below."""
    tiles = torch.tensor(images).reshape(-1, SIDE, SIDE)
    padded = torch.nn.functional.pad(tiles, (0, 1, 0, 1), value=-1.0)
    return torch.cat(list(padded), dim=1)
