"""Small models of timm's pyramids, for ``staged_models.STAGED``."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

from torch import nn

from models import NUM_CLASSES
from staged import SIDE, Staged


def make_timm(module: str, name: str, **options: Any) -> nn.Module:
    kind = getattr(importlib.import_module(f"timm.models.{module}"), name)
    made: nn.Module = kind(num_classes=NUM_CLASSES, **options)
    return made


def staged(module: str, name: str, known: dict[str, Any] | None = None, **options: Any) -> Staged:
    return Staged(partial(make_timm, module, name, **options), **(known or {}))


def make_caformer() -> nn.Module:
    from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, SepConv

    mixers = [SepConv, Attention, Attention]
    norms = [LayerNorm2dNoBias, LayerNormNoBias, LayerNormNoBias]
    arguments = {
        "depths": (1, 2, 2),
        "dims": (8, 16, 32),
        "token_mixers": mixers,
        "norm_layers": norms,
    }
    return make_timm("metaformer", "MetaFormer", head_dim=8, **arguments)


def make_mvit(**options: Any) -> nn.Module:
    from timm.models.mvitv2 import MultiScaleVitCfg

    config = MultiScaleVitCfg(
        depths=(1, 2), embed_dim=(16, 32), num_heads=(1, 2), mlp_ratio=1.0, **options
    )
    return make_timm("mvitv2", "MultiScaleVit", cfg=config, img_size=SIDE)


_LEVIT = {
    "embed_dim": (16, 32),
    "key_dim": 8,
    "depth": (1, 1),
    "num_heads": (2, 2),
    "img_size": SIDE,
}
_PVT = {
    "embed_dims": (16, 32),
    "num_heads": (1, 2),
    "mlp_ratios": (1, 1),
    "depths": (1, 2),
    "sr_ratios": (4, 1),
}
PYRAMIDS: dict[str, Staged] = {
    "pit": staged(
        "pit",
        "PoolingVisionTransformer",
        {"vertical": 1},
        img_size=SIDE,
        patch_size=8,
        stride=4,
        base_dims=(8, 8),
        depth=(2, 2),
        heads=(2, 4),
        mlp_ratio=1,
        distilled=True,
    ),
    "levit": staged("levit", "Levit", {"block": 1}, stem_type="s8", **_LEVIT),
    "levit-conv": staged(
        "levit", "LevitDistilled", {"block": 2}, stem_type="s8", use_conv=True, **_LEVIT
    ),
    "pvt": staged("pvt_v2", "PyramidVisionTransformerV2", {"block": 1}, **_PVT),
    "pvt-linear": staged(
        "pvt_v2", "PyramidVisionTransformerV2", {"block": 2, "side": 112}, linear=True, **_PVT
    ),
    # 16 tokens a side: windows of 3 with padding.
    "twins": staged(
        "twins",
        "Twins",
        img_size=SIDE,
        wss=(3, 3),
        **{**_PVT, "depths": (2, 2), "sr_ratios": (4, 2)},
    ),
    "mvit": Staged(make_mvit, block=1),
    "mvit-class-token": Staged(
        partial(make_mvit, use_cls_token=True, use_abs_pos=True, expand_attn=False), block=2
    ),
    "visformer": staged(
        "visformer",
        "Visformer",
        {"block": 1},
        img_size=SIDE,
        init_channels=8,
        embed_dim=32,
        depth=(1, 1, 2),
        num_heads=2,
        mlp_ratio=1,
        group=4,
        attn_stage="011",
        spatial_conv="100",
    ),
    "caformer": Staged(make_caformer, vertical=1),
    "sam": staged(
        "vision_transformer_sam",
        "VisionTransformerSAM",
        {"block": 1},
        img_size=SIDE,
        patch_size=8,
        embed_dim=16,
        depth=2,
        num_heads=2,
        mlp_ratio=1,
        window_size=3,
        global_attn_indexes=(1,),
        use_rel_pos=True,
        neck_chans=16,
    ),
}
