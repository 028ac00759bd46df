"""Two small classifiers of digits: one guides inverse solvers, the other evaluates the results."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.digits.data import CLASSES, SIDE, load_split

BATCHES, BATCH = 300, 100


@lru_cache(maxsize=1)
def guide() -> nn.Module:
    """Return the classifier that guides solvers: two hidden layers of 64, images (B, 1, 8, 8) -> logits (B, 10)."""
    torch.manual_seed(0)
    return _trained(nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 64), nn.SiLU(), _hidden(64), _last(64)), 1)


@lru_cache(maxsize=1)
def judge() -> nn.Module:
    """Return a classifier that no solver uses: convolutions, with another initialisation and other batches."""
    torch.manual_seed(1)
    layers = (nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 32, 3, stride=2, padding=1), nn.ReLU())
    return _trained(nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), _last(32 * SIDE * SIDE // 4)), 2)


def share(classifier: nn.Module, images: Tensor, wanted: Tensor) -> float:
    """Return the fraction of images, clipped to [-1, 1], that a classifier assigns to the wanted class.

    >>> held_out = load_split().held_out
    >>> share(guide(), *held_out) > 0.9, share(judge(), *held_out) > 0.9
    (True, True)
    """
    with torch.no_grad():
        return (classifier(images.float().clamp(-1, 1)).argmax(1) == wanted).double().mean().item()


def _hidden(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.SiLU())


def _last(width: int) -> nn.Module:
    return nn.Linear(width, CLASSES)


def _trained(network: nn.Sequential, seed: int) -> nn.Module:
    images, labels = load_split().train
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=BATCHES)
    with torch.enable_grad():
        for _ in range(BATCHES):
            chosen = torch.randint(len(images), (BATCH,), generator=draw)
            noisy = images[chosen] + 0.1 * torch.randn(BATCH, 1, SIDE, SIDE, generator=draw)
            loss = functional.cross_entropy(network(noisy), labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.requires_grad_(False).eval()
