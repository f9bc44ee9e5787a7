"""timm's Swin transformers: attention within shifted windows, tokens merged between stages.

``SwinTransformer``, ``SwinTransformerV2`` and ``SwinTransformerV2Cr``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from vitmix.backbones.base import Backbone, Block, is_made_by
from vitmix.backbones.staged import WINDOWED, average_reason
from vitmix.backbones.timm_parts import grid_of, patch_of
from vitmix.functional.grids import Grid
from vitmix.functional.reach import Reach, windows

__all__ = ["LOOKS_FOR", "describe"]

LOOKS_FOR = "timm SwinTransformer, SwinTransformerV2 or SwinTransformerV2Cr"

# Where stages are, and whether the norm works in front of the attention.
_MODELS = {
    "SwinTransformer": ("timm.models.swin_transformer", "layers", True),
    "SwinTransformerV2": ("timm.models.swin_transformer_v2", "layers", False),
    "SwinTransformerV2Cr": ("timm.models.swin_transformer_v2_cr", "stages", False),
}


def describe(model: nn.Module) -> Backbone | None:
    """Describe a timm Swin transformer; None if the model is something else."""
    for name, (module, stages, norm_first) in _MODELS.items():
        if is_made_by(model, module, name):
            return _describe(name, model, getattr(model, stages), norm_first)
    return None


def _describe(name: str, swin: Any, stages: Any, norm_first: bool) -> Backbone:
    blocks = [
        Block(
            module=block,
            entry=block.norm1 if norm_first else block.attn,
            attention=block.attn,
            layout="channels_last",
            stride=2**level,
            width=int(block.dim),
            reach=partial(_reach, block),
        )
        for level, stage in enumerate(stages)
        for block in stage.blocks
    ]
    return Backbone(
        family=f"timm {name}",
        blocks=tuple(blocks),
        embed_dim=int(stages[0].blocks[0].dim),
        num_prefix_tokens=0,
        class_token=False,
        pooling="average",
        grid=grid_of(swin.patch_embed),
        patch=patch_of(swin.patch_embed),
        recomputes=partial(_recomputes, stages),
        alignment_reason=average_reason(swin.head.global_pool.pool_type),
        vertical_reason=WINDOWED,
    )


def _recomputes(stages: Any) -> bool:
    return any(getattr(stage, "grad_checkpointing", False) for stage in stages)


def _reach(block: Any, grid: Grid) -> Reach:
    return Reach(grid, windows=windows(grid, tuple(block.window_size), tuple(block.shift_size)))
