"""What a ``MixingModel`` refuses, or warns of, before it touches a model; and of a step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vitmix.backbones import Backbone
from vitmix.errors import InputError, UnsupportedModelError
from vitmix.labels import LabelRule
from vitmix.tokens import HorizontalTokenMixup, TokenMixer, TokenStage, VerticalTokenMixup

__all__ = [
    "require_fit",
    "require_kind",
    "require_logits",
    "require_maps",
    "warn_of_smoothing",
]


def require_kind(name: str, value: object, kinds: tuple[type, ...]) -> None:
    """Check what an argument is.

    Raises:
        InputError: an object of another kind.
    """
    if not isinstance(value, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise InputError(f"expected `{name}` as {expected}, got {type(value).__name__}")


def require_fit(
    backbone: Backbone, labels: LabelRule, stages: Sequence[TokenStage], num_classes: int
) -> None:
    """Check that a model takes a label rule and token stages, and that these go together.

    Raises:
        UnsupportedModelError: something in the model that cannot be followed.
        InputError: a stage that has no place in it, or not beside the others; or a teacher of
            another number of classes.
    """
    if labels.num_classes not in (None, num_classes):
        raise InputError(
            f"expected a teacher of the same {num_classes} classes, got one of "
            f"{labels.num_classes}; one that has them among others is given as a function of "
            "images and classes"
        )
    for stage in stages:
        require_kind("tokens", stage, (TokenMixer, VerticalTokenMixup))
        for block in stage.blocks:
            backbone.require_block(f"`block` of {type(stage).__name__}", block)
        if isinstance(stage, VerticalTokenMixup):
            if backbone.vertical_reason:
                raise UnsupportedModelError(
                    "looked for attention that takes tokens without a place in the image, found "
                    f"{backbone.vertical_reason}. The model was not changed."
                )
            _require_earlier(stage, backbone)
        if isinstance(stage, HorizontalTokenMixup):
            _require_unattached(stage)
            if stage.saliency == "rollout":
                backbone.require_block("the last block of a rollout", stage.last_block)
                backbone.require_one_stage(stage.block, stage.last_block)
    reads = not labels.known_before_forward or any(stage.reads_attention for stage in stages)
    if stages or reads:
        backbone.require_tokens(attention=reads)
    if labels.attention_block is not None:
        backbone.require_block(f"`block` of {type(labels).__name__}", labels.attention_block)
    if labels.follows_shares and backbone.alignment_reason:
        raise UnsupportedModelError(
            f"looked for a pooling that {type(labels).__name__} can follow, found "
            f"{backbone.alignment_reason}. The model was not changed."
        )
    _require_apart(stages)
    if len(set(stages)) < len(stages):
        raise InputError("expected each token stage once in `tokens`, got one twice")


def _require_earlier(stage: VerticalTokenMixup, backbone: Backbone) -> None:
    target = stage.blocks[0]
    if not any(backbone.stage(index) == backbone.stage(target) for index in range(target)):
        first = [
            index
            for index in range(1, backbone.depth)
            if backbone.stage(index) == backbone.stage(index - 1)
        ]
        raise InputError(
            "expected `block` of VerticalTokenMixup with an earlier block of its own stage to "
            f"collect tokens from ({', '.join(map(str, first))}), got {target}"
        )


def _require_unattached(stage: HorizontalTokenMixup) -> None:
    if stage.scorenet is not None:
        raise InputError(
            "expected a HorizontalTokenMixup of its own for each MixingModel, "
            "got one whose ScoreNet belongs to another"
        )


def _require_apart(stages: Sequence[TokenStage]) -> None:
    """Check that what a stage that mixes did can be told by its kind and its block."""
    taken: set[tuple[str, int]] = set()
    for stage in dict.fromkeys(stages):
        places = {(stage.short_name, block) for block in stage.blocks}
        if isinstance(stage, TokenMixer) and taken & places:
            raise InputError(
                f"expected one {type(stage).__name__} a block, "
                f"got two that may act at block {min(taken & places)[1]}"
            )
        taken |= places


def warn_of_smoothing(stage: TokenStage, least: float) -> None:
    """Warn of a ``tau`` that no sample is below.

    Args:
        stage: any token stage.
        least: entropy of a smoothed label in nats, below which no cross-entropy is.
    """
    tau = stage.tau if isinstance(stage, HorizontalTokenMixup) else math.inf
    if not isinstance(tau, str) and 0 < tau <= least:
        warnings.warn(
            f"HorizontalTokenMixup(block={stage.blocks[0]}) will mix no sample: with this label "
            f"smoothing no cross-entropy is below {least:.3g}, and tau is {tau:.3g}. Raise tau, "
            "let it follow the batches (tau='auto:0.5'), or smooth less",
            stacklevel=3,
        )


def require_maps(labels: LabelRule, maps: Tensor | None, count: int) -> None:
    """Check the activation maps that a step is given for ``count`` images.

    Raises:
        InputError: none where the rule needs them, some where it does not, or another shape.
    """
    rule = type(labels).__name__
    if (maps is not None) != labels.needs_maps:
        raise InputError(
            f"expected `maps` in each step for the stored maps of {rule}, got none"
            if maps is None
            else f"expected no `maps`, which {rule} has no use for; leave them out"
        )
    if maps is None:
        return
    rows = maps.ndim == 1 and not (maps.is_floating_point() or maps.dtype == torch.bool)
    if not (rows or maps.ndim == 3) or len(maps) != count:
        raise InputError(
            f"expected `maps` ({count}, h, w), or rows ({count},) of whole numbers, "
            f"got {tuple(maps.shape)} {maps.dtype}"
        )


def require_logits(logits: Any, num_classes: int) -> None:
    """Check the logits of a model, or of both its heads.

    Raises:
        InputError: no logits, or those of another number of classes.
    """
    for head in logits if isinstance(logits, tuple) else (logits,):
        if not isinstance(head, Tensor) or head.ndim != 2 or head.shape[1] != num_classes:
            found = tuple(head.shape) if isinstance(head, Tensor) else type(head).__name__
            raise InputError(
                f"expected logits (B, {num_classes}) from the model, got {found}; "
                "num_classes must be that of the model's classifier"
            )
