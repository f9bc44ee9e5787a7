"""Targets and the loss that takes them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vitmix.errors import InputError

__all__ = [
    "activation_weight",
    "least_cross_entropy",
    "smooth_targets",
    "soft_cross_entropy",
    "soft_cross_entropy_per_sample",
]


def activation_weight(
    own_map: Tensor, partner_map: Tensor, mask: Tensor, *, eps: float = 1e-8
) -> tuple[Tensor, Tensor]:
    """Weights of the two labels from class activation maps (TokenMix, Sec. 3).

    Each map is normalised over its image; a weight is the part of its map that is still visible:
    ``w = sum (1 - m) a_own`` and ``v = sum m a_partner``. They need not sum to 1.

    Args:
        own_map: ``(B, h, w)``, not negative: the teacher's activation for the own class.
        partner_map: ``(B, h, w)``, the same of the partner's image and class.
        mask: ``(h, w)`` or ``(B, h, w)``, True or 1 where the partner is seen; a fraction is the
            part of a place that is the partner's.
        eps: added to the sum that a map is divided by; a map of zeros gets weight 0.

    Returns:
        ``(B,)`` weight of the own label, ``(B,)`` weight of the partner's; float32 at least.

    Raises:
        InputError: shapes that don't fit, or a negative activation.

    Example:
        >>> maps = torch.tensor([[[1.0, 3.0]]])
        >>> activation_weight(maps, maps, torch.tensor([[True, False]]))
        (tensor([0.7500]), tensor([0.2500]))
    """
    if own_map.ndim != 3 or own_map.shape != partner_map.shape:
        raise InputError(
            "expected two maps (B, h, w) of one shape, "
            f"got {tuple(own_map.shape)} and {tuple(partner_map.shape)}"
        )
    if mask.shape not in (own_map.shape, own_map.shape[1:]):
        raise InputError(
            f"expected `mask` of shape {tuple(own_map.shape[1:])} or {tuple(own_map.shape)}, "
            f"got {tuple(mask.shape)}"
        )
    for maps in (own_map, partner_map):
        _require(
            (maps >= 0).all(),
            lambda: "expected activation maps of at least 0, got a negative one; cut it off first",
        )
    dtype = torch.promote_types(own_map.dtype, torch.float32)
    own, partner, seen = own_map.to(dtype), partner_map.to(dtype), mask.to(dtype)
    own = own / (own.sum((1, 2), keepdim=True) + eps)
    partner = partner / (partner.sum((1, 2), keepdim=True) + eps)
    return ((1 - seen) * own).sum((1, 2)), (seen * partner).sum((1, 2))


def smooth_targets(targets: Tensor, num_classes: int, smoothing: float = 0.0) -> Tensor:
    """Soft targets from class indices or soft labels, smoothed: ``(1 - s) y + s / C``.

    Args:
        targets: ``(B,)`` integer class indices or ``(B, C)`` soft labels whose rows sum to 1 as
            far as their precision goes; they are divided by their sum.
        num_classes: C.
        smoothing: s, in [0, 1).

    Returns:
        ``(B, C)`` float32.

    Raises:
        InputError: a class index outside ``0..C-1``, a negative soft label, or a row that does not
            sum to 1. (On a GPU these three are device-side assertions: no host synchronisation.)

    Example:
        >>> smooth_targets(torch.tensor([1]), num_classes=4, smoothing=0.2)
        tensor([[0.0500, 0.8500, 0.0500, 0.0500]])
    """
    if not 0.0 <= smoothing < 1.0:
        raise InputError(f"expected `label_smoothing` in [0, 1), got {smoothing}")
    if targets.ndim == 1 and not targets.is_floating_point():
        inside = (targets >= 0) & (targets < num_classes)
        _require(
            inside.all(),
            lambda: (
                f"expected class indices from 0 to {num_classes - 1}, got "
                f"{int(targets[~inside][0])}; check `num_classes` and the labels of the data set"
            ),
        )
        soft = F.one_hot(targets.long(), num_classes).float()
    elif targets.ndim == 2 and targets.shape[1] == num_classes:
        soft = targets.float()
        _require(
            (soft >= 0).all(),
            lambda: f"expected soft labels of at least 0, got {float(soft.min()):.6g}",
        )
        sums = soft.sum(1, keepdim=True)
        off = (sums - 1).abs()
        eps = torch.finfo(targets.dtype).eps if targets.is_floating_point() else 0.0
        _require(
            (off < max(1e-3, 4 * eps)).all(),
            lambda: (
                "expected rows of soft labels that sum to 1, "
                f"got a sum of {float(sums[off.argmax()]):.6g}"
            ),
        )
        soft = soft / sums
    else:
        raise InputError(
            f"expected `targets` as class indices (B,) of an integer dtype or soft labels "
            f"(B, {num_classes}), got {tuple(targets.shape)} of {targets.dtype}"
        )
    return soft if smoothing == 0.0 else soft * (1 - smoothing) + smoothing / num_classes


def least_cross_entropy(num_classes: int, smoothing: float) -> float:
    """Cross-entropy, in nats, of a perfect prediction of a smoothed label: the label's entropy.

    Args:
        num_classes: C.
        smoothing: s of :func:`smooth_targets`, in [0, 1).

    Example:
        >>> round(least_cross_entropy(num_classes=1000, smoothing=0.1), 2)
        1.01
    """
    other = smoothing / num_classes
    own = 1 - smoothing + other
    return -own * math.log(own) - (num_classes - 1) * other * math.log(other or 1)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with soft targets, mean over the batch, in float32.

    Args:
        logits: ``(B, C)``.
        targets: ``(B, C)``, rows sum to 1.

    Returns:
        Scalar, in nats.

    Raises:
        InputError: shapes that differ.

    Example:
        >>> soft_cross_entropy(torch.zeros(1, 4), torch.full((1, 4), 0.25))
        tensor(1.3863)
    """
    return soft_cross_entropy_per_sample(logits, targets).mean()


def soft_cross_entropy_per_sample(logits: Tensor, targets: Tensor) -> Tensor:
    """:func:`soft_cross_entropy` before the mean: ``(B,)`` (difficulty, TokenMixup Eq. 1).

    Example:
        >>> soft_cross_entropy_per_sample(torch.zeros(2, 4), torch.eye(4)[:2])
        tensor([1.3863, 1.3863])
    """
    if logits.shape != targets.shape:
        raise InputError(
            "expected `logits` and `targets` of one shape (B, C), "
            f"got {tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return -(targets.to(dtype) * logits.to(dtype).log_softmax(-1)).sum(-1)


def _require(condition: Tensor, message: Callable[[], str]) -> None:
    """Raise on the CPU; assert without synchronising elsewhere."""
    if condition.device.type != "cpu":
        torch._assert_async(condition, "vitmix: labels or maps out of range")
    elif not bool(condition):
        raise InputError(message())
