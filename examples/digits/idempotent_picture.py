"""The picture of an idempotent network: samples applied again, edits with a mask, corrupted digits projected back."""

from __future__ import annotations

from pathlib import Path

import torch

from bicm_diffusion import sign_recursive
from bicm_kernels import fold_in, normal
from examples.digits.canvas import DPI, NOISE, PAPER, Canvas, Row
from examples.digits.data import CLASSES, load_split, one_per_class
from examples.digits.idempotent import CORRUPTED, CORRUPTIONS, Network, checkerboard, edited, latents, occluded

WIDTH, HEIGHT = 17.2, 8.6
LEFT, RIGHT = 0.55, 9.05
SUMMARY = (
    "f maps noise to a digit and leaves digits as they are, so that f(f(z)) = f(z). What is near a digit, it moves to"
    " one: noise of an unknown level is removed, and what is marked as missing is filled in."
)


@torch.no_grad()
def save_picture(network: Network, path: Path, *, seed: int) -> None:
    """Draw a network's results from noise, masks and corrupted digits."""
    canvas = Canvas(WIDTH, HEIGHT, "From noise to a digit, from a digit to itself", SUMMARY)
    z = latents(seed, count=2 * CLASSES)
    groups = []
    for k, part in enumerate(z.split(CLASSES)):
        rows = [Row(part, "Noise" if k == 0 else "More noise", "", NOISE)]
        for times in (1, 2, 8):
            note = "one evaluation" if times == 1 else f"{times} evaluations"
            rows.append(Row(sign_recursive(network, part, steps=times), f"Applied {times}×", note))
        groups.append(rows)
    canvas.column(LEFT, "New images from noise", "repeated application, without labels", groups, 0.44)
    real = one_per_class(load_split().held_out).images
    groups = [[Row(real, "Real digits", "the model has never seen them"), Row(network(real), "f of them", "")]]
    for name, corrupt in CORRUPTIONS.items():
        corrupted = corrupt(real, seed)
        groups.append([Row(corrupted, f"With {name}", ""), Row(network(corrupted), "f of them", "one evaluation")])
    noise = normal(real.shape, seed=fold_in(seed, CORRUPTED), step=1)
    for mask, name in ((checkerboard(), "Checkerboard"), (occluded(), "Lower half")):
        masked = Row(torch.where(mask, noise, real), name, "noise where it is masked")
        groups.append([masked, Row(edited(network, real, mask, seed=seed), "Filled in", "three evaluations (Alg. 3)")])
    canvas.column(RIGHT, "Real digits, whole and corrupted", "projected back", groups, 0.2)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.figure.savefig(path, dpi=DPI, facecolor=PAPER)
