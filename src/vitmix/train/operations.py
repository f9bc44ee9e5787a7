"""Operations of RandAugment on uint8 batches, each image with an amount of its own.

Their results are those of Pillow, as timm calls it, to within rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as nnf
import torchvision.transforms.v2.functional as F
from torch import Tensor

__all__ = ["MOVES", "OPERATIONS", "warp"]

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
    """Resample ``(B, C, H, W)`` uint8 images; ``fill`` ``(C,)`` is seen beyond their borders."""
    # grid_sample counts from -1 to 1, the matrix from 0 to 1.
    linear, shift = matrix[:, :, :2], matrix[:, :, 2:]
    theta = torch.cat((linear, 2 * shift + linear.sum(2, keepdim=True) - 1), 2)
    grid = nnf.affine_grid(theta, list(images.shape), align_corners=False)
    background = fill.view(1, -1, 1, 1)
    moved = nnf.grid_sample(images.float() - background, grid, align_corners=False)
    return (moved + background).round_().clamp_(0, 255).to(torch.uint8)


# The other operations: (B, 3, H, W) uint8 images and amounts (B, 1, 1, 1).
Operation = Callable[[Tensor, Tensor], Tensor]


def _blend(plain: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """Pillow's enhancement: ``plain`` at factor 0, the image at 1, beyond it above."""
    plain = plain.float()
    return (plain + factor * (images.float() - plain)).clamp_(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    weights = torch.tensor((0.299, 0.587, 0.114), device=images.device).view(1, 3, 1, 1)
    return (images.float() * weights).sum(1, keepdim=True).round_()


def _smooth(images: Tensor) -> Tensor:
    """Each pixel with its neighbours, five to one; the border as it is."""
    plain = images.float()
    if min(plain.shape[2:]) > 2:
        inner = plain[:, :, 1:-1, 1:-1]
        inner.copy_(((nnf.avg_pool2d(plain, 3, 1) * 9 + inner * 4) / 13).round_())
    return plain


def _posterize(images: Tensor, bits: Tensor) -> Tensor:
    return images & (256 - 2 ** (8 - bits)).to(torch.uint8)


def _solarize_add(images: Tensor, amount: Tensor) -> Tensor:
    brighter = (images + amount).clamp_max(255).to(torch.uint8)
    return torch.where(images < 128, brighter, images)


OPERATIONS: dict[str, Operation] = {
    "autocontrast": lambda x, amount: F.autocontrast(x),
    "equalize": lambda x, amount: F.equalize(x),
    "invert": lambda x, amount: 255 - x,
    "posterize": _posterize,
    "solarize": lambda x, threshold: torch.where(x >= threshold, 255 - x, x),
    "solarize_add": _solarize_add,
    "color": lambda x, factor: _blend(_grey(x), x, factor),
    "contrast": lambda x, factor: _blend(
        (_grey(x).mean((2, 3), keepdim=True) + 0.5).floor_(), x, factor
    ),
    "brightness": lambda x, factor: _blend(torch.zeros_like(x), x, factor),
    "sharpness": lambda x, factor: _blend(_smooth(x), x, factor),
}
