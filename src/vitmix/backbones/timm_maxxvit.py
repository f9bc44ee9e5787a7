"""timm's ``MaxxVit``: CoAtNet, MaxViT and their relatives.

Global attention on maps whose first block of a stage merges tokens, or attention within windows,
by turns of neighbouring and of distant tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from vitmix.backbones.base import Backbone, Block, Layout, is_made_by
from vitmix.backbones.staged import (
    BIASED,
    WINDOWED,
    average_reason,
    grid_by,
    recomputes_of,
    reduce_by,
    staged_blocks,
    stages_of,
    width_of,
)
from vitmix.errors import UnsupportedModelError
from vitmix.functional.grids import Grid
from vitmix.functional.reach import Reach, windows

__all__ = ["LOOKS_FOR", "describe"]

LOOKS_FOR = "timm MaxxVit"


def describe(model: nn.Module) -> Backbone | None:
    """Describe a timm MaxxVit; None if the model is something else."""
    if not is_made_by(model, "timm.models.maxxvit", "MaxxVit"):
        return None
    maxxvit: Any = model
    blocks, pixels = staged_blocks(stages_of(model), _block)
    return Backbone(
        family="timm MaxxVit",
        blocks=blocks,
        embed_dim=int(maxxvit.num_features),
        num_prefix_tokens=0,
        class_token=False,
        pooling="average",
        grid=grid_by(pixels),
        recomputes=recomputes_of(model),
        alignment_reason=average_reason(maxxvit.head.global_pool.pool_type),
        vertical_reason=WINDOWED if any(block.reach for block in blocks[1:]) else BIASED,
    )


def _block(module: Any) -> Block | None:
    kind = type(module).__name__
    if kind == "ParallelPartitionAttention":
        raise UnsupportedModelError(
            "looked for one attention a block in timm MaxxVit, found one within windows beside "
            "one to distant tokens (ParallelPartitionAttention). The model was not changed."
        )
    if kind == "TransformerBlock2d" and hasattr(module.norm1, "down"):
        return _made(module, "channels_first", _merging, stride=2)
    if kind == "TransformerBlock2d":
        return _made(module, "channels_first", None)
    if kind in ("PartitionAttentionCl", "PartitionAttention2d"):
        layout: Layout = "channels_last" if kind == "PartitionAttentionCl" else "channels_first"
        return _made(module, layout, partial(_partition, module))
    return None


def _made(
    module: Any, layout: Layout, reach: Callable[[Grid], Reach] | None, stride: int = 1
) -> Block:
    return Block(
        module=module,
        entry=module.norm1,
        attention=module.attn,
        layout=layout,
        stride=stride,
        width=width_of(module.norm1),
        reach=reach,
    )


def _merging(grid: Grid) -> Reach:
    """Tokens are merged in front of the attention, and beside it."""
    merged = reduce_by(grid, 2)
    return Reach(grid, keys=merged, queries=merged)


def _partition(block: Any, grid: Grid) -> Reach:
    size = tuple(block.partition_size)
    return Reach(grid, windows=windows(grid, size, dilated=not block.partition_block))
