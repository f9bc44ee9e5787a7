"""Handwritten digits of scikit-learn as image tensors: the data of the examples."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["NUM_CLASSES", "SIDE", "loader", "tensors"]

NUM_CLASSES = 10
SIDE = 32


def tensors(train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Images ``(N, 3, 32, 32)`` in [-1, 1] and labels ``(N,)``; every fifth one is for testing."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    images = torch.nn.functional.interpolate(images, size=(SIDE, SIDE)).expand(-1, 3, -1, -1)
    chosen = (torch.arange(len(images)) % 5 != 0) == train
    return images[chosen].contiguous(), torch.from_numpy(digits.target)[chosen]


def loader(train: bool, batch_size: int = 64) -> DataLoader[tuple[torch.Tensor, ...]]:
    """Batches of images and labels."""
    data = TensorDataset(*tensors(train))
    return DataLoader(data, batch_size, shuffle=train, drop_last=train)
