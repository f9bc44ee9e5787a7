"""Token grids of input sizes, by the layers that make the tokens."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.utils import _pair

from vitmix.functional.grids import Grid

__all__ = ["behind", "whole_patches"]


def whole_patches(patch: Grid, size: Grid) -> Grid:
    """Token grid of an input size: patches beside one another, what is left over cut off."""
    return size[0] // patch[0], size[1] // patch[1]


def behind(layer: nn.Conv2d | nn.MaxPool2d, size: Grid) -> Grid:
    """Height and width of what a convolution or a pooling makes of a map of this size."""
    rows, columns = (
        (side + 2 * padding - kernel) // stride + 1
        for side, padding, kernel, stride in zip(
            size, *map(_pair, (layer.padding, layer.kernel_size, layer.stride)), strict=True
        )
    )
    return rows, columns
