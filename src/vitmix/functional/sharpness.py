"""How sharply saliency points at a few tokens: what TokenMixup's Figure 3 shows, as a number."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vitmix.errors import InputError
from vitmix.functional.precision import wide

__all__ = ["sharpness", "top_share"]


def sharpness(saliency: Tensor) -> Tensor:
    """One minus the entropy over that of an even spread: 0 where saliency is even, 1 on one token.

    Args:
        saliency: ``(B, N)``, at least 0; need not sum to 1.

    Returns:
        ``(B,)`` in [0, 1].

    Raises:
        InputError: not two axes, or a single token.

    Example:
        >>> sharpness(torch.tensor([[1.0, 1.0], [0.0, 3.0]]))
        tensor([0., 1.])
    """
    if saliency.ndim != 2 or saliency.shape[1] < 2:
        raise InputError(f"expected saliency (B, N) of two tokens or more, got {_shape(saliency)}")
    weights = _normalised(saliency)
    entropy = torch.special.entr(weights).sum(1)
    found: Tensor = 1 - entropy / math.log(saliency.shape[1])
    return found.clamp(0, 1)


def top_share(saliency: Tensor, part: float = 0.1) -> Tensor:
    """Share of all saliency on the most salient tokens; ``part`` where it is even.

    Args:
        saliency: ``(B, N)``, at least 0; need not sum to 1.
        part: which part of the tokens, in (0, 1]; at least one token. Of a count that is not whole,
            the last token counts in part.

    Returns:
        ``(B,)`` in [0, 1].

    Raises:
        InputError: not two axes, or a part out of range.

    Example:
        >>> top_share(torch.tensor([[1.0, 1.0, 1.0, 1.0], [5.0, 1.0, 1.0, 1.0]]), 0.25)
        tensor([0.2500, 0.6250])
    """
    if saliency.ndim != 2 or not 0 < part <= 1:
        raise InputError(
            f"expected saliency (B, N) and a part in (0, 1], got {_shape(saliency)} and {part}"
        )
    weights = _normalised(saliency).sort(dim=1, descending=True).values
    count = max(1.0, part * saliency.shape[1])
    places = torch.arange(weights.shape[1], device=weights.device, dtype=weights.dtype)
    counted = (count - places).clamp(0, 1)
    return (weights * counted).sum(1)


def _normalised(saliency: Tensor) -> Tensor:
    saliency = wide(saliency)
    total = saliency.sum(1, keepdim=True)
    return torch.where(total > 0, saliency / total, 1 / saliency.shape[1])


def _shape(value: Tensor) -> tuple[int, ...]:
    return tuple(value.shape)
