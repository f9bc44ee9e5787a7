"""RandAugment, TrivialAugment and colour jitter on whole batches, every image with its own draw.

torchvision's classes give one draw to the whole batch. Here the draws are made per image, and the
images that drew the same operation and strength go through torchvision's v2 function together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torchvision.transforms.v2.functional as F
from torchvision.transforms.v2 import InterpolationMode

from vitmix.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Change", "ColorJitter", "Policy", "make_policy"]

# What is done to (B, 3, H, W) uint8 images, with a source of draws.
Change = Callable[["Tensor", torch.Generator], "Tensor"]

BINS = 31  # strengths are rounded to this many steps, as TrivialAugment defines them


def _affine(images: Tensor, *, shear: tuple[float, float] = (0, 0), shift: Any = (0, 0)) -> Tensor:
    moved: Tensor = F.affine(
        images, angle=0.0, translate=list(shift), scale=1.0, shear=list(shear), center=[0, 0],
        interpolation=InterpolationMode.BILINEAR,
    )  # fmt: skip
    return moved


def _degrees(strength: float, top: float) -> float:
    return math.degrees(math.atan(top * strength))


# Operations on uint8 batches; strength from 0 to 1, negative half of the time where a sign exists.
Operation = Callable[["Tensor", float], "Tensor"]
SIGNED: dict[str, Operation] = {
    "shear_x": lambda x, s: _affine(x, shear=(_degrees(s, 0.3), 0)),
    "shear_y": lambda x, s: _affine(x, shear=(0, _degrees(s, 0.3))),
    "translate_x": lambda x, s: _affine(x, shift=(round(s * 0.45 * x.shape[-1]), 0)),
    "translate_y": lambda x, s: _affine(x, shift=(0, round(s * 0.45 * x.shape[-2]))),
    "rotate": lambda x, s: F.rotate(x, 30 * s, interpolation=InterpolationMode.BILINEAR),
    "brightness": lambda x, s: F.adjust_brightness(x, 1 + 0.9 * s),
    "color": lambda x, s: F.adjust_saturation(x, 1 + 0.9 * s),
    "contrast": lambda x, s: F.adjust_contrast(x, 1 + 0.9 * s),
    "sharpness": lambda x, s: F.adjust_sharpness(x, 1 + 0.9 * s),
}
UNSIGNED: dict[str, Operation] = {
    "posterize": lambda x, s: F.posterize(x, 8 - round(4 * s)),
    "solarize": lambda x, s: F.solarize(x, 255 * (1 - s)),
    "autocontrast": lambda x, s: F.autocontrast(x),
    "equalize": lambda x, s: F.equalize(x),
    "identity": lambda x, s: x,
}
OPERATIONS: dict[str, Operation] = {**SIGNED, **UNSIGNED}


@dataclass(frozen=True)
class Policy:
    """``count`` operations in a row; ``magnitude`` 0 to 10, or ``None`` for uniform strengths."""

    count: int = 1
    magnitude: float | None = None
    magnitude_std: float = 0.0

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment ``(B, 3, H, W)`` uint8 images, each with its own draw."""
        size = len(images)
        names = list(OPERATIONS)
        for _ in range(self.count):
            which = torch.randint(len(names), (size,), generator=generator)
            negative = torch.rand(size, generator=generator) < 0.5
            if self.magnitude is None:
                strength = torch.rand(size, generator=generator)
            else:
                noise = torch.randn(size, generator=generator) * self.magnitude_std
                strength = ((self.magnitude + noise) / 10).clamp(0, 1)
            level = (strength * (BINS - 1)).round().long()
            signed = (which < len(SIGNED)) & negative
            key = (which * BINS + level) * 2 + signed
            out = images.clone()
            for value in sorted(set(key.tolist())):
                rows = (key == value).nonzero().flatten().to(images.device)
                operation = OPERATIONS[names[value // (2 * BINS)]]
                amount = (value // 2) % BINS / (BINS - 1) * (-1 if value % 2 else 1)
                out[rows] = operation(images[rows], amount)
            images = out
        return images


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast and saturation, each changed by a factor in ``1 - s`` to ``1 + s``."""

    strength: float

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Change ``(B, 3, H, W)`` uint8 images, each with its own draw."""
        change = torch.rand(3, len(images), 1, 1, 1, generator=generator) * 2 - 1
        factors = (1 + change * self.strength).clamp_min(0).to(images.device)
        pixels = images.float()
        for index in torch.randperm(3, generator=generator).tolist():
            gray = F.rgb_to_grayscale(pixels)
            base = (torch.zeros_like(gray), gray.mean((-2, -1), keepdim=True), gray)[index]
            pixels = (base + factors[index] * (pixels - base)).clamp(0, 255)
        return pixels.round().to(torch.uint8)


def make_policy(name: str, color_jitter: float | None = None) -> Change | None:
    """The policy of a name: ``none``, ``trivial``, or timm's notation such as ``rand-m9-n2``.

    Args:
        name: the policy.
        color_jitter: strength of a colour jitter, instead of a policy.

    Raises:
        InputError: for anything else, or for both a policy and colour jitter.

    >>> make_policy("rand-m9-mstd0.5")
    Policy(count=2, magnitude=9.0, magnitude_std=0.5)
    """
    if color_jitter is not None:
        if name != "none":
            raise InputError(
                f"expected either --aa, whose operations change colours, or --color-jitter; "
                f"got --aa {name} and --color-jitter {color_jitter}; set one to none (null)"
            )
        return ColorJitter(color_jitter)
    if name == "none":
        return None
    if name == "trivial":
        return Policy()
    parts = name.split("-")
    values = {"m": 9.0, "n": 2.0, "mstd": 0.0, "inc": 1.0}
    if parts[0] == "rand":
        for part in parts[1:]:
            match = re.fullmatch(r"(mstd|inc|m|n)(\d+(?:\.\d+)?)", part)
            if match is None:
                break
            values[match[1]] = float(match[2])
        else:
            if values["m"] <= 10 and values["n"] >= 1:
                return Policy(int(values["n"]), values["m"], values["mstd"])
    raise InputError(
        f"expected --aa to be none, trivial or rand-mM-nN-mstdS with M up to 10, got {name!r}; "
        "for example rand-m9-mstd0.5"
    )
