"""torchvision's ``SwinTransformer`` (``swin_t``, ``swin_v2_t`` ...)."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from vitmix.backbones.base import Backbone, Block, is_made_by
from vitmix.backbones.grids import whole_patches
from vitmix.backbones.staged import WINDOWED
from vitmix.functional.grids import Grid
from vitmix.functional.reach import Reach, windows

__all__ = ["LOOKS_FOR", "describe"]

LOOKS_FOR = "torchvision SwinTransformer"
_MODULE = "torchvision.models.swin_transformer"


def describe(model: nn.Module) -> Backbone | None:
    """Describe a torchvision SwinTransformer; None if the model is something else."""
    if not is_made_by(model, _MODULE, "SwinTransformer"):
        return None
    swin: Any = model
    convolution = swin.features[0][0]
    # Behind the patch embedding come stages and, between them, layers that merge tokens.
    stages = swin.features[1::2]
    return Backbone(
        family="torchvision SwinTransformer",
        blocks=tuple(
            Block(
                module=block,
                entry=block.attn if _norm_last(block) else block.norm1,
                attention=block.attn,
                layout="channels_last",
                stride=2**level,
                width=convolution.out_channels * 2**level,
                reach=partial(_reach, block.attn),
            )
            for level, stage in enumerate(stages)
            for block in stage
        ),
        embed_dim=convolution.out_channels,
        num_prefix_tokens=0,
        class_token=False,
        pooling="average",
        grid=partial(whole_patches, convolution.stride),
        vertical_reason=WINDOWED,
    )


def _norm_last(block: nn.Module) -> bool:
    return is_made_by(block, _MODULE, "SwinTransformerBlockV2")


def _reach(attention: Any, grid: Grid) -> Reach:
    """Windows of a padded grid, which is not rolled along an axis that one window covers."""
    window = tuple(attention.window_size)
    shift = tuple(
        0 if side >= length else step
        for side, length, step in zip(window, grid, attention.shift_size, strict=True)
    )
    return Reach(grid, windows=windows(grid, window, shift, pad_first=True))
