"""Which tokens come from the partner: boxes, many blocks, single tokens.

All masks are ``(h, w)`` bool tensors on the CPU, True where a token is taken from the partner.
``lam`` is the share of the sample's own image: about ``(1 - lam) * h * w`` entries are True.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from vitmix.errors import InputError
from vitmix.functional.draws import host_generator, stochastic_round

__all__ = ["block_mask", "box_mask", "random_mask"]

_BLOCK_ATTEMPTS = 10
_LOG_ASPECT = math.log(0.3)


def box_mask(
    grid: tuple[int, int], lam: float, *, generator: torch.Generator | None = None
) -> Tensor:
    """Draw one box on the token grid (CutMix, Yun et al. 2019, on tokens).

    The height is near ``h * sqrt(1 - lam)``, the width is what then gives the area, both rounded
    at random so that the expected area is exactly ``(1 - lam) * h * w``. The box lies inside the
    grid, every position equally likely. (TL-Align's released boxes cover 27% of a 14 x 14 grid on
    average instead of 50%: they are rounded down twice and then clipped.)

    Args:
        grid: rows and columns ``(h, w)`` of tokens.
        lam: share of the own image, in [0, 1].
        generator: source of the draw; the global one by default.

    Returns:
        ``(h, w)`` bool, True = from the partner.

    Raises:
        InputError: a grid without tokens, or ``lam`` outside [0, 1].

    Example:
        >>> box_mask((4, 4), lam=0.75, generator=torch.Generator().manual_seed(0)).sum()
        tensor(4)
    """
    h, w = _checked(grid, lam)
    return _box(h, w, 1.0 - float(lam), host_generator(generator))


def _box(h: int, w: int, share: float, rng: np.random.Generator) -> Tensor:
    mask = np.zeros((h, w), dtype=bool)
    if share > 0.0:
        # Any height from this least one upwards can reach the area within the width.
        least = max(1, math.ceil(share * h - 1e-9))
        height = min(h, max(least, stochastic_round(h * math.sqrt(share), rng)))
        width = min(w, stochastic_round(share * h * w / height, rng))
        top = int(rng.integers(h - height + 1))
        left = int(rng.integers(w - width + 1))
        mask[top : top + height, left : left + width] = True
    return torch.from_numpy(mask)


def block_mask(
    grid: tuple[int, int],
    lam: float,
    *,
    min_block_tokens: int | None = None,
    extra_tokens: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a region made of many rectangles (TokenMix, Liu et al. 2022, Sec. 3).

    Rectangles of random area and aspect ratio (0.3 to 1 / 0.3, relative to that of the grid) are
    added until ``(1 - lam) * h * w`` tokens are covered or no further one fits. They may overlap.

    Args:
        grid: rows and columns ``(h, w)`` of tokens.
        lam: share of the own image, in [0, 1].
        min_block_tokens: least area of a rectangle while that much is still to be covered; by
            default one fourteenth of the grid (14 tokens of 14 x 14).
        extra_tokens: tokens added to the number to be covered. The released code's setting is
            ``min_block_tokens=1, extra_tokens=14``.
        generator: source of the draw; the global one by default.

    Returns:
        ``(h, w)`` bool, True = from the partner. Its mean is the share of the partner.

    Raises:
        InputError: a grid without tokens, ``lam`` outside [0, 1], or ``min_block_tokens`` below 1.

    Example:
        >>> mask = block_mask((14, 14), lam=0.5, generator=torch.Generator().manual_seed(0))
        >>> mask.shape, bool(80 < mask.sum() <= 98)
        (torch.Size([14, 14]), True)
    """
    h, w = _checked(grid, lam)
    least = max(1, round(h * w / 14)) if min_block_tokens is None else min_block_tokens
    if least < 1:
        raise InputError(f"expected `min_block_tokens` of at least 1, got {min_block_tokens}")
    rng = host_generator(generator)
    wanted = stochastic_round((1.0 - float(lam)) * h * w, rng) + (extra_tokens if lam < 1 else 0)
    mask = np.zeros((h, w), dtype=bool)
    if wanted >= h * w:
        return torch.from_numpy(~mask)
    # A region smaller than the least rectangle is one smaller rectangle.
    least = min(least, max(1, wanted))
    covered = 0
    while covered < wanted:
        added = _add_block(mask, least, wanted - covered, rng)
        if added == 0:
            break
        covered += added
    if covered == 0 and wanted > 0:
        return _box(h, w, wanted / (h * w), rng)
    return torch.from_numpy(mask)


def _add_block(mask: np.ndarray, least: int, remaining: int, rng: np.random.Generator) -> int:
    """Add one rectangle in place; return how many tokens it added, 0 if none was found."""
    h, w = mask.shape
    for _ in range(_BLOCK_ATTEMPTS):
        area = rng.uniform(min(least, remaining), max(least, remaining))
        # The aspect ratio of the grid itself makes the rule work on strips; 1 on square grids.
        aspect = math.exp(rng.uniform(_LOG_ASPECT, -_LOG_ASPECT)) * h / w
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height < 1:
            height, width = 1, round(area)
        elif width < 1:
            height, width = round(area), 1
        if height > max(1, h - 1) or width > max(1, w - 1):
            continue
        top = int(rng.integers(h - height + 1))
        left = int(rng.integers(w - width + 1))
        block = mask[top : top + height, left : left + width]
        added = height * width - int(block.sum())
        if 0 < added <= remaining:
            block[:] = True
            return added
    return 0


def random_mask(
    grid: tuple[int, int], lam: float, *, generator: torch.Generator | None = None
) -> Tensor:
    """Draw single tokens, each equally likely (TokenMix's random masks).

    Args:
        grid: rows and columns ``(h, w)`` of tokens.
        lam: share of the own image, in [0, 1].
        generator: source of the draw; the global one by default.

    Returns:
        ``(h, w)`` bool with ``(1 - lam) * h * w`` entries True, rounded at random to an integer.

    Raises:
        InputError: a grid without tokens, or ``lam`` outside [0, 1].

    Example:
        >>> random_mask((2, 8), lam=0.25).sum()
        tensor(12)
    """
    h, w = _checked(grid, lam)
    rng = host_generator(generator)
    mask = np.zeros(h * w, dtype=bool)
    count = min(h * w, stochastic_round((1.0 - float(lam)) * h * w, rng))
    mask[rng.permutation(h * w)[:count]] = True
    return torch.from_numpy(mask.reshape(h, w))


def _checked(grid: tuple[int, int], lam: float) -> tuple[int, int]:
    h, w = (int(side) for side in grid)
    if h < 1 or w < 1:
        raise InputError(f"expected `grid` as (rows, columns) of at least one token, got {grid}")
    if not 0.0 <= float(lam) <= 1.0:
        raise InputError(f"expected `lam`, the share of the own image, in [0, 1], got {lam}")
    return h, w
