"""Swin transformers of transformers (v1, v2 and Donut's): attention within shifted windows."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from vitmix.backbones.base import Backbone, Block, is_made_by
from vitmix.backbones.huggingface import known_version, recomputation, unreadable
from vitmix.backbones.staged import WINDOWED
from vitmix.functional.grids import Grid
from vitmix.functional.reach import Reach, windows

__all__ = ["LOOKS_FOR", "describe"]

# Module, trunk, and whether the norm works in front of the attention.
_MODELS = {
    "SwinForImageClassification": ("swin.modeling_swin", "swin", True),
    "Swinv2ForImageClassification": ("swinv2.modeling_swinv2", "swinv2", False),
    "DonutSwinForImageClassification": ("donut.modeling_donut_swin", "donut", True),
}

LOOKS_FOR = f"transformers {', '.join(_MODELS)}"


def describe(model: nn.Module) -> Backbone | None:
    """Describe a Swin classifier of transformers; None if the model is something else."""
    for name, (module, trunk, norm_first) in _MODELS.items():
        if is_made_by(model, f"transformers.models.{module}", name):
            with known_version(name):
                return _describe(name, model, getattr(model, trunk), norm_first)
    return None


def _describe(name: str, model: Any, trunk: Any, norm_first: bool) -> Backbone:
    width = int(model.config.embed_dim)
    return Backbone(
        family=f"transformers {name}",
        blocks=tuple(
            Block(
                module=layer,
                entry=layer.layernorm_before if norm_first else layer.attention,
                attention=layer.attention,
                stride=2**level,
                width=width * 2**level,
                reach=partial(_reach, layer, norm_first),
            )
            for level, stage in enumerate(trunk.encoder.layers)
            for layer in stage.blocks
        ),
        embed_dim=width,
        num_prefix_tokens=0,
        class_token=False,
        pooling="average",
        grid=partial(_grid, tuple(trunk.embeddings.patch_embeddings.patch_size)),
        recomputes=recomputation(model),
        vertical_reason=WINDOWED,
        attention_reason=unreadable(model.config),
    )


def _grid(patch: tuple[int, int], size: tuple[int, int]) -> Grid:
    """Images are padded to whole patches."""
    return -(-size[0] // patch[0]), -(-size[1] // patch[1])


def _reach(layer: Any, shrinks: bool, grid: Grid) -> Reach:
    """Windows of a padded grid; those of the first version shrink to a side that they cover."""
    side, shift = int(layer.window_size), int(layer.shift_size)
    if shrinks and min(grid) <= side:
        side, shift = min(grid), 0
    return Reach(grid, windows=windows(grid, (side, side), (shift, shift), pad_first=True))
