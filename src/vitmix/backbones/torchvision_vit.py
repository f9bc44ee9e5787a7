"""torchvision's ``VisionTransformer`` (``vit_b_16`` ...)."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from vitmix.backbones.base import Backbone, Block, is_made_by
from vitmix.backbones.grids import whole_patches

__all__ = ["LOOKS_FOR", "describe"]

LOOKS_FOR = "torchvision VisionTransformer"


def describe(model: nn.Module) -> Backbone | None:
    """Describe a torchvision VisionTransformer; None if the model is something else."""
    if not is_made_by(model, "torchvision.models.vision_transformer", "VisionTransformer"):
        return None
    vit: Any = model
    return Backbone(
        family="torchvision VisionTransformer",
        blocks=tuple(
            Block(module=layer, entry=layer.ln_1, attention=layer.self_attention)
            for layer in vit.encoder.layers
        ),
        embed_dim=int(vit.hidden_dim),
        num_prefix_tokens=1,
        class_token=True,
        pooling="class_token",
        grid=partial(whole_patches, (vit.patch_size, vit.patch_size)),
    )
