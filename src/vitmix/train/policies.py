"""RandAugment, TrivialAugment and colour jitter on whole batches, every image with its own draw.

torchvision's classes give one draw to the whole batch, timm's take one image at a time. Here the
images of a batch that drew the same operation go through it together, and all that are moved
(sheared, shifted, rotated) through one resampling. Draws are made on the CPU, and nothing is read
back from an accelerator.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor

from vitmix.errors import InputError
from vitmix.train.operations import MOVES, OPERATIONS, POINTWISE, look_up, warp

__all__ = ["SPACES", "Change", "ColorJitter", "Policy", "make_policy"]

# What is done to (B, C, H, W) uint8 images, with a source of draws.
Change = Callable[[Tensor, torch.Generator], Tensor]

# What a strength from 0 to 1 and a random sign mean to an operation.
Amount = Callable[[Tensor, Tensor], Tensor]


def _unused(strength: Tensor, sign: Tensor) -> Tensor:
    return strength


def _signed(top: float) -> Amount:
    return lambda strength, sign: top * strength * sign


def _enhance(strength: Tensor, sign: Tensor) -> Tensor:
    return (1 + 0.9 * strength * sign).clamp_min(0.1)


def _added(strength: Tensor, sign: Tensor) -> Tensor:
    return (110 * strength).floor()


_ENHANCED = ("brightness", "color", "contrast", "sharpness")
# In every space operations of a kind follow each other: moves, tables, others.
_MOVED: dict[str, Amount] = {
    "shear_x": _signed(0.3),
    "shear_y": _signed(0.3),
    "translate_x": _signed(0.45),
    "translate_y": _signed(0.45),
    "rotate": _signed(30),
}
_NEXT: dict[str, Amount] = {"autocontrast": _unused, "equalize": _unused}

# timm's two sets of RandAugment operations (with inc1, more strength always changes more), and
# those of TrivialAugment (Müller and Hutter, ICCV 2021) in RandAugment's ranges.
SPACES: dict[str, dict[str, Amount]] = {
    "rand": {
        **_MOVED,
        "invert": _unused,
        "posterize": lambda strength, sign: (4 * strength).floor(),
        "solarize": lambda strength, sign: (256 * strength).floor(),
        "solarize_add": _added,
        **dict.fromkeys(_ENHANCED, lambda strength, sign: 1.8 * strength + 0.1),
        **_NEXT,
    },
    "rand-increasing": {
        **_MOVED,
        "invert": _unused,
        "posterize": lambda strength, sign: 4 - (4 * strength).floor(),
        "solarize": lambda strength, sign: 256 - (256 * strength).floor(),
        "solarize_add": _added,
        **dict.fromkeys(_ENHANCED, _enhance),
        **_NEXT,
    },
    "trivial": {
        **_MOVED,
        "posterize": lambda strength, sign: 8 - (4 * strength).round(),
        "solarize": lambda strength, sign: 255 * (1 - strength),
        **dict.fromkeys(_ENHANCED, _enhance),
        **_NEXT,
        "identity": _unused,
    },
}


def _kind(name: str) -> str:
    """What goes through one step together: all moves, all tables; others one by one."""
    return "moves" if name in MOVES else "tables" if name in POINTWISE else name


@dataclass(frozen=True)
class Policy:
    """``count`` operations of a space in a row on each image.

    Attributes:
        space: key of :data:`SPACES`.
        count: operations an image.
        magnitude: strength from 0 to 10; None draws it uniformly.
        magnitude_std: standard deviation of the strength.
        chance: probability of each operation; an image that misses it is left alone.
        fill: colour seen beyond the borders of an image that is moved.
    """

    space: str = "trivial"
    count: int = 1
    magnitude: float | None = None
    magnitude_std: float = 0.0
    chance: float = 1.0
    fill: tuple[float, ...] = (128.0, 128.0, 128.0)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment ``(B, C, H, W)`` uint8 images, each with its own draw.

        Channels after the third belong to the image (a map of it, say): they are moved with it,
        with 0 beyond the borders, and keep their values otherwise.
        """
        for _ in range(self.count):
            images = self._layer(images, generator)
        return images

    def _layer(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """One operation on each image: sorted by operation, each run once, sorted back."""
        size, device = len(images), images.device
        space = {**SPACES[self.space], "untouched": _unused}
        which = torch.randint(len(space) - 1, (size,), generator=generator)
        which[torch.rand(size, generator=generator) >= self.chance] = len(space) - 1
        order = which.argsort(stable=True)
        counts = which.bincount(minlength=len(space)).tolist()
        strengths = torch.split(self._strengths(size, generator), counts)
        signs = torch.split(torch.randint(2, (size,), generator=generator) * 2.0 - 1, counts)
        amounts = {
            name: amount(strength, sign)
            for (name, amount), strength, sign in zip(space.items(), strengths, signs, strict=True)
            if len(strength)
        }
        images = images[order.to(device)]
        parts = []
        for kind, names in groupby(amounts, key=_kind):
            drawn = {name: amounts[name] for name in names}
            count = sum(map(len, drawn.values()))
            parts.append(self._changed(kind, drawn, images[:count]))
            images = images[count:]
        return torch.cat(parts)[order.argsort().to(device)]

    def _changed(self, kind: str, amounts: dict[str, Tensor], images: Tensor) -> Tensor:
        """Images of one kind of operation, in the order of the amounts."""
        if kind == "moves":
            ratio = images.shape[2] / images.shape[3]
            matrix = torch.cat([MOVES[name](amount, ratio) for name, amount in amounts.items()])
            return warp(images, matrix, torch.tensor([*self.fill, *[0.0] * (images.shape[1] - 3)]))
        colours, others = images[:, :3], images[:, 3:]
        if kind == "tables":
            values = torch.arange(256.0)
            tables = [POINTWISE[name](values, part[:, None]) for name, part in amounts.items()]
            colours = look_up(colours, torch.cat(tables))
        elif kind in OPERATIONS:
            amount = amounts[kind].view(-1, 1, 1, 1)
            colours = OPERATIONS[kind](colours, amount.to(images.device))
        else:
            return images
        return torch.cat((colours, others), 1) if others.shape[1] else colours

    def _strengths(self, size: int, generator: torch.Generator) -> Tensor:
        if self.magnitude is None:
            return torch.rand(size, generator=generator)
        noise = torch.randn(size, generator=generator) * self.magnitude_std
        return ((self.magnitude + noise) / 10).clamp_(0, 1)


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast and saturation, each changed by a factor in ``1 - s`` to ``1 + s``."""

    strength: float

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Change ``(B, C, H, W)`` uint8 images, each with its own draw; three channels of them."""
        change = torch.rand(3, len(images), 1, 1, 1, generator=generator) * 2 - 1
        factors = (1 + change * self.strength).clamp_min(0).to(images.device)
        pixels = images[:, :3].float()
        for index in torch.randperm(3, generator=generator).tolist():
            gray = F.rgb_to_grayscale(pixels)
            base = (torch.zeros_like(gray), gray.mean((-2, -1), keepdim=True), gray)[index]
            pixels = (base + factors[index] * (pixels - base)).clamp(0, 255)
        return torch.cat((pixels.round().to(torch.uint8), images[:, 3:]), 1)


def make_policy(
    name: str,
    color_jitter: float | None = None,
    *,
    mean: tuple[float, ...] = (0.5, 0.5, 0.5),
) -> Change | None:
    """The policy of a name: ``none``, ``trivial``, or timm's notation such as ``rand-m9-inc1``.

    As in timm, ``m`` is the strength (10), ``n`` the number of operations (2), ``p`` the
    probability of each (0.5), ``mstd`` the strength's standard deviation (0), and ``inc1`` takes
    the operations whose effect always grows with the strength.

    Args:
        name: the policy.
        color_jitter: strength of a colour jitter, instead of a policy.
        mean: mean of each channel in [0, 1], the colour beyond the borders of moved images.

    Raises:
        InputError: for anything else, or for both a policy and colour jitter.

    >>> policy = make_policy("rand-m9-mstd0.5-inc1")
    >>> policy.space, policy.count, policy.magnitude, policy.magnitude_std, policy.chance
    ('rand-increasing', 2, 9.0, 0.5, 0.5)
    """
    if color_jitter is not None:
        if name != "none":
            raise InputError(
                f"expected either --aa, whose operations change colours, or --color-jitter; "
                f"got --aa {name} and --color-jitter {color_jitter}; set one to none (null)"
            )
        return ColorJitter(color_jitter)
    fill = tuple(min(255.0, round(255.0 * value)) for value in mean)
    if name == "none":
        return None
    if name == "trivial":
        return Policy(fill=fill)
    kind, *parts = name.split("-")
    values = {"m": 10.0, "n": 2.0, "p": 0.5, "mstd": 0.0, "inc": 0.0}
    matches = [re.fullmatch(r"(mstd|inc|m|n|p)(\d+(?:\.\d+)?)", part) for part in parts]
    values |= {match[1]: float(match[2]) for match in matches if match}
    if kind != "rand" or None in matches or values["m"] > 10 or values["n"] < 1 or values["p"] > 1:
        raise InputError(
            "expected --aa to be none, trivial or rand-mM-nN-pP-mstdS-inc1 with M up to 10, "
            f"got {name!r}; for example rand-m9-mstd0.5-inc1"
        )
    space = "rand-increasing" if values["inc"] else "rand"
    return Policy(space, int(values["n"]), values["m"], values["mstd"], values["p"], fill)
