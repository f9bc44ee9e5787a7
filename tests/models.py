"""Small models of every supported kind, for tests that run over all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import vitmix
from vitmix.models.cct import CCT

NUM_CLASSES = 7
SIZE = 32


def make_cct(**options: Any) -> nn.Module:
    arguments = {"num_layers": 4, "attention_dropout": 0.0, "stochastic_depth": 0.0, **options}
    return CCT(
        num_heads=2,
        mlp_ratio=1,
        embed_dim=32,
        num_conv_layers=2,
        num_classes=NUM_CLASSES,
        img_size=SIZE,
        **arguments,
    )


def make_vit(**options: object) -> nn.Module:
    import timm

    arguments = {
        "img_size": SIZE,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 4,
        "num_heads": 2,
        "num_classes": NUM_CLASSES,
        **options,
    }
    return timm.models.VisionTransformer(**arguments)


def make_distilled() -> nn.Module:
    import timm

    return timm.models.deit.VisionTransformerDistilled(
        img_size=SIZE, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=NUM_CLASSES
    )


def make_unfused() -> nn.Module:
    model = make_vit()
    for block in model.blocks:  # type: ignore[union-attr]
        block.attn.fused_attn = False
    return model


def make_res_post() -> nn.Module:
    from timm.models.vision_transformer import ResPostBlock

    return make_vit(block_fn=ResPostBlock, init_values=0.5)


def make_parallel() -> nn.Module:
    from timm.models.vision_transformer import ParallelScalingBlock

    return make_vit(block_fn=ParallelScalingBlock)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "cct": make_cct,
    "cct-no-positions": lambda: make_cct(positional_embedding="none"),
    "vit": make_vit,
    "vit-dynamic-size": lambda: make_vit(dynamic_img_size=True),
    "vit-average": lambda: make_vit(global_pool="avg"),
    "vit-average-all": lambda: make_vit(global_pool="avg", pool_include_prefix=True),
    "vit-no-class-token": lambda: make_vit(class_token=False, global_pool="avg"),
    "vit-registers": lambda: make_vit(reg_tokens=3),
    "vit-registers-average": lambda: make_vit(class_token=False, reg_tokens=3, global_pool="avg"),
    "vit-attention-pool": lambda: make_vit(class_token=False, global_pool="map"),
    "vit-layer-scale-qk-norm": lambda: make_vit(init_values=0.1, qk_norm=True),
    "vit-res-post": make_res_post,
    "vit-parallel": make_parallel,
    "vit-unfused": make_unfused,
    "deit-distilled": make_distilled,
}


def aligned_step(
    model: nn.Module,
    backbone: vitmix.Backbone,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    record: bool = False,
) -> vitmix.MixOutput:
    """What a step with boxes and aligned labels gives, by a description of the model."""
    mixing = vitmix.MixingModel(
        model,
        mix=vitmix.CutMix(),
        labels=vitmix.TokenAlignedLabels(),
        num_classes=NUM_CLASSES,
        backbone=backbone,
        generator=torch.Generator().manual_seed(0),
    )
    output: vitmix.MixOutput = mixing.train()(images, labels, record=record)
    return output


def batch(size: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, SIZE, SIZE, generator=generator)
    return images, torch.randint(NUM_CLASSES, (size,), generator=generator)
