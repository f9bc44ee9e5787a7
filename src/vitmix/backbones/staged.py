"""What families with stages, windows or reduced keys have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from vitmix.backbones.base import Backbone, Block, Layout, Pooling, Reason, is_made_by
from vitmix.errors import UnsupportedModelError
from vitmix.functional.grids import Grid
from vitmix.functional.reach import Reach, windows

__all__ = [
    "BIASED",
    "MAPPED",
    "REDUCED",
    "WINDOWED",
    "Located",
    "StagedFamily",
    "Stages",
    "attends",
    "average_reason",
    "describe_staged",
    "in_stages",
    "in_windows",
    "on_grids",
    "pooled",
    "recomputes_of",
    "reduce_by",
    "stages_of",
    "to_reduced",
]

WINDOWED = (
    "attention within windows: a token that is put behind the others has no place in a window"
)
REDUCED = (
    "attention to reduced keys: a token that is put behind the others has no place in the image to "
    "be merged in"
)
BIASED = "a position bias in attention: a token that is put behind the others has no position"
MAPPED = "tokens laid out as a map: there is no place behind the others"

Stages = Iterable[tuple[nn.Module, int]]
Located = Iterable[tuple[Block, int]]


def stages_of(model: Any) -> Stages:
    """Stages of a timm model, each with the pixels that a side of its tokens stands for."""
    return [(model.get_submodule(info["module"]), info["reduction"]) for info in model.feature_info]


def in_stages(
    block: Callable[[Any], Block | None], stages: Callable[[Any], Stages] = stages_of
) -> Callable[[Any], Located]:
    """What finds the blocks of a model.

    Args:
        block: the block that a module is, with ``stride`` of its own queries; None if it is none.
        stages: stages of a model, each with the pixels that a side of its tokens stands for.
    """
    return partial(_in_stages, block, stages)


def _in_stages(
    describe: Callable[[Any], Block | None], stages: Callable[[Any], Stages], model: Any
) -> Located:
    return [
        (block, pixels)
        for stage, pixels in stages(model)
        for block in map(describe, stage.modules())
        if block is not None
    ]


@dataclass(frozen=True)
class StagedFamily:
    """How a class of timm's models attends.

    Attributes:
        module: where the class is defined.
        blocks: blocks of a model in order, with ``stride`` of their own queries, each with the
            pixels that a side of a token that comes out stands for.
        vertical: why a block cannot attend to more tokens than its own, or None if it can.
        grid: token grid of an input size; the pixels divided, rounded up, by default.
        class_layers: name of the layers behind the blocks in which a class token attends to the
            others, if there are any.
        aligned: why shares cannot be followed to the output of a model, or None if they can.
        tokens: why tokens cannot be followed through a model, or None if they can.
    """

    module: str
    blocks: Callable[[Any], Located]
    vertical: Reason
    grid: Callable[[Any], Callable[[tuple[int, int]], Grid]] | None = None
    class_layers: str | None = None
    aligned: Callable[[Any], Reason] | None = None
    tokens: Callable[[Any], Reason] | None = None


def describe_staged(families: Mapping[str, StagedFamily], model: nn.Module) -> Backbone | None:
    """Describe a model of one of these classes; None for any other.

    Raises:
        UnsupportedModelError: a model of one of these classes without attention.
    """
    for name, family in families.items():
        if is_made_by(model, family.module, name):
            return _describe(family, model)
    return None


def _describe(family: StagedFamily, model: Any) -> Backbone:
    name = f"timm {type(model).__name__}"
    blocks, pixels = on_grids(name, family.blocks(model))
    prefix, pooling, reason, layers = 0, *_pooling(model), 0
    if family.class_layers is None:
        prefix = int(getattr(model, "num_prefix_tokens", getattr(model, "num_tokens", 0)))
    elif pooling == "class_token":
        pooling, layers = "class_attention", len(getattr(model, family.class_layers))
    if reason is None and family.aligned is not None:
        reason = family.aligned(model)
    return Backbone(
        family=name,
        blocks=blocks,
        embed_dim=blocks[0].width or 0,
        num_prefix_tokens=prefix,
        class_token=prefix > 0,
        pooling=pooling,
        grid=partial(reduce_by, stride=pixels) if family.grid is None else family.grid(model),
        class_layers=layers,
        recomputes=recomputes_of(model),
        alignment_reason=reason,
        vertical_reason=family.vertical,
        tokens_reason=None if family.tokens is None else family.tokens(model),
    )


def on_grids(name: str, located: Located) -> tuple[tuple[Block, ...], int]:
    """Blocks, and the pixels that a side of a token stands for in front of the first.

    Raises:
        UnsupportedModelError: there are none.
    """
    found = [(block, pixels // block.stride) for block, pixels in located]
    if not found:
        raise UnsupportedModelError(
            f"looked for attention between tokens in the stages of {name}, found no attention. "
            "The model was not changed."
        )
    first = found[0][1]
    return tuple(replace(block, stride=pixels // first) for block, pixels in found), first


def _pooling(model: Any) -> tuple[Pooling, Reason]:
    pool = getattr(model, "global_pool", None)
    if pool is None:
        pool = getattr(model.head, "global_pool", None) or model.head.pool_type
    kind = getattr(pool, "pool_type", pool)
    if kind == "token":
        return ("distilled" if getattr(model, "head_dist", None) else "class_token"), None
    return "average", average_reason(kind)


def average_reason(pooling: str) -> Reason:
    """Why shares cannot be followed through a pooling that is not the average."""
    if pooling in ("avg", "fast"):
        return None
    return f"pooling {pooling!r} is not a weighted mean of tokens; use global_pool='avg'"


def attends(
    module: Any,
    entry: str = "norm1",
    attention: str = "attn",
    layout: Layout = "tokens",
    reach: Callable[[Grid], Reach] | None = None,
    *,
    width: int | None = None,
    **options: Any,
) -> Block:
    """A block, by the names of its parts.

    Args:
        module: the block.
        entry: its layer inside whose input becomes queries, keys and values.
        attention: its attention.
        layout: see :class:`vitmix.Block`.
        reach: see :class:`vitmix.Block`.
        width: channels of a token; those of ``entry`` by default.
        options: see :class:`vitmix.Block`.
    """
    layer = module.get_submodule(entry)
    return Block(
        module=module,
        entry=layer,
        attention=module.get_submodule(attention),
        layout=layout,
        width=_width(layer) if width is None else width,
        reach=reach,
        **options,
    )


def _width(layer: nn.Module) -> int:
    """Channels that go into a norm, a linear layer or a 1 x 1 convolution."""
    weight = next(layer.parameters())
    return weight.shape[min(1, weight.ndim - 1)]


def reduce_by(grid: Grid, stride: int) -> Grid:
    """Token grid behind a step that leaves one token of each cell, the last cells cut off."""
    return -(-grid[0] // stride), -(-grid[1] // stride)


def to_reduced(keys: int, queries: int, grid: Grid, *, restored: bool = False) -> Reach:
    """Keys and queries merged by these strides."""
    return Reach(
        grid,
        keys=reduce_by(grid, keys) if keys > 1 else None,
        queries=reduce_by(grid, queries) if queries > 1 else None,
        restored=restored,
    )


def pooled(side: int, grid: Grid) -> Reach:
    """Keys averaged to so many a side, whatever the grid."""
    return Reach(grid, keys=(side, side), adaptive=True)


def in_windows(size: Grid, grid: Grid) -> Reach:
    """Attention within windows of this size, the last ones padded."""
    return Reach(grid, windows=windows(grid, size))


def recomputes_of(model: nn.Module) -> Callable[[], bool]:
    """Whether some part of a timm model recomputes activations just now."""
    return partial(
        _any_recomputes, [part for part in model.modules() if hasattr(part, "grad_checkpointing")]
    )


def _any_recomputes(parts: Sequence[Any]) -> bool:
    return any(part.grad_checkpointing for part in parts)
