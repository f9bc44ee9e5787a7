"""Horizontal TokenMixup: replace tokens by more salient ones (TokenMixup, Eq. 8 to 11)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vitmix.errors import InputError
from vitmix.functional.matching import optimal_partners
from vitmix.functional.precision import wide

__all__ = ["HorizontalPlan", "apply_horizontal", "horizontal_plan", "mix_targets", "mix_tokens"]


class HorizontalPlan(NamedTuple):
    """What horizontal mixing does to a batch, in the batch's own order.

    Attributes:
        partner: ``(B,)`` int64, the sample whose tokens are mixed in; itself for a hard sample.
        replace: ``(B, N)`` bool, True where a token is replaced by the partner's.
        own_weight: ``(B,)`` weight of the own label, in [0, 1]; 1 for a hard sample.
    """

    partner: Tensor
    replace: Tensor
    own_weight: Tensor


def horizontal_plan(
    saliency: Tensor,
    easy: Tensor,
    rho: float | Tensor,
    *,
    candidates: Tensor | None = None,
    assignment: str = "exact",
    relabel: Literal["saliency", "area"] = "saliency",
) -> HorizontalPlan:
    """Decide pairs, tokens and label weights of horizontal mixing (TokenMixup, Eq. 8, 9 and 11).

    The released code takes every mask against the saliency of the first easy sample; here each is
    taken against the sample's own, as Eq. 9 says. ``replace`` is True where Eq. 9's mask is 0.

    Args:
        saliency: ``(B, N)``.
        easy: ``(B,)`` bool, the samples to be mixed. Partners come from the whole batch.
        rho: least gain for which a token is replaced, in units of saliency.
        candidates: ``(B,)`` int64 partners given beforehand (the ablation without optimal
            assignment); by default found by ``assignment``.
        assignment: how, see :func:`vitmix.functional.optimal_partners`.
        relabel: ``"saliency"`` weighs labels by the saliency of kept and replaced tokens (Eq. 11),
            ``"area"`` by their number (ablation).

    Returns:
        The plan, for :func:`apply_horizontal`.

    Raises:
        InputError: shapes that don't fit, or an unknown ``relabel`` or ``assignment``.

    Example:
        >>> plan = horizontal_plan(
        ...     torch.tensor([[0.8, 0.2], [0.1, 0.9]]), torch.tensor([True, False]), rho=0.1
        ... )
        >>> plan.partner, plan.replace[0], plan.own_weight
        (tensor([1, 1]), tensor([False,  True]), tensor([0.4706, 1.0000]))
    """
    if saliency.ndim != 2 or easy.shape != saliency.shape[:1]:
        raise InputError(
            "expected `saliency` (B, N) and `easy` (B,), "
            f"got {tuple(saliency.shape)} and {tuple(easy.shape)}"
        )
    if relabel not in ("saliency", "area"):
        raise InputError(f"expected `relabel` 'saliency' or 'area', got {relabel!r}")
    saliency, easy = wide(saliency), easy.bool()
    if candidates is None:
        partner = optimal_partners(saliency, easy, rho, assignment)
    else:
        partner = torch.where(easy, candidates, torch.arange(len(easy), device=easy.device))
    other = saliency[partner]
    replace = (other - saliency > rho) & easy[:, None]
    ones = torch.ones_like(saliency)
    own, mixed_in = (saliency, other) if relabel == "saliency" else (ones, ones)
    kept = torch.where(replace, 0, own).sum(1)
    total = kept + torch.where(replace, mixed_in, 0).sum(1)
    area = 1.0 - replace.to(saliency.dtype).mean(1)
    own_weight = torch.where(total > 0, kept / total, area)
    own_weight = torch.where(replace.any(1), own_weight, torch.ones_like(own_weight))
    return HorizontalPlan(partner, replace, own_weight)


def apply_horizontal(
    tokens: Tensor, targets: Tensor, plan: HorizontalPlan, *, num_prefix_tokens: int = 0
) -> tuple[Tensor, Tensor]:
    """Carry out a plan: replace tokens (TokenMixup, Eq. 10) and mix targets (Eq. 11).

    Partners are read from the unmixed batch. Prefix tokens are kept.

    Args:
        tokens: ``(B, num_prefix_tokens + N, D)``.
        targets: ``(B, C)``.
        plan: of :func:`horizontal_plan`.
        num_prefix_tokens: tokens in front that stand for no image region.

    Returns:
        Mixed tokens and mixed targets, both new, in the batch's own order.

    Raises:
        InputError: tokens and plan don't fit.

    Example:
        >>> plan = HorizontalPlan(
        ...     torch.tensor([1, 1]),
        ...     torch.tensor([[True, False], [False, False]]),
        ...     torch.tensor([0.5, 1.0]),
        ... )
        >>> tokens, targets = apply_horizontal(torch.arange(4.0).view(2, 2, 1), torch.eye(2), plan)
        >>> tokens[0, :, 0], targets[0]
        (tensor([2., 1.]), tensor([0.5000, 0.5000]))
    """
    mixed = mix_tokens(tokens, plan, num_prefix_tokens=num_prefix_tokens)
    return mixed, mix_targets(targets, plan.partner, plan.own_weight)


def mix_tokens(tokens: Tensor, plan: HorizontalPlan, *, num_prefix_tokens: int = 0) -> Tensor:
    """Replace tokens as planned (TokenMixup, Eq. 10): the first half of :func:`apply_horizontal`.

    Returns:
        ``(B, num_prefix_tokens + N, D)``.

    Raises:
        InputError: tokens and plan don't fit.
    """
    expected = (len(plan.partner), plan.replace.shape[1] + num_prefix_tokens)
    if tokens.shape[:2] != expected:
        raise InputError(
            f"expected `tokens` of shape ({expected[0]}, {expected[1]}, D) for this plan and "
            f"{num_prefix_tokens} prefix tokens, got {tuple(tokens.shape)}"
        )
    batch, count, width = tokens.shape
    replace = torch.nn.functional.pad(plan.replace, (num_prefix_tokens, 0))
    own = torch.arange(batch, device=tokens.device)[:, None]
    sample = torch.where(replace, plan.partner[:, None], own)
    rows = sample * count + torch.arange(count, device=tokens.device)
    # One gather of whole rows: several times faster, back and forth, than a gather of samples
    # followed by a choice between two tensors.
    flat = tokens.reshape(batch * count, width).index_select(0, rows.flatten())
    return flat.view(batch, count, width)


def mix_targets(targets: Tensor, partner: Tensor, own_weight: Tensor) -> Tensor:
    """``own_weight * targets + (1 - own_weight) * targets[partner]`` (TokenMixup, Eq. 11).

    Args:
        targets: ``(B, C)``.
        partner: ``(B,)`` int64.
        own_weight: ``(B,)``.

    Returns:
        ``(B, C)``.

    Example:
        >>> mix_targets(torch.eye(2), torch.tensor([1, 1]), torch.tensor([0.75, 1.0]))
        tensor([[0.7500, 0.2500],
                [0.0000, 1.0000]])
    """
    own = own_weight.to(targets.dtype)[:, None]
    return own * targets + (1 - own) * targets[partner]
