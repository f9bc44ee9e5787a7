"""From what a reader gives to pixels, by the fastest decoder that knows the format.

TorchCodec takes a quarter to three quarters of Pillow's time for JPEG and WebP, and tensors are
resized in half of it (``benchmarks/decoding.py``). torchvision's decoder, as fast but deprecated,
stands in where TorchCodec is not installed. Pillow reads the formats that these don't, and has the
last word on whether a file is broken.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from torch import Tensor

from vitmix.errors import InputError

if TYPE_CHECKING:
    from vitmix.train.config import Interpolation

try:
    from torchcodec.decoders import decode_image
except (ImportError, OSError, RuntimeError):  # not there, or made for another PyTorch
    from torchvision.io import decode_image

__all__ = ["DECODE_ERRORS", "Content", "CorruptImageError", "centred", "image_size", "pixels_of"]

# An image as its reader has it: encoded, in a file, or decoded by a library of the reader's.
Content = bytes | Path | Image.Image

# What Pillow raises for a broken file: SyntaxError for PNG chunks, ValueError for empty ones.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class CorruptImageError(InputError):
    """An image cannot be decoded.

    An error of a loading process arrives with its traceback as message, and is made anew from it:
    only the last line is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.strip().splitlines()[-1].rpartition("CorruptImageError: ")[2])

    @classmethod
    def at(cls, place: str) -> CorruptImageError:
        """The error for the image at this place."""
        return cls(
            f"expected an image, cannot decode {place}; "
            "replace it, or pass --skip-corrupt to leave such images out"
        )


def image_size(content: Content) -> tuple[int, int]:
    """Width and height, from the header alone.

    Raises:
        DECODE_ERRORS: not an image.
    """
    if isinstance(content, Image.Image):
        return content.size
    with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
        width, height = image.size
    return width, height


def pixels_of(content: Content) -> Tensor:
    """Decode to ``(3, H, W)`` uint8, red, green and blue.

    Raises:
        DECODE_ERRORS: not an image, or a broken one.
    """
    if isinstance(content, Image.Image):
        return torch.from_numpy(np.array(content.convert("RGB"))).permute(2, 0, 1)
    data = content if isinstance(content, bytes) else content.read_bytes()
    try:
        pixels: Tensor = decode_image(
            torch.frombuffer(bytearray(data), dtype=torch.uint8), mode="RGB"
        )
    except (RuntimeError, ValueError):  # another format, or broken
        pixels = torch.empty(0)
    if pixels.ndim == 3 and pixels.dtype == torch.uint8:
        return pixels
    with Image.open(io.BytesIO(data)) as image:
        return pixels_of(image)


def centred(
    pixels: Tensor, size: int, crop_pct: float = 1.0, interpolation: Interpolation = "bicubic"
) -> Tensor:
    """``(3, H, W)`` pixels as ``(3, size, size)``: shorter side resized, middle cut out.

    The shorter side becomes ``size / crop_pct`` pixels.
    """
    shorter = int(size / crop_pct)
    height, width = pixels.shape[1:]
    if (height, width) == (size, size) == (shorter, shorter):
        return pixels
    scale = shorter / min(width, height)
    resized = [max(shorter, round(height * scale)), max(shorter, round(width * scale))]
    mode: Any = F.InterpolationMode(interpolation)
    pixels = F.resize(pixels, resized, interpolation=mode, antialias=True)
    top, left = (resized[0] - size) // 2, (resized[1] - size) // 2
    return pixels[:, top : top + size, left : left + size]
