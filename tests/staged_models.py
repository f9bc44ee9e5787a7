"""Small models whose tokens are merged between stages, or attend within windows.

To add a family: a function that makes a small model for ``NUM_CLASSES`` classes, and an entry in
``STAGED``. All tests of ``test_staged.py`` then run on it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from models import NUM_CLASSES
from staged import SIDE, Staged
from timm_hybrids import HYBRIDS
from timm_pyramids import PYRAMIDS


def make_swin(name: str, side: int = SIDE, window: int = 4, **options: Any) -> nn.Module:
    import timm

    arguments = {"depths": (2, 2, 2), "num_heads": (1, 2, 4), "embed_dim": 16, **options}
    return timm.create_model(
        name,
        num_classes=NUM_CLASSES,
        img_size=side,
        window_size=window,
        drop_path_rate=0.0,
        **arguments,
    )


def make_maxxvit(types: tuple[str, ...], depths: tuple[int, ...], **options: Any) -> nn.Module:
    from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitTransformerCfg

    transformer = {"dim_head": 8, "window_size": (4, 4), "grid_size": (4, 4), **options}
    config = MaxxVitCfg(
        embed_dim=(16, 16, 32)[: len(types)],
        depths=depths,
        block_type=types,
        stem_width=8,
        transformer_cfg=MaxxVitTransformerCfg(**transformer),
    )
    return MaxxVit(config, img_size=SIDE, num_classes=NUM_CLASSES)


def make_torchvision_swin(version: str = "", window: int = 4) -> nn.Module:
    from torchvision.models import swin_transformer as swin

    return swin.SwinTransformer(
        [4, 4],
        16,
        [2, 2, 2],
        [1, 2, 4],
        [window, window],
        num_classes=NUM_CLASSES,
        block=getattr(swin, f"SwinTransformerBlock{version}"),
        downsample_layer=getattr(swin, f"PatchMerging{version}"),
    )


def make_torchvision_maxvit(side: int = SIDE, partition: int = 4) -> nn.Module:
    from torchvision.models.maxvit import MaxVit

    return MaxVit((side, side), 8, partition, [16, 32], [1, 2], 8, 0.0, num_classes=NUM_CLASSES)


def make_huggingface_swin(
    name: str = "Swin", side: int = SIDE, window: int = 4, attention: str = "sdpa"
) -> Any:
    from transformers.models import donut, swin, swinv2

    module = {"Swin": swin, "Swinv2": swinv2, "DonutSwin": donut}[name]
    config = getattr(module, f"{name}Config")(
        image_size=side,
        patch_size=4,
        embed_dim=16,
        depths=[2, 2, 2],
        num_heads=[1, 2, 4],
        window_size=window,
        drop_path_rate=0.1,
        num_labels=NUM_CLASSES,
        attn_implementation=attention,
    )
    return getattr(module, f"{name}ForImageClassification")(config)


def make_huggingface_pyramid(name: str, attention: str = "eager", **options: Any) -> Any:
    import transformers

    config = getattr(transformers, f"{name}Config")(
        depths=[2, 2, 2],
        hidden_sizes=[16, 16, 32],
        num_attention_heads=[1, 2, 2],
        num_encoder_blocks=3,
        patch_sizes=[7, 3, 3],
        strides=[4, 2, 2],
        sr_ratios=[4, 2, 1],
        mlp_ratios=[2, 2, 2],
        num_labels=NUM_CLASSES,
        attn_implementation=attention,
        **options,
    )
    return getattr(transformers, f"{name}ForImageClassification")(config)


def make_huggingface_hiera(**options: Any) -> Any:
    import transformers

    config = transformers.HieraConfig(
        embed_dim=16, image_size=[SIDE, SIDE], depths=[1, 1, 2], num_heads=[1, 2, 2],
        num_query_pool=2, masked_unit_size=[4, 4], masked_unit_attention=[True, True, False],
        mlp_ratio=1.0, num_labels=NUM_CLASSES, drop_path_rate=0.0, **options,
    )  # fmt: skip
    return transformers.HieraForImageClassification(config)


def make_huggingface_levit(head: str = "") -> Any:
    import transformers

    config = transformers.LevitConfig(
        image_size=128, hidden_sizes=[16, 32], num_attention_heads=[2, 2], depths=[2, 2],
        key_dim=[8, 8], attention_ratio=[2, 2], mlp_ratio=[2, 2], drop_path_rate=0,
        num_labels=NUM_CLASSES,
    )  # fmt: skip
    config.down_ops = [["Subsample", 8, 2, 4, 2, 2]]
    return getattr(transformers, f"LevitForImageClassification{head}")(config)


STAGED: dict[str, Staged] = {
    "swin": Staged(partial(make_swin, "swin_tiny_patch4_window7_224")),
    # 18, 9 and 5 tokens a side: windows and merging with padding.
    "swin-padded": Staged(
        partial(make_swin, "swin_tiny_patch4_window7_224", 72, always_partition=True), side=72
    ),
    "swin-v2": Staged(partial(make_swin, "swinv2_tiny_window8_256")),
    "swin-v2-cr": Staged(partial(make_swin, "swinv2_cr_tiny_224", strict_img_size=False)),
    "coatnet": Staged(partial(make_maxxvit, ("C", "T", "T"), (1, 2, 2), norm_layer="batchnorm2d")),
    "maxvit": Staged(partial(make_maxxvit, ("M", "M"), (1, 1))),
    "maxvit-nchw": Staged(partial(make_maxxvit, ("M", "M"), (1, 1), use_nchw_attn=True)),
    "torchvision-swin": Staged(make_torchvision_swin),
    # 16, 8 and 4 tokens a side in windows of 5, of which the last covers its grid.
    "torchvision-swin-padded": Staged(partial(make_torchvision_swin, window=5)),
    "torchvision-swin-v2": Staged(partial(make_torchvision_swin, "V2", 4)),
    "hf-swin": Staged(make_huggingface_swin),
    "hf-swin-eager": Staged(partial(make_huggingface_swin, attention="eager")),
    # 18, 9 and 5 tokens a side in windows of 5: padding, shifts and a window that covers its grid.
    "hf-swin-padded": Staged(partial(make_huggingface_swin, side=72, window=5), side=72),
    "hf-swin-v2": Staged(partial(make_huggingface_swin, "Swinv2", attention="eager")),
    "hf-donut": Staged(partial(make_huggingface_swin, "DonutSwin", attention="eager")),
    "hf-pvt-v2": Staged(partial(make_huggingface_pyramid, "PvtV2")),
    # 15, 8 and 4 tokens a side: the last 3 of a row have no key in the first stage.
    "hf-pvt-v2-left-over": Staged(partial(make_huggingface_pyramid, "PvtV2"), side=58),
    "hf-segformer": Staged(partial(make_huggingface_pyramid, "Segformer", "sdpa")),
    "hf-segformer-eager": Staged(partial(make_huggingface_pyramid, "Segformer")),
    "hf-hiera": Staged(make_huggingface_hiera, block=1),
    "hf-levit": Staged(make_huggingface_levit, block=1, side=128),
    "hf-levit-teacher": Staged(partial(make_huggingface_levit, "WithTeacher"), block=2, side=128),
    "torchvision-maxvit": Staged(make_torchvision_maxvit),
    **PYRAMIDS,
    **HYBRIDS,
}


def images_for(family: str, size: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    side = STAGED[family].side
    images = torch.randn(size, 3, side, side, generator=generator)
    return images, torch.randint(NUM_CLASSES, (size,), generator=generator)
