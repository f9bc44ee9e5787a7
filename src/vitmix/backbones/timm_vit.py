"""timm's ``VisionTransformer``: ViT, DeiT (plain and distilled), registers, average pooling."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from torch import nn

from vitmix.backbones.base import Backbone, Block, Pooling
from vitmix.errors import UnsupportedModelError

__all__ = ["LOOKS_FOR", "describe"]

LOOKS_FOR = "timm.models.vision_transformer.VisionTransformer"

_POOLING: dict[str, Pooling] = {"token": "class_token", "avg": "average"}
_BLOCKS = ("Block", "ResPostBlock", "ParallelScalingBlock")


def describe(model: nn.Module) -> Backbone | None:
    """Describe a timm VisionTransformer; None if the model is something else."""
    library = sys.modules.get("timm.models.vision_transformer")
    if library is None or not isinstance(model, library.VisionTransformer):
        return None
    vit: Any = model
    for index, block in enumerate(vit.blocks):
        if type(block).__name__ not in _BLOCKS:
            raise UnsupportedModelError(
                f"looked for blocks with one attention each ({', '.join(_BLOCKS)}) in timm's "
                f"VisionTransformer, found {type(block).__name__} at block {index}. "
                "The model was not changed."
            )
    if getattr(vit.patch_drop, "prob", 0.0):
        raise UnsupportedModelError(
            f"looked for a model that keeps all its tokens, found patch_drop_rate="
            f"{vit.patch_drop.prob}: dropped patches cannot be matched between samples. "
            "Create the model with patch_drop_rate=0. The model was not changed."
        )
    prefix = int(vit.num_prefix_tokens)
    pooling, reason = _pooling(vit)
    return Backbone(
        family="timm VisionTransformer",
        blocks=tuple(_block(block) for block in vit.blocks),
        embed_dim=int(vit.embed_dim),
        num_prefix_tokens=prefix,
        class_token=bool(vit.has_class_token),
        pooling=pooling,
        grid=partial(_grid, vit.patch_embed),
        pool_prefix=bool(getattr(vit, "pool_include_prefix", False)),
        recomputes=partial(getattr, model, "grad_checkpointing", False),
        alignment_reason=reason,
    )


def _block(block: Any) -> Block:
    if type(block).__name__ == "Block":
        return Block(module=block, entry=block.norm1, attention=block.attn)
    if type(block).__name__ == "ResPostBlock":
        return Block(module=block, entry=block.attn, attention=block.attn)
    return Block(module=block, entry=block, attention=block)


def _pooling(vit: Any) -> tuple[Pooling, str | None]:
    if hasattr(vit, "dist_token"):
        return "distilled", None
    if vit.attn_pool is not None:
        return "attention", None
    if vit.global_pool == "avg" and getattr(vit, "pool_include_prefix", False):
        return "average_all", None
    if vit.global_pool in _POOLING:
        return _POOLING[vit.global_pool], None
    return "average", (
        f"pooling {vit.global_pool!r} is not a weighted mean of tokens; "
        "use global_pool='token', 'avg' or 'map'"
    )


def _grid(patch_embed: Any, size: tuple[int, int]) -> tuple[int, int]:
    if patch_embed.img_size is None or not patch_embed.strict_img_size:
        rows, columns = patch_embed.dynamic_feat_size(size)
    else:
        rows, columns = patch_embed.grid_size
    return int(rows), int(columns)
