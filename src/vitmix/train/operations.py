"""Operations of RandAugment on uint8 batches, each image with an amount of its own.

Their results are those of Pillow, as timm calls it, to within rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as nnf
import torchvision.transforms.v2.functional as F
from torch import Tensor

__all__ = ["MOVES", "OPERATIONS", "POINTWISE", "look_up", "warp"]

# Geometric operations: the amounts (B,) as matrices (B, 2, 3) that say where in the input, counted
# in widths and heights from the upper left corner, the pixel at (x, y) of the output comes from.
Move = Callable[[Tensor, float], Tensor]


def _matrix(amount: Tensor, entries: dict[tuple[int, int], Tensor]) -> Tensor:
    """The identity with these entries changed."""
    matrix = torch.eye(2, 3).repeat(len(amount), 1, 1)
    for (row, column), values in entries.items():
        matrix[:, row, column] = values
    return matrix


def _rotation(degrees: Tensor, ratio: float) -> Tensor:
    """Counter-clockwise about the centre; ``ratio`` is height / width."""
    cos, sin = degrees.deg2rad().cos(), degrees.deg2rad().sin()
    across, down = -sin * ratio, sin / ratio
    shift_x, shift_y = 0.5 - 0.5 * (cos + across), 0.5 - 0.5 * (down + cos)
    return _matrix(
        degrees,
        {(0, 0): cos, (0, 1): across, (0, 2): shift_x, (1, 0): down, (1, 1): cos, (1, 2): shift_y},
    )


MOVES: dict[str, Move] = {
    "shear_x": lambda amount, ratio: _matrix(amount, {(0, 1): amount * ratio}),
    "shear_y": lambda amount, ratio: _matrix(amount, {(1, 0): amount / ratio}),
    "translate_x": lambda amount, ratio: _matrix(amount, {(0, 2): amount}),
    "translate_y": lambda amount, ratio: _matrix(amount, {(1, 2): amount}),
    "rotate": _rotation,
}


def warp(images: Tensor, matrix: Tensor, fill: Tensor) -> Tensor:
    """Resample ``(B, C, H, W)`` uint8 images; ``fill`` ``(C,)`` is seen beyond their borders.

    The matrices ``(B, 2, 3)`` may be on the CPU, wherever the images are.
    """
    # grid_sample counts from -1 to 1, the matrix from 0 to 1.
    linear, shift = matrix[:, :, :2], matrix[:, :, 2:]
    theta = torch.cat((linear, 2 * shift + linear.sum(2, keepdim=True) - 1), 2).to(images.device)
    grid = nnf.affine_grid(theta, list(images.shape), align_corners=False)
    background = fill.to(images.device).view(1, -1, 1, 1)
    moved = nnf.grid_sample(images.float() - background, grid, align_corners=False)
    return moved.add_(background).round_().to(torch.uint8)


# Operations on each value by itself, whatever its neighbours: values from 0 to 255 and amounts.
Operation = Callable[[Tensor, Tensor], Tensor]


def _posterize(values: Tensor, bits: Tensor) -> Tensor:
    return values - values % 2 ** (8 - bits)


POINTWISE: dict[str, Operation] = {
    "invert": lambda values, amount: 255 - values + 0 * amount,
    "posterize": _posterize,
    "solarize": lambda values, least: torch.where(values >= least, 255 - values, values),
    "solarize_add": lambda values, more: torch.where(values < 128, values + more, values),
    "brightness": lambda values, factor: values * factor,
}


def look_up(images: Tensor, tables: Tensor) -> Tensor:
    """Replace every value of ``(B, C, H, W)`` uint8 images by its entry in a table ``(B, 256)``."""
    tables = tables.clamp(0, 255).to(torch.uint8).to(images.device)
    return tables.gather(1, images.flatten(1).long()).view(images.shape)


# The other operations, on (B, 3, H, W) uint8 images and amounts (B, 1, 1, 1).


def _blend(plain: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """Pillow's enhancement: ``plain`` at factor 0, the image at 1, beyond it above."""
    return torch.lerp(plain, images.float(), factor).clamp_(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    red, green, blue = images.float().unbind(1)
    return (0.299 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114).round_()[:, None]


def _smooth(images: Tensor) -> Tensor:
    """Each pixel with its neighbours, five to one; the border as it is."""
    plain = images.float()
    if min(plain.shape[2:]) > 2:
        inner = plain[:, :, 1:-1, 1:-1]
        inner.copy_(nnf.avg_pool2d(plain, 3, 1).lerp_(inner, 4 / 13).round_())
    return plain


OPERATIONS: dict[str, Operation] = {
    "autocontrast": lambda x, amount: F.autocontrast(x),
    "equalize": lambda x, amount: F.equalize(x),
    "color": lambda x, factor: _blend(_grey(x), x, factor),
    "contrast": lambda x, factor: _blend(_grey(x).mean((2, 3), keepdim=True).round_(), x, factor),
    "sharpness": lambda x, factor: _blend(_smooth(x), x, factor),
}
