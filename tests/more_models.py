"""Small models of the plain families that run over fewer methods, and what each refuses."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import vitmix
from home_made import FromEncoder, FromTrunk, HandWritten
from models import NUM_CLASSES, SIZE

_TIMM = {
    "img_size": SIZE,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "num_classes": NUM_CLASSES,
}
_NAFLEX = {key: value for key, value in _TIMM.items() if key not in ("img_size", "num_classes")}


def make_timm(module: str, name: str, **options: Any) -> nn.Module:
    import timm

    made: nn.Module = getattr(getattr(timm.models, module), name)(**{**_TIMM, **options})
    return made


def make_naflex(**options: Any) -> nn.Module:
    import timm

    return timm.models.NaFlexVit(
        img_size=SIZE, num_classes=NUM_CLASSES, **{**_NAFLEX, "class_token": True, **options}
    )


def make_hybrid() -> nn.Module:
    from timm.layers import HybridEmbed

    stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.GELU(), nn.Conv2d(8, 16, 3, 2, 1))
    stem.feature_info = None  # type: ignore[assignment]
    embed = partial(HybridEmbed, backbone=stem)
    return make_timm("vision_transformer", "VisionTransformer", embed_layer=embed, patch_size=2)


def make_parallel_attentions() -> nn.Module:
    from timm.models.vision_transformer import ParallelThingsBlock

    return make_timm("vision_transformer", "VisionTransformer", block_fn=ParallelThingsBlock)


def make_huggingface(name: str, *, head: str = "", attention: str = "sdpa", **options: Any) -> Any:
    import transformers

    arguments = {"num_hidden_layers": 4, **options}
    config = getattr(transformers, f"{name}Config")(
        image_size=SIZE,
        patch_size=8,
        hidden_size=32,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=NUM_CLASSES,
        **arguments,
    )
    config._attn_implementation = attention
    return getattr(transformers, f"{name}ForImageClassification{head}")(config)


def make_clip(name: str, *, attention: str = "sdpa") -> Any:
    import transformers

    vision = {
        "image_size": SIZE,
        "patch_size": 8,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    config = getattr(transformers, f"{name}Config")(vision_config=vision, num_labels=NUM_CLASSES)
    config.vision_config._attn_implementation = attention
    return getattr(transformers, f"{name}ForImageClassification")(config)


def make_timm_in_huggingface(name: str = "vit_tiny_patch16_224", **options: Any) -> Any:
    import transformers

    options = {**_TIMM, **options}
    config = transformers.TimmWrapperConfig(
        architecture=name, num_labels=options.pop("num_classes"), model_args=options
    )
    return transformers.TimmWrapperForImageClassification(config)


def make_torchvision(depth: int = 4) -> nn.Module:
    import torchvision

    vit = torchvision.models.VisionTransformer(SIZE, 8, depth, 2, 32, 64, num_classes=NUM_CLASSES)
    nn.init.normal_(vit.heads.head.weight)  # it begins at zero
    return vit


def make_vit_pytorch(name: str = "vit.ViT", **options: Any) -> nn.Module:
    module, kind = name.split(".")
    made: nn.Module = getattr(importlib.import_module(f"vit_pytorch.{module}"), kind)(
        image_size=SIZE,
        patch_size=8,
        num_classes=NUM_CLASSES,
        dim=32,
        depth=4,
        heads=2,
        dim_head=16,
        mlp_dim=64,
        **options,
    )
    return made


def make_vit_pytorch_cct() -> nn.Module:
    from vit_pytorch.cct import CCT

    return CCT(
        img_size=SIZE,
        embedding_dim=32,
        n_conv_layers=2,
        kernel_size=3,
        stride=1,
        padding=1,
        num_layers=4,
        num_heads=2,
        mlp_ratio=1,
        num_classes=NUM_CLASSES,
        attention_dropout=0.0,
    )


MORE_FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "hybrid": make_hybrid,
    "parallel-attentions": make_parallel_attentions,
    "naflex": partial(make_naflex, reg_tokens=1, global_pool="avg"),
    "naflex-rope": partial(make_naflex, rope_type="axial", global_pool="map"),
    "eva": partial(make_timm, "eva", "Eva"),
    "eva-rope": partial(
        make_timm,
        "eva",
        "Eva",
        use_rot_pos_emb=True,
        num_reg_tokens=2,
        qkv_fused=False,
        swiglu_mlp=True,
        scale_mlp=True,
        global_pool="token",
    ),
    "eva-mixed-rope": partial(
        make_timm,
        "eva",
        "Eva",
        use_rot_pos_emb=True,
        rope_type="mixed",
        attn_type="rope",
        class_token=False,
    ),
    "eva-grouped": partial(
        make_timm,
        "eva",
        "Eva",
        attn_type="rope",
        qkv_fused=False,
        num_kv_heads=1,
        use_rot_pos_emb=True,
        rope_type="dinov3",
    ),
    "eva-post-norm": partial(
        make_timm, "eva", "Eva", use_rot_pos_emb=True, use_post_norm=True, global_pool="map"
    ),
    "beit": partial(make_timm, "beit", "Beit", use_rel_pos_bias=True, init_values=0.5),
    "beit-no-bias": partial(make_timm, "beit", "Beit", global_pool="token"),
    "relpos": partial(
        make_timm, "vision_transformer_relpos", "VisionTransformerRelPos", init_values=0.5
    ),
    "relpos-shared": partial(
        make_timm,
        "vision_transformer_relpos",
        "VisionTransformerRelPos",
        shared_rel_pos=True,
        rel_pos_type="bias",
        class_token=True,
        global_pool="token",
        init_values=0.5,
    ),
    "deepseek": partial(make_timm, "deepseek_vit", "DeepseekVitClassifier"),
    "gemma4": partial(
        make_timm,
        "gemma4_vit",
        "Gemma4VitClassifier",
        head_dim=16,
        intermediate_size=64,
        position_embedding_size=32,
    ),
    "qwen3": partial(make_timm, "qwen3_vit", "Qwen3VitClassifier", pos_embed_grid_size=4),
    "qwen3-merged": partial(
        make_timm,
        "qwen3_vit",
        "Qwen3VitClassifier",
        pos_embed_grid_size=4,
        encoder_pool="merge",
        out_features=48,
    ),
    "torchvision": make_torchvision,
    "hf-vit": partial(make_huggingface, "ViT"),
    "hf-vit-eager": partial(make_huggingface, "ViT", attention="eager"),
    "hf-vit-msn": partial(make_huggingface, "ViTMSN"),
    "hf-deit": partial(make_huggingface, "DeiT"),
    "hf-deit-teacher": partial(make_huggingface, "DeiT", head="WithTeacher"),
    "hf-beit": partial(make_huggingface, "Beit", use_relative_position_bias=True),
    "hf-beit-eager": partial(
        make_huggingface, "Beit", attention="eager", use_shared_relative_position_bias=True
    ),
    "hf-beit-no-bias": partial(make_huggingface, "Beit", use_mean_pooling=False),
    "hf-data2vec": partial(make_huggingface, "Data2VecVision", use_relative_position_bias=True),
    "hf-data2vec-eager": partial(make_huggingface, "Data2VecVision", attention="eager"),
    "hf-dinov2": partial(make_huggingface, "Dinov2", use_mask_token=False),
    "hf-dinov2-eager": partial(make_huggingface, "Dinov2", attention="eager", use_mask_token=False),
    "hf-dinov2-registers": partial(make_huggingface, "Dinov2WithRegisters", num_register_tokens=3),
    "hf-ijepa": partial(make_huggingface, "IJepa"),
    "hf-clip": partial(make_clip, "CLIP"),
    "hf-clip-eager": partial(make_clip, "CLIP", attention="eager"),
    "hf-metaclip2": partial(make_clip, "MetaClip2"),
    "hf-siglip": partial(make_clip, "Siglip"),
    "hf-timm": make_timm_in_huggingface,
    "hf-timm-beit": partial(
        make_timm_in_huggingface, "beit_base_patch16_224", use_abs_pos_emb=False, init_values=0.5
    ),
    "vit-pytorch": make_vit_pytorch,
    "vit-pytorch-mean": partial(make_vit_pytorch, pool="mean"),
    "vit-pytorch-simple": partial(make_vit_pytorch, "simple_vit.SimpleViT"),
    "vit-pytorch-cct": make_vit_pytorch_cct,
    "hand-written": partial(HandWritten, SIZE, 8, 32, 4, NUM_CLASSES),
    "dinov3-trunk": partial(FromTrunk, SIZE, 8, 32, 4, NUM_CLASSES),
    "encoder-norm-first": partial(FromEncoder, SIZE, 8, 32, 4, NUM_CLASSES, norm_first=True),
    "encoder-norm-last": partial(FromEncoder, SIZE, 8, 32, 4, NUM_CLASSES, norm_first=False),
}


def _hand_written(model: Any) -> vitmix.Backbone:
    return vitmix.describe(
        model,
        blocks=[vitmix.Block(layer, layer.norm, layer.attention) for layer in model.layers],
        grid=(SIZE // 8, SIZE // 8),
        embed_dim=32,
        num_prefix_tokens=1,
    )


def _from_trunk(model: Any) -> vitmix.Backbone:
    return vitmix.describe(
        model,
        blocks=list(model.trunk.model.layer),
        grid=_eighths,
        embed_dim=32,
        num_prefix_tokens=3,
        vertical_reason="rotary position embedding",
    )


def _eighths(size: tuple[int, int]) -> tuple[int, int]:
    return size[0] // 8, size[1] // 8


def _from_encoder(model: Any) -> vitmix.Backbone:
    return vitmix.describe(model, blocks=list(model.encoder.layers), grid=_eighths, embed_dim=32)


# Descriptions by hand, for models that vitmix does not know.
BACKBONES: dict[str, Callable[[Any], vitmix.Backbone]] = {
    "hand-written": _hand_written,
    "dinov3-trunk": _from_trunk,
    "encoder-norm-first": _from_encoder,
    "encoder-norm-last": _from_encoder,
}

# Attention that knows positions cannot attend to tokens that have none.
POSITION_BIASED = {
    "naflex-rope",
    "eva-rope",
    "eva-mixed-rope",
    "eva-grouped",
    "eva-post-norm",
    "beit",
    "relpos",
    "relpos-shared",
    "deepseek",
    "gemma4",
    "qwen3",
    "qwen3-merged",
    "hf-beit",
    "hf-beit-eager",
    "hf-data2vec",
    "hf-timm-beit",
    "dinov3-trunk",
}


def make_family(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model, and the arguments that ``MixingModel`` wants for it."""
    model = MORE_FAMILIES[name]()
    return model, {"backbone": BACKBONES[name](model)} if name in BACKBONES else {}


def unsettle(model: nn.Module) -> None:
    """Move all weights away from where they begin, for attention far from uniform."""
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)


def logits_of(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.logits
