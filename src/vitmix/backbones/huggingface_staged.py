"""Image classifiers of transformers with stages, as timm's of the same names: Hiera and LeViT."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import nn

from vitmix.backbones.base import Backbone, Block, Reason, is_made_by
from vitmix.backbones.huggingface import known_version, recomputation
from vitmix.backbones.staged import (
    BIASED,
    WINDOWED,
    Located,
    attends,
    on_grids,
    reduce_by,
    to_reduced,
)
from vitmix.backbones.units import unit_blocks

__all__ = ["LOOKS_FOR", "describe"]

_LEVIT = ("LevitForImageClassification", "LevitForImageClassificationWithTeacher")
_HIERA = "HieraForImageClassification"

LOOKS_FOR = f"transformers {_HIERA}, {' or '.join(_LEVIT)}"

_ALONE = "attention whose MLP is called outside of its block"


def describe(model: nn.Module) -> Backbone | None:
    """Describe a Hiera or LeViT classifier of transformers; None if the model is something else."""
    staged: Any = model
    if is_made_by(model, "transformers.models.hiera.modeling_hiera", _HIERA):
        with known_version(_HIERA):
            return _describe(model, _hiera(staged.hiera), WINDOWED)
    for name in _LEVIT:
        if is_made_by(model, "transformers.models.levit.modeling_levit", name):
            with known_version(name):
                return _describe(model, _levit(staged.levit), BIASED, _ALONE)
    return None


def _describe(
    model: nn.Module, located: Located, vertical: Reason, rollout: Reason = None
) -> Backbone:
    name = f"transformers {type(model).__name__}"
    blocks, pixels = on_grids(name, located)
    return Backbone(
        family=name,
        blocks=blocks,
        embed_dim=blocks[0].width or 0,
        num_prefix_tokens=0,
        class_token=False,
        pooling="average",
        grid=partial(reduce_by, stride=pixels),
        recomputes=recomputation(model),
        vertical_reason=vertical,
        rollout_reason=rollout,
    )


def _hiera(trunk: Any) -> Located:
    config = trunk.config
    rows, columns = (
        side // stride for side, stride in zip(config.image_size, config.patch_stride, strict=True)
    )
    order = sys.modules[type(trunk).__module__].unroll(
        torch.arange(rows * columns).view(1, -1, 1),
        config.image_size,
        config.patch_stride,
        trunk.unroll_schedule,
    )
    return unit_blocks(
        (layer for stage in trunk.encoder.stages for layer in stage.layers),
        order.flatten(),
        columns,
        int(config.patch_stride[0]),
        entry="layernorm_before",
        query_stride="query_stride",
        always_in_units=True,
    )


def _levit(trunk: Any) -> Located:
    pixels = int(trunk.config.patch_size)
    for layer in (layer for stage in trunk.encoder.stages for layer in stage.layers):
        block = _levit_block(layer)
        if block is not None:
            pixels *= block.stride
            yield block, pixels


def _levit_block(layer: Any) -> Block | None:
    if type(layer).__name__ == "LevitAttentionSubsample":
        stride = int(layer.queries_subsample.stride)
        return attends(
            layer,
            "keys_values.linear",
            "",
            reach=partial(to_reduced, 1, stride),
            stride=stride,
            residual=False,
        )
    if type(layer.module).__name__ == "LevitAttention":
        return attends(layer, "module.queries_keys_values.linear", "module")
    return None
