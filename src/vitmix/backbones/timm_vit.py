"""timm's ``VisionTransformer`` and ``NaFlexVit``.

ViT, DeiT (plain and distilled), hybrids with a convolutional stem, registers, average and attention
pooling; NaFlexVit with images ``(B, C, H, W)``, where all samples have one token grid.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from vitmix.backbones.base import GIVEN, Backbone, is_made_by
from vitmix.backbones.timm_parts import (
    ROTARY,
    blocks_of,
    dropped,
    grid_of,
    patch_of,
    pooling_of,
)

__all__ = ["LOOKS_FOR", "describe"]

LOOKS_FOR = "timm VisionTransformer or NaFlexVit"


def describe(model: nn.Module) -> Backbone | None:
    """Describe a timm VisionTransformer or NaFlexVit; None if the model is something else."""
    if is_made_by(model, "timm.models.vision_transformer", "VisionTransformer"):
        return _describe("timm VisionTransformer", model)
    if is_made_by(model, "timm.models.naflexvit", "NaFlexVit"):
        return _describe("timm NaFlexVit", model)
    return None


def _describe(family: str, vit: Any) -> Backbone:
    pooling, reason = pooling_of(vit)
    patch_embed = vit.embeds if family == "timm NaFlexVit" else vit.patch_embed
    rotary = getattr(vit, "rope", None) is not None
    return Backbone(
        family=family,
        blocks=blocks_of(family, vit.blocks),
        embed_dim=int(vit.embed_dim),
        num_prefix_tokens=int(vit.num_prefix_tokens),
        class_token=bool(vit.has_class_token),
        pooling=pooling,
        grid=grid_of(patch_embed),
        patch=patch_of(patch_embed),
        recomputes=partial(getattr, vit, "grad_checkpointing", False),
        alignment_reason=reason,
        vertical_reason=ROTARY if rotary else None,
        tokens_reason=dropped(getattr(vit.patch_drop, "prob", 0.0)),
        rollout_reason=GIVEN if rotary else None,
    )
