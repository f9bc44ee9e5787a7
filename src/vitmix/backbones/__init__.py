"""What a model is made of: ``describe(model)``; one file a family.

Nothing here knows a mixing method, and no model library is imported: a family whose library the
process has not imported cannot be what the model is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from vitmix.backbones import (
    cct,
    huggingface,
    huggingface_pyramid,
    huggingface_staged,
    huggingface_swin,
    timm_hybrids,
    timm_maxxvit,
    timm_position,
    timm_pyramids,
    timm_swin,
    timm_vit,
    timm_windows,
    torchvision_maxvit,
    torchvision_swin,
    torchvision_vit,
    unsupported,
    vit_pytorch,
)
from vitmix.backbones.base import Backbone, Block, Family, Pooling, Reason, is_made_by
from vitmix.backbones.custom import Grid, describe_by_hand
from vitmix.backbones.timm_parts import grid_of
from vitmix.errors import InputError, UnsupportedModelError

__all__ = ["Backbone", "Block", "describe", "describe_pixels", "known_part"]

_FAMILIES: tuple[Family, ...] = (
    cct,
    timm_vit,
    timm_position,
    timm_swin,
    timm_maxxvit,
    timm_pyramids,
    timm_windows,
    timm_hybrids,
    huggingface,
    huggingface_pyramid,
    huggingface_swin,
    huggingface_staged,
    torchvision_vit,
    torchvision_swin,
    torchvision_maxvit,
    vit_pytorch,
)


def describe(
    model: nn.Module,
    blocks: Sequence[nn.Module | Block] | None = None,
    *,
    grid: Grid | None = None,
    embed_dim: int | None = None,
    num_prefix_tokens: int = 0,
    class_token: bool | None = None,
    pooling: Pooling | None = None,
    pool_scores: nn.Module | None = None,
    class_layers: int = 0,
    recomputes: Callable[[], bool] | None = None,
    alignment_reason: Reason = None,
    vertical_reason: Reason = None,
) -> Backbone:
    """Find the blocks, token grid, prefix tokens and pooling of a model.

    A model of a known family is described by itself, one of timm's also within the
    ``TimmWrapperForImageClassification`` of transformers. For any other the arguments behind
    ``model`` say what it is made of; then pass the result to ``vitmix.MixingModel(...,
    backbone=...)``. Its blocks must take tokens ``(B, T, D)`` as first argument, give such tokens,
    attend once by ``scaled_dot_product_attention``, ``nn.MultiheadAttention`` or a softmax over
    ``(B, H, T, T)``, all tokens to all, and work token by token apart from that.

    What differs from this is said block by block with a :class:`vitmix.Block`: parts in which
    vertical mixing acts (``entry``, ``attention``; the whole block otherwise), tokens laid out as a
    map (``layout``), coarser grids and other widths of later stages (``stride``, ``width``),
    attention within windows or to reduced keys (``reach``), several attention calls, no residual
    connection, or one around an attention branch that is all there is of the block
    (``skip_outside``).

    Args:
        model: the model; it is only looked at.
        blocks: transformer blocks in order, for a home-made model.
        grid: rows and columns of image tokens at the first block, or a function that gives them for
            an input of ``(height, width)`` pixels.
        embed_dim: width of a token, where its block says nothing else.
        num_prefix_tokens: tokens in front that stand for no image region.
        class_token: whether the first of them is a class token; yes if there are any by default.
        pooling: see :class:`vitmix.Backbone`; by default the class token, else the average of image
            tokens.
        pool_scores: for pooling ``"sequence"``: the module that gives a score a token, prefix
            tokens aside or not.
        class_layers: for pooling ``"class_attention"``: number of layers behind the blocks in which
            a class token attends to itself and the others.
        recomputes: whether activations are recomputed in the backward pass just now.
        alignment_reason: why shares cannot be followed to the output, if they can't: a pooling that
            is no weighted mean of tokens.
        vertical_reason: why blocks cannot attend to more tokens, if they can't: attention with a
            position bias or rotary embeddings; known by itself where a block has a ``reach`` or
            takes a map.

    Returns:
        What was found.

    Raises:
        UnsupportedModelError: the model is of no supported family, or has a part that token mixing
            cannot follow; the message names what was looked for and what was found.
        InputError: arguments that don't fit together.

    Example:
        >>> from vitmix.models import create_model
        >>> describe(create_model("cct_2_3x2_32", num_classes=10)).num_prefix_tokens
        0
        >>> layers = [nn.TransformerEncoderLayer(32, 2, 64, batch_first=True) for _ in range(2)]
        >>> model = nn.Sequential(*layers)
        >>> describe(model, blocks=layers, grid=(4, 4), embed_dim=32).pooling
        'average'

        Attention within windows of 7 x 7, in blocks that take maps ``(B, h, w, D)``::

            def reach(grid):
                return functional.Reach(grid, windows=functional.windows(grid, (7, 7)))

            Block(layer, layer.norm, layer.attention, layout="channels_last", reach=reach)
    """
    if blocks is not None:
        return describe_by_hand(
            model,
            blocks,
            grid=grid,
            embed_dim=embed_dim,
            num_prefix_tokens=num_prefix_tokens,
            class_token=class_token,
            pooling=pooling,
            pool_scores=pool_scores,
            class_layers=class_layers,
            recomputes=recomputes,
            alignment_reason=alignment_reason,
            vertical_reason=vertical_reason,
        ).within(model)
    given = (grid, embed_dim, class_token, pooling, pool_scores, recomputes)
    reasons = (alignment_reason, vertical_reason)
    if (
        num_prefix_tokens
        or class_layers
        or any(argument is not None for argument in (*given, *reasons))
    ):
        raise InputError(
            "expected `blocks` with arguments that describe a model by hand, got none; "
            "a model of a known family is described by itself"
        )
    backbone = _known(model)
    if backbone is not None:
        return backbone.within(model)
    inner = _inside(model)
    kind, why = type(inner), unsupported.explain(inner)
    hint = "" if why else _hint(inner)
    raise UnsupportedModelError(
        f"looked for one of: {'; '.join(family.LOOKS_FOR for family in _FAMILIES)}; or `blocks` "
        f"given to vitmix.describe. Found {kind.__module__}.{kind.__qualname__}{why} with children "
        f"{[name for name, _ in inner.named_children()]}{hint}. The model was not changed."
    )


def _known(model: nn.Module) -> Backbone | None:
    """The description of a model of a known family; None for any other."""
    inner = _inside(model)
    found = (family.describe(inner) for family in _FAMILIES)
    return next((backbone for backbone in found if backbone is not None), None)


def known_part(model: nn.Module) -> tuple[str, Backbone] | None:
    """Name and description of a model, or of its first part, of a known family; None if none is."""
    for name, part in model.named_modules():
        try:
            backbone = _known(part)
        except UnsupportedModelError:
            continue
        if backbone is not None:
            return name, backbone
    return None


def _hint(model: nn.Module) -> str:
    """What to do with a part that is of a known family; empty if none is."""
    found = known_part(model)
    if found is None:
        return ""
    return (
        f", of which {found[0]!r} is a {found[1].family}: if its tokens are pooled as it does "
        "itself, give `backbone`, what vitmix.describe finds in that part, to MixingModel"
    )


def describe_pixels(model: nn.Module) -> Backbone:
    """Describe a model whose tokens nobody will look at.

    A model that :func:`describe` refuses is described without blocks. One that runs another
    (compiled, or in parallel) has the cells of that one, for masks of tokens; any other has its
    patches where timm made them, else cells of 16 x 16 pixels.
    """
    try:
        return describe(model)
    except UnsupportedModelError:
        inner = unsupported.wrapped(model)
        if inner is not None:
            return replace(describe_pixels(inner), blocks=())
        return Backbone(
            family=type(model).__name__,
            blocks=(),
            embed_dim=0,
            num_prefix_tokens=0,
            class_token=False,
            pooling="average",
            grid=_cells(model),
        )


def _cells(model: Any) -> Callable[[tuple[int, int]], tuple[int, int]]:
    patch_embed = getattr(model, "patch_embed", None)
    if is_made_by(patch_embed, "timm.layers.patch_embed", "PatchEmbed"):
        return grid_of(patch_embed)
    return _sixteenths


def _inside(model: nn.Module) -> nn.Module:
    """The model of timm that transformers wraps; any other model itself."""
    wrapper = "transformers.models.timm_wrapper.modeling_timm_wrapper"
    if is_made_by(model, wrapper, "TimmWrapperForImageClassification"):
        return model.get_submodule("timm_model")
    return model


def _sixteenths(size: tuple[int, int]) -> tuple[int, int]:
    return max(1, size[0] // 16), max(1, size[1] // 16)
