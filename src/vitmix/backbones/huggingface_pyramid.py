"""Pyramids of transformers with attention to reduced keys: PVT v2 and SegFormer."""

from __future__ import annotations

from functools import partial
from itertools import accumulate
from operator import mul
from typing import Any, NamedTuple

from torch import nn

from vitmix.backbones.base import Backbone, Block, is_made_by
from vitmix.backbones.grids import behind
from vitmix.backbones.huggingface import known_version, recomputation, unreadable
from vitmix.backbones.staged import REDUCED, pooled
from vitmix.functional.grids import Grid
from vitmix.functional.reach import Reach

__all__ = ["LOOKS_FOR", "describe"]

LOOKS_FOR = "transformers PvtV2ForImageClassification or SegformerForImageClassification"


class _Names(NamedTuple):
    """Where a stage and its layers keep their parts."""

    embedding: str
    norm: str
    reduction: str


_PVT = _Names("patch_embedding.proj", "layer_norm_1", "spatial_reduction_ratio")
_SEGFORMER = _Names("patch_embeddings.proj", "layernorm_before", "sequence_reduction_ratio")


def describe(model: nn.Module) -> Backbone | None:
    """Describe a pyramid of transformers; None if the model is something else."""
    pyramid: Any = model
    name = "PvtV2ForImageClassification"
    if is_made_by(model, "transformers.models.pvt_v2.modeling_pvt_v2", name):
        with known_version(name):
            return _describe(name, pyramid, pyramid.pvt_v2.encoder.layers, _PVT)
    name = "SegformerForImageClassification"
    if is_made_by(model, "transformers.models.segformer.modeling_segformer", name):
        with known_version(name):
            return _describe(name, pyramid, pyramid.segformer.stages, _SEGFORMER)
    return None


def _describe(name: str, model: Any, stages: Any, names: _Names) -> Backbone:
    embeddings = [stage.get_submodule(names.embedding) for stage in stages]
    strides = [1, *(embedding.stride[0] for embedding in embeddings[1:])]
    return Backbone(
        family=f"transformers {name}",
        blocks=tuple(
            Block(
                module=layer,
                entry=getattr(layer, names.norm),
                attention=layer.attention,
                stride=stride,
                width=embedding.out_channels,
                reach=_reach(layer.attention, getattr(layer.attention, names.reduction)),
            )
            for stage, embedding, stride in zip(
                stages, embeddings, accumulate(strides, mul), strict=True
            )
            for layer in stage.blocks
        ),
        embed_dim=embeddings[0].out_channels,
        num_prefix_tokens=0,
        class_token=False,
        pooling="average",
        grid=partial(behind, embeddings[0]),
        recomputes=recomputation(model),
        vertical_reason=REDUCED,
        attention_reason=unreadable(model.config),
    )


def _reach(attention: Any, side: int) -> partial[Reach] | None:
    if getattr(attention, "linear_attention", False):
        return partial(pooled, int(attention.pool.output_size))
    return partial(_reduced, side) if side > 1 else None


def _reduced(side: int, grid: Grid) -> Reach:
    """Keys behind an unpadded convolution as wide as its stride."""
    return Reach(grid, keys=(grid[0] // side, grid[1] // side), cell=(side, side))
