"""torchvision's ``MaxVit`` (``maxvit_t``): attention within windows and over dilated grids."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from vitmix.backbones.base import Backbone, Block, is_made_by
from vitmix.backbones.staged import WINDOWED, reduce_by
from vitmix.functional.grids import Grid
from vitmix.functional.reach import Reach, windows

__all__ = ["LOOKS_FOR", "describe"]

LOOKS_FOR = "torchvision MaxVit"


def describe(model: nn.Module) -> Backbone | None:
    """Describe a torchvision MaxVit; None if the model is something else."""
    if not is_made_by(model, "torchvision.models.maxvit", "MaxVit"):
        return None
    maxvit: Any = model
    blocks = [
        _block(part, level)
        for level, stage in enumerate(maxvit.blocks)
        for layer in stage.layers
        for part in (layer.layers.window_attention, layer.layers.grid_attention)
    ]
    return Backbone(
        family="torchvision MaxVit",
        blocks=tuple(blocks),
        embed_dim=blocks[0].width or 0,
        num_prefix_tokens=0,
        class_token=False,
        pooling="average",
        # The stem halves the image, and the first convolution of every stage its grid.
        grid=partial(reduce_by, stride=4),
        vertical_reason=WINDOWED,
    )


def _block(part: Any, level: int) -> Block:
    norm, attention, _ = part.attn_layer
    return Block(
        module=part,
        entry=norm,
        attention=attention,
        layout="channels_first",
        stride=2**level,
        width=attention.n_heads * attention.head_dim,
        reach=partial(_reach, part),
    )


def _reach(part: Any, grid: Grid) -> Reach:
    """A partition is ``p`` tokens a side, or takes every ``p``-th token of the grid."""
    dilated = part.partition_type == "grid"
    side = (grid[0] // part.p, grid[1] // part.p) if dilated else (part.p, part.p)
    return Reach(grid, windows=windows(grid, side, dilated=dilated))
