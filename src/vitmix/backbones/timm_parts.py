"""What timm's plain vision transformers have in common: blocks, token grid, pooling."""

from __future__ import annotations

from functools import partial
from typing import Any

from vitmix.backbones.base import Block, Pooling, Reason
from vitmix.backbones.grids import whole_patches
from vitmix.errors import UnsupportedModelError

__all__ = [
    "ROTARY",
    "blocks_of",
    "dropped",
    "grid_of",
    "patch_of",
    "pooling_of",
]

ROTARY = (
    "rotary position embedding (RoPE): a token that is put behind the others has no place in the "
    "image to be rotated by"
)

# Blocks whose norm works in front of the attention, behind it, or is fused with more of the block.
_NORM_FIRST = ("Block", "EvaBlock", "RelPosBlock", "DeepseekVitBlock", "Gemma4Block")
_NORM_LAST = ("ResPostBlock", "EvaBlockPostNorm", "ResPostRelPosBlock")
_WHOLE = ("ParallelScalingBlock", "ParallelThingsBlock")
_POOLING: dict[str, Pooling] = {"token": "class_token", "avg": "average"}


def blocks_of(family: str, blocks: Any) -> tuple[Block, ...]:
    """Blocks with softmax attention.

    Raises:
        UnsupportedModelError: a block of another kind.
    """
    return tuple(_block(family, index, block) for index, block in enumerate(blocks))


def _block(family: str, index: int, block: Any) -> Block:
    block = getattr(block, "_checkpoint_wrapped_module", block)
    kind = type(block).__name__
    attention = type(getattr(block, "attn", None)).__name__
    if attention == "DiffAttention" or kind == "DiffParallelScalingBlock":
        raise UnsupportedModelError(
            f"looked for one softmax attention a block in {family}, found the difference of two "
            f"(differential attention) at block {index}. The model was not changed."
        )
    if kind in _NORM_FIRST:
        return Block(module=block, entry=block.norm1, attention=block.attn)
    if kind in _NORM_LAST:
        return Block(module=block, entry=block.attn, attention=block.attn)
    if kind in _WHOLE:
        attentions = len(block.attns) if kind == "ParallelThingsBlock" else 1
        return Block(module=block, entry=block, attention=block, attentions=attentions)
    known = ", ".join((*_NORM_FIRST, *_NORM_LAST, *_WHOLE))
    raise UnsupportedModelError(
        f"looked for blocks of a known kind ({known}) in {family}, found {kind} "
        f"at block {index}. The model was not changed."
    )


def dropped(rate: float) -> Reason:
    """Why tokens cannot be followed where this share of them is dropped; None if none is."""
    if not rate:
        return None
    return (
        f"patch_drop_rate={rate}: dropped patches cannot be matched between samples; create the "
        "model with patch_drop_rate=0"
    )


def grid_of(patch_embed: Any) -> partial[tuple[int, int]]:
    """Token grid of an input size, by the patch embedding (a convolution or a whole network)."""
    return partial(_grid, patch_embed)


def _grid(patch_embed: Any, size: tuple[int, int]) -> tuple[int, int]:
    # A network as patch embedding takes other sizes than its own too, where positions allow it.
    own = getattr(patch_embed, "img_size", None)
    fits = getattr(patch_embed, "strict_img_size", False) and own is not None and size == tuple(own)
    if fits:
        rows, columns = patch_embed.grid_size
    elif hasattr(patch_embed, "dynamic_feat_size"):
        rows, columns = patch_embed.dynamic_feat_size(size)
    else:
        rows, columns = whole_patches(tuple(patch_embed.patch_size), size)
    return int(rows), int(columns)


def patch_of(patch_embed: Any) -> tuple[int, int] | None:
    """Sides of a patch, where what an image has beyond whole ones is left out; None elsewhere."""
    if type(patch_embed).__name__ != "PatchEmbed" or getattr(patch_embed, "dynamic_img_pad", False):
        return None
    rows, columns = patch_embed.patch_size
    return rows, columns


def pooling_of(model: Any) -> tuple[Pooling, Reason]:
    """Kind of pooling, and why shares cannot be followed through it (None if they can)."""
    if hasattr(model, "dist_token"):
        return "distilled", None
    attention_pool = getattr(model, "attn_pool", None)
    if attention_pool is not None:
        if type(attention_pool).__name__ == "AttentionPoolLatent" and (
            attention_pool.latent_len == 1
        ):
            every = getattr(model, "pool_include_prefix", True)
            return ("attention_all" if every else "attention"), None
        return "average", (
            f"pooling by {type(attention_pool).__name__}, which is not one learned query; "
            "use global_pool='token', 'avg' or 'map'"
        )
    if model.global_pool == "avg" and getattr(model, "pool_include_prefix", False):
        return "average_all", None
    if model.global_pool in _POOLING:
        return _POOLING[model.global_pool], None
    return "average", (
        f"pooling {model.global_pool!r} is not a weighted mean of tokens; "
        "use global_pool='token', 'avg' or 'map'"
    )
