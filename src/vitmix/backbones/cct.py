"""Compact Convolutional Transformers of ``vitmix.models``."""

from __future__ import annotations

from typing import Any

from torch import nn

from vitmix.backbones.base import Backbone, Block, is_made_by

__all__ = ["LOOKS_FOR", "describe"]

LOOKS_FOR = "vitmix.models.cct.CCT"


def describe(model: nn.Module) -> Backbone | None:
    """Describe a CCT; None if the model is something else."""
    if not is_made_by(model, "vitmix.models.cct", "CCT"):
        return None
    cct: Any = model
    classifier = cct.classifier
    return Backbone(
        family="CCT",
        blocks=tuple(
            Block(module=block, entry=block.pre_norm, attention=block.self_attn)
            for block in classifier.blocks
        ),
        embed_dim=cct.embed_dim,
        num_prefix_tokens=0,
        class_token=False,
        pooling="sequence",
        grid=cct.grid_size,
        pool_scores=classifier.attention_pool,
    )
