"""timm's plain transformers whose attention knows positions.

``Eva`` (EVA, EVA-02, DINOv3, Perception Encoder: rotary embeddings), ``Beit`` and
``VisionTransformerRelPos`` (relative position bias), and the image encoders of language models with
a classifier: ``DeepseekVitClassifier``, ``Gemma4VitClassifier``, ``Qwen3VitClassifier`` (rotary).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from vitmix.backbones.base import GIVEN, Backbone, Reason, is_made_by
from vitmix.backbones.grids import whole_patches
from vitmix.backbones.timm_parts import (
    ROTARY,
    blocks_of,
    dropped,
    grid_of,
    patch_of,
    pooling_of,
)

__all__ = ["LOOKS_FOR", "describe"]

LOOKS_FOR = (
    "timm Eva, Beit, VisionTransformerRelPos, DeepseekVitClassifier, Gemma4VitClassifier or "
    "Qwen3VitClassifier"
)

_BIASED = (
    "relative position bias: a token that is put behind the others has no place in the image to "
    "take a bias for"
)
_MODELS = {
    "Eva": "timm.models.eva",
    "Beit": "timm.models.beit",
    "VisionTransformerRelPos": "timm.models.vision_transformer_relpos",
}
_CLASSIFIERS = {
    "DeepseekVitClassifier": "timm.models.deepseek_vit",
    "Gemma4VitClassifier": "timm.models.gemma4_vit",
    "Qwen3VitClassifier": "timm.models.qwen3_vit",
}


def describe(model: nn.Module) -> Backbone | None:
    """Describe a model whose attention knows positions; None if the model is something else."""
    for name, module in _MODELS.items():
        if is_made_by(model, module, name):
            return _describe(f"timm {name}", model)
    for name, module in _CLASSIFIERS.items():
        if is_made_by(model, module, name):
            return _describe_classifier(f"timm {name}", model)
    return None


def _describe(family: str, vit: Any) -> Backbone:
    pooling, reason = pooling_of(vit)
    return Backbone(
        family=family,
        blocks=blocks_of(family, vit.blocks),
        embed_dim=int(vit.embed_dim),
        num_prefix_tokens=int(vit.num_prefix_tokens),
        class_token=vit.cls_token is not None,
        pooling=pooling,
        grid=grid_of(vit.patch_embed),
        patch=patch_of(vit.patch_embed),
        recomputes=partial(getattr, vit, "grad_checkpointing", False),
        alignment_reason=reason,
        vertical_reason=_position(vit),
        tokens_reason=dropped(getattr(getattr(vit, "patch_drop", None), "prob", 0.0)),
        rollout_reason=GIVEN if _shares_position(vit) else None,
    )


def _describe_classifier(family: str, model: Any) -> Backbone:
    # Tokens merged cell by cell ("merge", "soft") still count alike in the average of all cells.
    pooling, reason = pooling_of(model)
    if model.encoder_pool == "align":
        reason = (
            "encoder_pool='align', whose cells at the border hold fewer tokens than others; "
            "use encoder_pool=''"
        )
    encoder = model.encoder
    grid = (
        grid_of(encoder.patch_embed)
        if hasattr(encoder.patch_embed, "dynamic_feat_size")
        else partial(whole_patches, tuple(encoder.patch_size))
    )
    return Backbone(
        family=family,
        blocks=blocks_of(family, encoder.blocks),
        embed_dim=int(encoder.embed_dim),
        num_prefix_tokens=0,
        class_token=False,
        pooling=pooling,
        grid=grid,
        recomputes=partial(getattr, encoder, "grad_checkpointing", False),
        alignment_reason=reason,
        vertical_reason=ROTARY,
        rollout_reason=GIVEN,
    )


def _position(vit: Any) -> Reason:
    if _shares_position(vit):
        return ROTARY if getattr(vit, "rope", None) is not None else _BIASED
    for block in vit.blocks:
        own = (
            getattr(block.attn, name, None) for name in ("relative_position_bias_table", "rel_pos")
        )
        if any(bias is not None for bias in own):
            return _BIASED
    return None


def _shares_position(vit: Any) -> bool:
    """Whether the model tells all its blocks where tokens are."""
    names = ("rope", "rel_pos_bias", "shared_rel_pos")
    return any(getattr(vit, name, None) is not None for name in names)
