"""timm's convolutional networks with attention between tokens in some blocks.

FastViT, iFormer, CPUBone, LowFormer, CSATv2, EfficientFormer (V2), SHViT, Next-ViT, the hybrids of
MobileNetV4, and the bottleneck and halo attention of ByobNet.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from vitmix.backbones.base import Backbone, Block, Layout
from vitmix.backbones.staged import (
    BIASED,
    MAPPED,
    Located,
    StagedFamily,
    Stages,
    attends,
    describe_staged,
    in_stages,
    in_windows,
    to_reduced,
)
from vitmix.errors import UnsupportedModelError
from vitmix.functional.grids import Grid
from vitmix.functional.reach import Reach, halos, windows

__all__ = ["LOOKS_FOR", "describe"]


def describe(model: nn.Module) -> Backbone | None:
    """Describe one of timm's hybrids; None if the model is something else."""
    return describe_staged(_FAMILIES, model)


def _fastvit(module: Any) -> Block | None:
    if type(module).__name__ != "AttentionBlock":
        return None
    return attends(module, "norm", "token_mixer", layout="channels_first")


def _iformer(module: Any) -> Block | None:
    if type(module).__name__ != "SHMABlock":
        return None
    size = module.mixer.module.window_size
    reach = partial(in_windows, (size, size)) if size else None
    return attends(module, "mixer.module.q", "mixer.module", layout="channels_first", reach=reach)


def _lowformer(module: Any) -> Block | None:
    """Blocks of LowFormer and CPUBone: attention on a coarser grid, and back."""
    if type(module).__name__ not in ("LowFormerBlock", "CPUBoneBlock"):
        return None
    for name, part in module.named_modules():
        if type(part).__name__ == "ConvAttention":
            stride = part.att_stride
            reach = partial(to_reduced, stride, stride, restored=True) if stride > 1 else None
            return attends(module, f"{name}.pwise", name, layout="channels_first", reach=reach)
    return None


def _csatv2(module: Any) -> Block | None:
    if type(module).__name__ != "TransformerBlock":
        return None
    if module.downsample:
        merging = partial(to_reduced, 2, 2)
        return attends(module, layout="channels_first", reach=merging, stride=2)
    return attends(module, layout="channels_first")


def _efficientformer(module: Any) -> Block | None:
    if type(module).__name__ != "MetaBlock1d":
        return None
    return attends(module, attention="token_mixer")


def _efficientformer_v2(module: Any) -> Block | None:
    """Maps of heads are mixed behind the softmax, which shares follow before."""
    kind = type(module).__name__
    if kind == "EfficientFormerV2Block" and module.token_mixer is not None:
        strided = module.token_mixer.stride_conv is not None
        reach = partial(to_reduced, 2, 2, restored=True) if strided else None
        return attends(module, "token_mixer.q", "token_mixer", layout="channels_first", reach=reach)
    if kind == "Downsample" and module.attn is not None:
        merging = partial(to_reduced, 1, 2)
        return attends(module, "attn.k", layout="channels_first", reach=merging, stride=2)
    return None


def _shvit(module: Any) -> Block | None:
    """One head, on a part of the channels."""
    if type(module).__name__ != "BasicBlock" or isinstance(module.mixer, nn.Identity):
        return None
    return attends(
        module, "mixer.m", "mixer.m", layout="channels_first", width=module.mixer.m.dim, heads=1
    )


def _nextvit(module: Any) -> Block | None:
    if type(module).__name__ != "NextTransformerBlock":
        return None
    if not isinstance(module.patch_embed.pool, nn.Identity):
        raise UnsupportedModelError(
            "looked for attention blocks behind others of their stage in timm NextViT, found one "
            "that begins a stage. The model was not changed."
        )
    ratio = module.e_mhsa.N_ratio
    return attends(
        module,
        attention="e_mhsa",
        layout="channels_first",
        width=module.in_chs,
        reach=partial(_averaged, ratio) if ratio > 1 else None,
    )


def _averaged(ratio: int, grid: Grid) -> Reach:
    """Keys are averages of tokens that follow one another row by row."""
    keys = (1, grid[0] * grid[1] // ratio)
    return Reach(grid, keys=keys, cell=(1, ratio), flat_keys=True)


def _mobilenet(model: Any) -> Located:
    """Blocks of MobileNetV4: keys are reduced, and all heads share them."""
    pixels = int(model.conv_stem.stride[0])
    for module in (module for stage in model.blocks for module in stage):
        if type(module).__name__ != "MobileAttention":
            pixels *= max(
                part.stride[0] for part in module.modules() if isinstance(part, nn.Conv2d)
            )
            continue
        keys, queries = module.kv_stride, module.query_strides[0]
        reach = partial(to_reduced, keys, queries, restored=True)
        layout: Layout = "channels_first"
        skips = module.has_skip
        yield attends(module, "norm", layout=layout, reach=reach, residual=skips), pixels


_BYOB_REASONS = {
    "LambdaLayer": "lambda layers, which move content without a map of tokens by tokens",
    "MobileVitBlock": "attention between patches that are folded into the batch (MobileViT)",
    "MobileVitV2Block": "separable linear attention, without a map of tokens by tokens",
}


def _byobnet(module: Any) -> Block | None:
    kind = type(module).__name__
    if kind in _BYOB_REASONS:
        raise UnsupportedModelError(
            f"looked for attention between tokens in timm ByobNet, found {_BYOB_REASONS[kind]}. "
            "The model was not changed."
        )
    if kind != "SelfAttnBlock":
        return None
    attention = module.self_attn
    before = 1 if isinstance(module.conv2_kxk, nn.Identity) else module.conv2_kxk.conv.stride[0]
    pools = not isinstance(attention.pool, nn.Identity)
    reach: Callable[[Grid], Reach] | None = None
    stride = before * (2 if pools else 1)
    halo = hasattr(attention, "halo_size")
    if halo:
        if before > 1:
            raise UnsupportedModelError(
                "looked for halo attention in front of other strides in timm ByobNet, found a "
                "strided convolution before it. The model was not changed."
            )
        reach = partial(_halo, attention)
        stride *= attention.block_stride
    elif before > 1:
        reach = partial(to_reduced, before, before)
    return attends(
        module,
        "conv1_1x1.conv",
        "self_attn",
        layout="channels_first",
        reach=reach,
        stride=stride,
        heads=attention.num_heads,
        heads_first=halo,
    )


def _byobnet_stages(model: Any) -> Stages:
    """A stage that is not listed has the pixels a token of the next one that is."""
    infos = model.feature_info
    return [
        (stage, min(info["reduction"] for info in infos if info["stage"] >= number))
        for number, stage in enumerate(model.stages, 1)
    ]


def _halo(attention: Any, grid: Grid) -> Reach:
    """Keys of a window and its surroundings; queries of the window, or some of them."""
    step, size = attention.block_stride, attention.block_size_ds
    merged = (grid[0] // step, grid[1] // step)
    return Reach(
        grid,
        windows=halos(grid, attention.block_size, attention.halo_size),
        queries=merged if step > 1 else None,
        query_windows=windows(merged, (size, size)),
    )


_FAMILIES = {
    "FastVit": StagedFamily("timm.models.fastvit", in_stages(_fastvit), MAPPED),
    "IFormer": StagedFamily("timm.models.iformer", in_stages(_iformer), MAPPED),
    "CPUBone": StagedFamily("timm.models.cpubone", in_stages(_lowformer), MAPPED),
    "LowFormer": StagedFamily("timm.models.lowformer", in_stages(_lowformer), MAPPED),
    "CSATv2": StagedFamily("timm.models.csatv2", in_stages(_csatv2), MAPPED),
    "EfficientFormer": StagedFamily(
        "timm.models.efficientformer", in_stages(_efficientformer), BIASED
    ),
    "EfficientFormerV2": StagedFamily(
        "timm.models.efficientformer_v2", in_stages(_efficientformer_v2), MAPPED
    ),
    "SHViT": StagedFamily("timm.models.shvit", in_stages(_shvit), MAPPED),
    "NextViT": StagedFamily("timm.models.nextvit", in_stages(_nextvit), MAPPED),
    "MobileNetV3": StagedFamily("timm.models.mobilenetv3", _mobilenet, MAPPED),
    "ByobNet": StagedFamily("timm.models.byobnet", in_stages(_byobnet, _byobnet_stages), MAPPED),
}
LOOKS_FOR = f"timm {', '.join(_FAMILIES)}"
