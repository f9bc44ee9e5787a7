"""Small models of timm's windowed models and hybrids, for ``staged_models.STAGED``."""

from __future__ import annotations

from typing import Any

from torch import nn

from models import NUM_CLASSES
from staged import SIDE, Staged
from timm_pyramids import staged


def make_mobilenet() -> nn.Module:
    from timm.models._efficientnet_builder import decode_arch_def
    from timm.models.mobilenetv3 import MobileNetV3

    stages = [
        ["ds_r1_k3_s1_c8"],
        ["ir_r1_k3_s2_e2_c16"],
        [
            "ir_r1_k3_s2_e2_c16",
            "mqa_r1_k3_h2_s1_v2_d8_c16",
            "mha_r1_k3_d8_h2_s1_c16",
            "ds_r1_k3_s1_c16",
        ],
    ]
    return MobileNetV3(
        decode_arch_def(stages), num_classes=NUM_CLASSES, stem_size=8, num_features=32
    )


def make_byobnet(attention: str, **options: Any) -> nn.Module:
    from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg

    blocks = (
        ByoBlockCfg("bottle", d=1, c=16, s=1, gs=0, br=0.5),
        ByoBlockCfg("self_attn", d=2, c=32, s=2, gs=0, br=0.5),
    )
    config = ByoModelCfg(
        blocks=blocks,  # type: ignore[arg-type]
        stem_chs=8,
        stem_type="tiered",
        stem_pool="",
        self_attn_layer=attention,
        fixed_input_size=attention == "bottleneck",
        self_attn_kwargs={"num_heads": 2, **options},
    )
    return ByobNet(config, num_classes=NUM_CLASSES, img_size=SIDE)


HYBRIDS: dict[str, Staged] = {
    "nest": staged(
        "nest",
        "Nest",
        {"block": 1},
        img_size=SIDE,
        num_levels=3,
        embed_dims=(16, 16, 32),
        num_heads=(1, 1, 2),
        depths=(1, 1, 1),
        mlp_ratio=1,
        drop_path_rate=0.0,
    ),
    "hiera": staged(
        "hiera",
        "Hiera",
        {"block": 1},
        img_size=(SIDE, SIDE),
        embed_dim=16,
        stages=(1, 1, 2),
        q_pool=2,
        mask_unit_size=(4, 4),
        mask_unit_attn=(True, True, False),
        mlp_ratio=1,
        head_init_scale=1.0,
    ),
    "hieradet": staged(
        "hieradet_sam2",
        "HieraDet",
        {"block": 1},
        embed_dim=16,
        stages=(1, 2, 1),
        q_pool=2,
        window_spec=(4, 2, 2),
        global_att_blocks=(2,),
        head_init_scale=1.0,
    ),
    "gcvit": staged(
        "gcvit",
        "GlobalContextVit",
        {"block": 1},
        img_size=SIDE,
        embed_dim=8,
        depths=(1, 2),
        num_heads=(1, 2),
        window_size=(4, 4),
        mlp_ratio=1.0,
    ),
    # 16 and 8 tokens a side: windows of 3 with padding.
    "davit": staged(
        "davit",
        "DaVit",
        {"block": 1},
        depths=(1, 1),
        embed_dims=(16, 32),
        num_heads=(2, 2),
        window_size=3,
        mlp_ratio=1,
    ),
    "tinyvit": staged(
        "tiny_vit",
        "TinyVit",
        {"block": 1},
        embed_dims=(8, 16, 32),
        depths=(1, 1, 1),
        num_heads=(1, 2, 2),
        window_sizes=(4, 3, 4),
        mlp_ratio=1,
        drop_path_rate=0.0,
    ),
    "efficientvit": staged(
        "efficientvit_msra",
        "EfficientVitMsra",
        {"block": 1},
        img_size=SIDE,
        embed_dim=(16, 32),
        key_dim=(4, 4),
        depth=(1, 1),
        num_heads=(2, 2),
        window_size=(2, 2),
        kernels=(3, 3),
        down_ops=(("", 1), ("subsample", 2)),
    ),
    "fastvit": staged(
        "fastvit",
        "FastVit",
        {"block": 1},
        layers=(1, 2),
        token_mixers=("repmixer", "attention"),
        embed_dims=(16, 32),
        mlp_ratios=(1, 1),
        downsamples=(False, True),
        se_downsamples=(False, False),
        pos_embs=(None, None),
        layer_scale_init_value=0.5,
    ),
    "iformer": staged(
        "iformer",
        "IFormer",
        {"block": 1},
        dims=(8, 16),
        depths=(1, 6),
        attn_groups=(0, 2),
        attn_head_dim_reduction=(0, 2),
    ),
    "cpubone": staged(
        "cpubone",
        "CPUBone",
        {"block": 1},
        width_list=[8, 8, 8, 16],
        depth_list=[1, 1, 1, 2],
        head_widths=(16, 16),
        proj_drop_rate=0.0,
    ),
    "csatv2": staged(
        "csatv2", "CSATv2", {"block": 1}, dims=(8, 16), depths=(1, 2), transformer_depths=(0, 2)
    ),
    # Position biases are made for 7 x 7 tokens.
    "efficientformer": staged(
        "efficientformer",
        "EfficientFormer",
        {"block": 1, "side": 56},
        depths=(1, 2),
        embed_dims=(8, 16),
        num_vit=2,
        mlp_ratios=1,
        layer_scale_init_value=0.5,
    ),
    "efficientformer-v2": staged(
        "efficientformer_v2",
        "EfficientFormerV2",
        {"block": 1},
        img_size=SIDE,
        depths=(1, 1, 1, 1),
        embed_dims=(8, 8, 8, 16),
        num_vit=1,
        mlp_ratios=1,
        layer_scale_init_value=0.5,
    ),
    "shvit": staged(
        "shvit",
        "SHViT",
        {"block": 1},
        embed_dim=(16, 32),
        partial_dim=(8, 8),
        qk_dim=(8, 8),
        depth=(1, 1),
        types=("s", "s"),
    ),
    "mobilenetv4": Staged(make_mobilenet, block=1),
    "botnet": Staged(lambda: make_byobnet("bottleneck"), block=1),
    "halonet": Staged(lambda: make_byobnet("halo", block_size=4, halo_size=1), block=1),
    "cait": staged(
        "cait",
        "Cait",
        {"block": 1, "vertical": 1},
        img_size=SIDE,
        embed_dim=16,
        depth=2,
        num_heads=2,
        mlp_ratio=1,
        init_values=0.5,
    ),
    "volo": staged(
        "volo",
        "VOLO",
        {"block": 1},
        layers=[1, 2],
        img_size=SIDE,
        stem_hidden_dim=8,
        embed_dims=[8, 16],
        num_heads=[1, 2],
        downsamples=(True, False),
        outlook_attention=(True, False),
        mlp_ratio=1,
        use_aux_head=False,
    ),
}
