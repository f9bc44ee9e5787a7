"""timm's hierarchical models that attend within windows, besides Swin and MaxViT.

NesT, Hiera, SAM 2's HieraDet, GC ViT, DaViT, TinyViT and EfficientViT (MSRA). The attention between
channels of DaViT moves no token, and counts as part of the MLP.
"""

from __future__ import annotations

from functools import partial
from math import isqrt
from typing import Any

import torch
from torch import nn

from vitmix.backbones.base import Backbone, Block, Reason
from vitmix.backbones.staged import (
    WINDOWED,
    Located,
    StagedFamily,
    attends,
    describe_staged,
    in_stages,
    in_windows,
    to_reduced,
)
from vitmix.backbones.timm_parts import dropped
from vitmix.backbones.units import unit_blocks
from vitmix.functional.grids import Grid
from vitmix.functional.reach import Reach, windows

__all__ = ["LOOKS_FOR", "describe"]


def describe(model: nn.Module) -> Backbone | None:
    """Describe one of timm's windowed models; None if the model is something else."""
    return describe_staged(_FAMILIES, model)


def _gcvit(module: Any) -> Block | None:
    if type(module).__name__ != "GlobalContextVitBlock":
        return None
    return attends(module, layout="channels_last", reach=partial(in_windows, module.window_size))


def _davit(module: Any) -> Block | None:
    if type(module).__name__ != "SpatialBlock":
        return None
    return attends(module, layout="channels_first", reach=partial(in_windows, module.window_size))


def _tinyvit(module: Any) -> Block | None:
    if type(module).__name__ != "TinyVitBlock":
        return None
    reach = partial(in_windows, (module.window_size, module.window_size))
    return attends(module, "attn.norm", layout="channels_last", reach=reach)


def _efficientvit(module: Any) -> Block | None:
    """Heads follow one another, each on channels of its own and what the one before made."""
    if type(module).__name__ != "EfficientVitBlock":
        return None
    local = module.mixer.m
    return attends(
        module,
        "mixer.m",
        "mixer.m",
        layout="channels_first",
        reach=partial(in_windows, (local.attn.resolution, local.attn.resolution)),
        width=local.dim,
        attentions=local.attn.num_heads,
        heads=1,
    )


def _nest(model: Any) -> Located:
    for index, level in enumerate(model.levels):
        size = (level.block_size, level.block_size)
        side = isqrt(level.pos_embed.shape[1]) * level.block_size
        for layer in level.transformer_encoder:
            block = attends(
                layer,
                layout="windows",
                order=windows((side, side), size).flatten(),
                heads_first=True,
                reach=partial(in_windows, size),
            )
            yield block, model.patch_size * 2**index


def _hiera(model: Any) -> Located:
    height, width = model.tokens_spatial_shape
    order = model.unroll(torch.arange(height * width).view(1, -1, 1)).flatten()
    return unit_blocks(model.blocks, order, width, int(model.patch_stride[0]))


def _hiera_reason(model: Any) -> Reason:
    return dropped(model.patch_drop_rate)


def _hieradet(model: Any) -> Located:
    pixels = int(model.patch_embed.proj.stride[0])
    for module in model.blocks:
        stride = module.q_stride[0] if module.q_stride else 1
        reach = partial(_pooled, module.window_size, stride)
        pixels *= stride
        yield attends(module, layout="channels_last", stride=stride, reach=reach), pixels


def _pooled(size: Grid, stride: int, grid: Grid) -> Reach:
    """Queries are merged within windows."""
    if not any(size):
        return to_reduced(1, stride, grid)
    merged = (grid[0] // stride, grid[1] // stride)
    queries = windows(merged, (size[0] // stride, size[1] // stride))
    return Reach(grid, windows=windows(grid, size), queries=merged, query_windows=queries)


_FAMILIES = {
    "Nest": StagedFamily("timm.models.nest", _nest, WINDOWED),
    "Hiera": StagedFamily("timm.models.hiera", _hiera, WINDOWED, tokens=_hiera_reason),
    "HieraDet": StagedFamily("timm.models.hieradet_sam2", _hieradet, WINDOWED),
    "GlobalContextVit": StagedFamily("timm.models.gcvit", in_stages(_gcvit), WINDOWED),
    "DaVit": StagedFamily("timm.models.davit", in_stages(_davit), WINDOWED),
    "TinyVit": StagedFamily("timm.models.tiny_vit", in_stages(_tinyvit), WINDOWED),
    "EfficientVitMsra": StagedFamily(
        "timm.models.efficientvit_msra", in_stages(_efficientvit), WINDOWED
    ),
}
LOOKS_FOR = f"timm {', '.join(_FAMILIES)}"
