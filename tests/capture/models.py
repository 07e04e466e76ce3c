"""Small models and data for the capture and engine tests, and the slow truth about gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

CLASSES = 4


def images(size: int = 60, *, dtype: torch.dtype = torch.float32) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randn(size, 1, 6, 6, generator=generator, dtype=dtype)
    return TensorDataset(pixels, torch.randint(0, CLASSES, (size,), generator=generator))


def sentences(size: int = 40) -> TensorDataset:
    generator = torch.Generator().manual_seed(6)
    words = torch.randint(0, 7, (size, 5), generator=generator)  # 7 words: repeats are certain
    return TensorDataset(words, torch.randint(0, CLASSES, (size,), generator=generator))


def convolutional(*, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Dropout(dropout),
        nn.Flatten(), nn.Linear(144, CLASSES),
    ).to(dtype)  # fmt: skip


class Words(nn.Module):
    """Embedding, a linear layer on the sequence, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.mix(self.embedding(words))).mean(dim=1))


class Tied(nn.Module):
    """One linear layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(36, 36)
        self.head = nn.Linear(36, CLASSES)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(torch.tanh(self.layer(pixels.flatten(start_dim=1)))))


def one_by_one_norms(
    module: nn.Module,
    dataset: TensorDataset,
    rows: Sequence[int],
    criterion: Callable[..., torch.Tensor],
) -> np.ndarray:
    """Gradient norm of each instance by itself: plain autograd, batches of one."""
    norms = []
    for row in rows:
        inputs, target = dataset[int(row)]
        loss = criterion(module(inputs[None]), target[None])
        gradients = torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad])
        norms.append(sum(g.double().square().sum().item() for g in gradients) ** 0.5)
    return np.array(norms)
