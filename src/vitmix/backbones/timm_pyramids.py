"""timm's pyramids: stages of shrinking token grids around one kind of attention.

PiT and CaFormer attend globally, LeViT and MViT to merged queries or keys, PVT v2 to reduced keys,
Twins and SAM's encoder by turns within windows and globally; Visformer attends in its later stages.
In CaiT and VOLO a class token joins behind the blocks. CaiT mixes the maps of its heads behind the
softmax, which shares follow before. VOLO's outlook attention is local, and counts as a convolution.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from vitmix.backbones.base import Backbone, Block, Layout, Reason
from vitmix.backbones.grids import behind
from vitmix.backbones.staged import (
    BIASED,
    MAPPED,
    REDUCED,
    WINDOWED,
    StagedFamily,
    Stages,
    attends,
    describe_staged,
    in_stages,
    in_windows,
    pooled,
    to_reduced,
)
from vitmix.functional.grids import Grid
from vitmix.functional.reach import Reach

__all__ = ["LOOKS_FOR", "describe"]


def describe(model: nn.Module) -> Backbone | None:
    """Describe one of timm's pyramids; None if the model is something else."""
    return describe_staged(_FAMILIES, model)


def _pit(module: Any) -> Block | None:
    return attends(module) if type(module).__name__ == "Block" else None


def _convolution_grid(model: Any) -> partial[Grid]:
    return partial(behind, model.patch_embed.conv)


def _levit(module: Any) -> Block | None:
    kind = type(module).__name__
    if kind == "LevitBlock":
        return attends(module, "attn.qkv.linear", layout=_levit_layout(module.attn))
    if kind == "LevitDownsample":
        down = module.attn_downsample
        return attends(
            module,
            entry="attn_downsample.kv.linear",
            attention="attn_downsample",
            layout=_levit_layout(down),
            reach=partial(to_reduced, 1, down.stride),
            stride=down.stride,
            residual=False,
        )
    return None


def _levit_layout(attention: Any) -> Layout:
    return "channels_first" if attention.use_conv else "tokens"


def _pvt(module: Any) -> Block | None:
    if type(module).__name__ != "Block":
        return None
    attention = module.attn
    if attention.pool is not None:
        return attends(module, reach=partial(pooled, int(attention.pool.output_size)))
    if attention.sr is not None:
        return attends(module, reach=partial(_strided_keys, attention.sr.stride))
    return attends(module)


def _strided_keys(stride: Grid, grid: Grid) -> Reach:
    """Keys behind an unpadded convolution as wide as its stride."""
    return Reach(grid, keys=(grid[0] // stride[0], grid[1] // stride[1]), cell=stride)


def _twins(module: Any) -> Block | None:
    if type(module).__name__ != "Block":
        return None
    attention = module.attn
    if type(attention).__name__ == "LocallyGroupedAttn":
        return attends(module, reach=partial(in_windows, (attention.ws, attention.ws)))
    if attention.sr is not None:
        return attends(module, reach=partial(_strided_keys, attention.sr.stride))
    return attends(module)


def _stages_in(name: str, model: Any) -> Stages:
    """Stages that ``feature_info`` names otherwise."""
    reductions = [info["reduction"] for info in model.feature_info]
    return zip(model.get_submodule(name), reductions, strict=True)


def _mvit(module: Any) -> Block | None:
    if type(module).__name__ != "MultiScaleBlock":
        return None
    queries, keys = (_stride(getattr(module.attn, f"pool_{name}")) for name in "qk")
    reach = partial(to_reduced, keys, queries) if keys > 1 or queries > 1 else None
    return attends(module, reach=reach, stride=queries)


def _stride(pool: Any) -> int:
    if pool is None:
        return 1
    stride = pool.stride
    return max(stride) if isinstance(stride, tuple) else int(stride)


def _visformer(module: Any) -> Block | None:
    if type(module).__name__ != "Block" or module.attn is None:
        return None
    return attends(module, layout="channels_first")


def _metaformer(module: Any) -> Block | None:
    if type(getattr(module, "token_mixer", None)).__name__ != "Attention":
        return None
    return attends(module, attention="token_mixer")


def _sam(module: Any) -> Block | None:
    if type(module).__name__ != "Block":
        return None
    size = (module.window_size, module.window_size)
    reach = partial(in_windows, size) if module.window_size else None
    heads = module.attn.num_heads
    return attends(module, layout="channels_last", reach=reach, heads=heads)


def _cait(module: Any) -> Block | None:
    return attends(module) if type(module).__name__ == "LayerScaleBlock" else None


def _volo(module: Any) -> Block | None:
    if type(module).__name__ != "Transformer":
        return None
    return attends(module, layout="channels_last")


def _volo_reason(model: Any) -> Reason:
    if model.aux_head is not None:
        return "an auxiliary head's maximum over tokens; create the model with use_aux_head=False"
    if model.global_pool != "token":
        return "an average of the class token and the others; use global_pool='token'"
    return None


_FAMILIES = {
    "PoolingVisionTransformer": StagedFamily(
        "timm.models.pit", in_stages(_pit), None, grid=_convolution_grid
    ),
    "Levit": StagedFamily("timm.models.levit", in_stages(_levit), BIASED),
    "PyramidVisionTransformerV2": StagedFamily("timm.models.pvt_v2", in_stages(_pvt), REDUCED),
    "Twins": StagedFamily(
        "timm.models.twins", in_stages(_twins, partial(_stages_in, "blocks")), REDUCED
    ),
    "MultiScaleVit": StagedFamily(
        "timm.models.mvitv2", in_stages(_mvit, partial(_stages_in, "stages")), REDUCED
    ),
    "Visformer": StagedFamily("timm.models.visformer", in_stages(_visformer), MAPPED),
    "MetaFormer": StagedFamily("timm.models.metaformer", in_stages(_metaformer), None),
    "VisionTransformerSAM": StagedFamily(
        "timm.models.vision_transformer_sam", in_stages(_sam), WINDOWED
    ),
    "Cait": StagedFamily(
        "timm.models.cait", in_stages(_cait), None, class_layers="blocks_token_only"
    ),
    "VOLO": StagedFamily(
        "timm.models.volo",
        in_stages(_volo),
        MAPPED,
        class_layers="post_network",
        aligned=_volo_reason,
    ),
}
LOOKS_FOR = f"timm {', '.join(_FAMILIES)}"
