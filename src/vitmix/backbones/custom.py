"""A description by hand, for models of no known family."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch import nn

from vitmix.backbones.base import LAYOUTS, POOLINGS, Backbone, Block, Pooling, Reason
from vitmix.errors import InputError, UnsupportedModelError

__all__ = ["Grid", "describe_by_hand"]

PLACED = (
    "blocks with windows, reduced keys or a map of tokens: a token that is put behind the others "
    "has no place there"
)

Grid = tuple[int, int] | Callable[[tuple[int, int]], tuple[int, int]]


def describe_by_hand(
    model: nn.Module,
    blocks: Sequence[nn.Module | Block],
    *,
    grid: Grid | None,
    embed_dim: int | None,
    num_prefix_tokens: int,
    class_token: bool | None,
    pooling: Pooling | None,
    pool_scores: nn.Module | None,
    class_layers: int,
    recomputes: Callable[[], bool] | None,
    alignment_reason: Reason,
    vertical_reason: Reason,
) -> Backbone:
    """See :func:`vitmix.describe`."""
    if grid is None or embed_dim is None:
        raise InputError(
            "expected `grid` (rows and columns of image tokens, or a function that gives them for "
            "an input of (height, width) pixels) and `embed_dim` (width of a token) beside "
            f"`blocks`, got grid={grid} and embed_dim={embed_dim}"
        )
    if embed_dim < 1 or num_prefix_tokens < 0:
        raise InputError(
            "expected `embed_dim` of at least 1 and `num_prefix_tokens` of at least 0, got "
            f"{embed_dim} and {num_prefix_tokens}"
        )
    first = num_prefix_tokens > 0 if class_token is None else class_token
    if first and not num_prefix_tokens:
        raise InputError(
            "expected `num_prefix_tokens` of at least 1 with a class token, got 0: the class token "
            "is one of them"
        )
    pooling = _pooling(pooling, first, num_prefix_tokens, pool_scores, class_layers)
    if not isinstance(blocks, Iterable):
        raise InputError(
            f"expected `blocks` as modules in order, got one {type(blocks).__name__}; give its "
            "layers"
        )
    described = tuple(_block(index, block) for index, block in enumerate(blocks))
    placed = any(block.reach is not None or block.layout != "tokens" for block in described)
    if placed and num_prefix_tokens:
        raise InputError(
            "expected `num_prefix_tokens` of 0 with blocks that have a `reach` or take tokens as a "
            f"map, got {num_prefix_tokens}: a prefix token has no place there"
        )
    backbone = Backbone(
        family=type(model).__name__,
        blocks=described,
        embed_dim=embed_dim,
        num_prefix_tokens=num_prefix_tokens,
        class_token=first,
        pooling=pooling,
        grid=grid if callable(grid) else partial(_fixed, _checked(grid)),
        pool_scores=pool_scores,
        class_layers=class_layers,
        recomputes=bool if recomputes is None else recomputes,
        alignment_reason=alignment_reason,
        vertical_reason=PLACED if placed and vertical_reason is None else vertical_reason,
    )
    if not backbone.blocks:
        raise InputError("expected `blocks` of at least one module, got none")
    if len({block.module for block in backbone.blocks}) < backbone.depth:
        raise UnsupportedModelError(
            "looked for blocks that are each called once, found one module at two places of "
            "`blocks`. The model was not changed."
        )
    backbone.require_part_of(model)
    return backbone


def _block(index: int, block: object) -> Block:
    if isinstance(block, nn.Module):
        block = Block(module=block, entry=block, attention=block)
    if not isinstance(block, Block):
        raise InputError(
            f"expected `blocks` of nn.Module or vitmix.Block, got {type(block).__name__} at {index}"
        )
    _require_tokens(index, block)
    if block.layout not in LAYOUTS:
        raise InputError(
            f"expected `layout` of block {index} as one of {', '.join(LAYOUTS)}, "
            f"got {block.layout!r}"
        )
    for name in ("stride", "width", "attentions"):
        value = getattr(block, name)
        if value is not None and value < 1:
            raise InputError(f"expected `{name}` of block {index} of at least 1, got {value}")
    return block


def _require_tokens(index: int, block: Block) -> None:
    """Check that a block is given its tokens once, samples first."""
    for role in ("module", "entry"):
        part = getattr(block, role)
        if isinstance(part, nn.MultiheadAttention):
            raise UnsupportedModelError(
                f"looked for a {role} of block {index} that takes tokens as its first argument "
                "alone, found nn.MultiheadAttention, which takes queries, keys and values. Give "
                "the module that calls it. The model was not changed."
            )
    for part in (getattr(block.module, "self_attn", None), block.attention):
        if isinstance(part, nn.MultiheadAttention) and not part.batch_first:
            raise UnsupportedModelError(
                "looked for tokens (B, T, D), found nn.MultiheadAttention with batch_first=False "
                f"in {type(block.module).__name__} at block {index}. The model was not changed."
            )


def _pooling(
    pooling: Pooling | None,
    class_token: bool,
    prefix: int,
    scores: nn.Module | None,
    class_layers: int,
) -> Pooling:
    if pooling is None:
        pooling = "class_token" if class_token else "average"
    if pooling not in POOLINGS:
        raise InputError(f"expected `pooling` as one of {', '.join(POOLINGS)}, got {pooling!r}")
    needed = {"class_token": 1, "class_and_average": 1, "distilled": 2}.get(pooling, 0)
    if prefix < needed or (needed and not class_token):
        raise InputError(
            f"expected a class token and `num_prefix_tokens` of at least {needed} for pooling "
            f"{pooling!r}, got class_token={class_token} and {prefix}"
        )
    if (pooling == "sequence") != (scores is not None):
        raise InputError(
            "expected `pool_scores`, the module that scores tokens, with pooling 'sequence' and "
            f"only then, got pooling {pooling!r} and pool_scores={scores}"
        )
    if (pooling == "class_attention") != (class_layers > 0):
        raise InputError(
            "expected `class_layers`, in which a class token attends to the others, with pooling "
            f"'class_attention' and only then, got pooling {pooling!r} and {class_layers}"
        )
    return pooling


def _checked(grid: Any) -> tuple[int, int]:
    sizes = tuple(grid) if isinstance(grid, Sequence) else ()
    if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise InputError(f"expected `grid` as (rows, columns) of image tokens, got {grid}")
    return sizes


def _fixed(grid: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    return grid
