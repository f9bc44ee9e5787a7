"""Augmentation and normalisation of whole batches, on the device that the batch is on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

    from vitmix.train.policies import Change

Range = tuple[float, float]
CROP_TRIES = 10  # draws of a window's area and shape until one fits into the image

__all__ = [
    "BatchAugment",
    "normalise",
    "random_crop",
    "random_erase",
    "random_flip",
    "random_resized_crop",
]


def random_crop(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Pad ``(B, C, H, W)`` by zeros and cut a window of the old size, its own for each image."""
    if not padding:
        return images
    count, _, height, width = images.shape
    windows = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # a view
    top, left = torch.randint(2 * padding + 1, (2, count), generator=generator).to(images.device)
    return windows[torch.arange(count, device=images.device), :, top, left]


def random_resized_crop(
    images: Tensor, scale: Range, ratio: Range, interpolation: str, generator: torch.Generator
) -> Tensor:
    """Cut a window of random area and shape from each image and bring it to the old size.

    The rule is that of Inception (Szegedy et al. 2015) and torchvision's ``RandomResizedCrop``,
    with a draw for each image.

    Args:
        images: ``(B, C, H, W)`` uint8.
        scale: least and largest share of the image's area.
        ratio: least and largest width over height.
        interpolation: ``"bicubic"``, ``"bilinear"`` or ``"random"``, one of the two for each image.
        generator: source of the draws.

    Returns:
        ``(B, C, H, W)`` uint8.
    """
    count, _, height, width = images.shape
    shape = (CROP_TRIES, count)
    area = torch.empty(shape).uniform_(*scale, generator=generator) * height * width
    bounds = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.empty(shape).uniform_(*bounds, generator=generator).exp()
    size = torch.stack(((area * aspect).sqrt(), (area / aspect).sqrt())).round()  # width, height
    whole = torch.tensor([float(width), float(height)])[:, None]
    fits = ((size >= 1) & (size <= whole[:, None])).all(0)
    first = fits.int().argmax(0)  # the first that fits
    size = size.gather(1, first.expand(2, 1, count))[:, 0]
    size = torch.where(fits.any(0), size, whole)
    corner = (torch.rand(2, count, generator=generator) * (whole - size + 1)).floor()
    window = torch.zeros(count, 2, 3)  # from output to input places, both in [-1, 1]
    window[:, [0, 1], [0, 1]] = (size / whole).T
    window[:, :, 2] = ((2 * corner + size) / whole - 1).T
    cubic = torch.full((count,), interpolation == "bicubic")
    if interpolation == "random":
        cubic = torch.rand(count, generator=generator) < 0.5
    grid = F.affine_grid(window.to(images.device), list(images.shape), align_corners=False)
    out = torch.empty_like(images)
    for mode, chosen in (("bicubic", cubic), ("bilinear", ~cubic)):
        rows = chosen.nonzero().flatten().to(images.device)
        if len(rows):
            sampled = F.grid_sample(
                images[rows].float(), grid[rows], mode, padding_mode="border", align_corners=False
            )
            out[rows] = sampled.round().clamp(0, 255).to(torch.uint8)
    return out


def random_flip(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with this probability."""
    if not probability:
        return images
    chosen = torch.rand(len(images), generator=generator) < probability
    return torch.where(chosen.to(images.device)[:, None, None, None], images.flip(-1), images)


def random_erase(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Fill a random rectangle with noise (Zhong et al. 2020), on normalised images.

    The area is 2% to 33% of the image and the aspect ratio 0.3 to 3.3.
    """
    if not probability:
        return images
    count, _, height, width = images.shape
    chosen = torch.rand(count, generator=generator) < probability
    area = torch.empty(count).uniform_(0.02, 1 / 3, generator=generator) * height * width
    bound = math.log(0.3)
    ratio = torch.empty(count).uniform_(bound, -bound, generator=generator).exp()
    box_height = (area * ratio).sqrt().round().clamp(1, height)
    box_width = (area / ratio).sqrt().round().clamp(1, width)
    top = (torch.rand(count, generator=generator) * (height - box_height + 1)).floor()
    left = (torch.rand(count, generator=generator) * (width - box_width + 1)).floor()

    def inside(start: Tensor, length: Tensor, side: int) -> Tensor:
        position = torch.arange(side)
        return (position >= start[:, None]) & (position < (start + length)[:, None])

    rows, columns = inside(top, box_height, height), inside(left, box_width, width)
    erased = (rows[:, :, None] & columns[:, None, :] & chosen[:, None, None])[:, None]
    hit = chosen.nonzero().flatten()
    noise = torch.randn((len(hit), *images.shape[1:]), generator=generator)
    place, region = hit.to(images.device), erased[hit].to(images.device)
    images = images.clone()
    images[place] = torch.where(region, noise.to(images), images[place])
    return images


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 images as floats with zero mean and unit variance a channel."""
    shape = (1, -1, 1, 1)
    offset = torch.tensor(mean, device=images.device).view(shape)
    scale = torch.tensor(std, device=images.device).view(shape)
    return (images.float() / 255 - offset) / scale


@dataclass
class BatchAugment:
    """Random crop, flip, policy, normalisation, erasing; each skipped where it is off.

    With ``scale`` the crop is a resized one; see :func:`random_resized_crop`.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    generator: torch.Generator
    crop_padding: int = 0
    hflip: float = 0.0
    policy: Change | None = None
    reprob: float = 0.0
    scale: Range | None = None
    ratio: Range = (3 / 4, 4 / 3)
    interpolation: str = "bicubic"

    def __call__(self, images: Tensor) -> Tensor:
        """Augment ``(B, 3, H, W)`` uint8 images; returns normalised floats."""
        return self.with_maps(images, None)[0]

    def with_maps(self, images: Tensor, maps: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Augment images and move maps of them ``(B, h, w)`` uint8 along with their pixels.

        The maps come back on the images' raster, ``(B, H, W)`` uint8.
        """
        if maps is not None:
            size = (int(images.shape[2]), int(images.shape[3]))
            images = torch.cat((images, enlarge(maps.to(images.device), size)), 1)
        if self.scale is not None:
            images = random_resized_crop(
                images, self.scale, self.ratio, self.interpolation, self.generator
            )
        images = random_crop(images, self.crop_padding, self.generator)
        images = random_flip(images, self.hflip, self.generator)
        if self.policy is not None:
            images = self.policy(images, self.generator)
        pixels = normalise(images[:, :3], self.mean, self.std)
        moved = None if maps is None else images[:, 3]
        return random_erase(pixels, self.reprob, self.generator), moved


def enlarge(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps ``(B, h, w)`` uint8 as a channel of images of this size, ``(B, 1, H, W)``."""
    if tuple(maps.shape[1:]) == size:
        return maps[:, None]
    larger = F.interpolate(maps[:, None].float(), size, mode="bilinear")
    return larger.round_().to(torch.uint8)
