"""vit-pytorch's ``ViT``, ``SimpleViT`` and ``CCT``."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from vitmix.backbones.base import Backbone, Block, Pooling, is_made_by
from vitmix.backbones.grids import behind, whole_patches
from vitmix.functional.grids import Grid

__all__ = ["LOOKS_FOR", "describe"]

LOOKS_FOR = "vit_pytorch ViT, SimpleViT or CCT"


def describe(model: nn.Module) -> Backbone | None:
    """Describe a model of vit-pytorch; None if the model is something else."""
    if is_made_by(model, "vit_pytorch.vit", "ViT"):
        return _vit("vit_pytorch ViT", model)
    if is_made_by(model, "vit_pytorch.simple_vit", "SimpleViT"):
        return _vit("vit_pytorch SimpleViT", model)
    if is_made_by(model, "vit_pytorch.cct", "CCT"):
        return _cct(model)
    return None


def _vit(family: str, vit: Any) -> Backbone:
    prefix = vit.cls_token.shape[-2] if hasattr(vit, "cls_token") else 0
    pooling: Pooling = "class_token" if vit.pool == "cls" else "average_all"
    sides = vit.to_patch_embedding[0].axes_lengths
    return Backbone(
        family=family,
        blocks=tuple(
            Block(module=attention, entry=attention.norm, attention=attention, skip_outside=True)
            for attention, _ in vit.transformer.layers
        ),
        embed_dim=int(vit.pos_embedding.shape[-1]),
        num_prefix_tokens=prefix,
        class_token=prefix > 0,
        pooling=pooling,
        grid=partial(whole_patches, (sides["p1"], sides["p2"])),
    )


def _cct(cct: Any) -> Backbone:
    classifier = cct.classifier
    return Backbone(
        family="vit_pytorch CCT",
        blocks=tuple(
            Block(module=block, entry=block.pre_norm, attention=block.self_attn)
            for block in classifier.blocks
        ),
        embed_dim=int(classifier.embedding_dim),
        num_prefix_tokens=0,
        class_token=False,
        pooling="sequence",
        grid=partial(_convolved, cct.tokenizer),
        pool_scores=classifier.attention_pool,
    )


def _convolved(tokenizer: nn.Module, size: tuple[int, int]) -> Grid:
    for part in tokenizer.modules():
        if isinstance(part, nn.Conv2d | nn.MaxPool2d):
            size = behind(part, size)
    return size
