"""What families with stages, windows or reduced keys have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from vitmix.backbones.base import Block, Reason
from vitmix.functional.grids import Grid

__all__ = [
    "BIASED",
    "REDUCED",
    "WINDOWED",
    "average_reason",
    "grid_by",
    "recomputes_of",
    "reduce_by",
    "staged_blocks",
    "stages_of",
    "width_of",
]

WINDOWED = (
    "attention within windows: a token that is put behind the others has no place in a window"
)
REDUCED = (
    "attention to reduced keys: a token that is put behind the others has no place in the image to "
    "be merged in"
)
BIASED = "a position bias in attention: a token that is put behind the others has no position"

Stages = Iterable[tuple[nn.Module, int]]


def average_reason(pooling: str) -> Reason:
    """Why shares cannot be followed through a pooling that is not the average."""
    if pooling in ("avg", "fast"):
        return None
    return f"pooling {pooling!r} is not a weighted mean of tokens; use global_pool='avg'"


def reduce_by(grid: Grid, stride: int) -> Grid:
    """Token grid behind a step that keeps one token a cell, the last cells cut off."""
    return -(-grid[0] // stride), -(-grid[1] // stride)


def grid_by(pixels: int) -> Callable[[tuple[int, int]], Grid]:
    """Token grid of an input size, for the pixels that one side of a token stands for."""
    return partial(reduce_by, stride=pixels)


def stages_of(model: Any) -> list[tuple[nn.Module, int]]:
    """Stages of a timm model, each with the pixels that a side of its tokens stands for."""
    return [(model.get_submodule(info["module"]), info["reduction"]) for info in model.feature_info]


def staged_blocks(
    stages: Stages, describe: Callable[[Any], Block | None]
) -> tuple[tuple[Block, ...], int]:
    """Blocks of stages, with strides from the first block's token grid.

    Args:
        stages: each with the pixels that a side of its tokens stands for.
        describe: the block that a module is, or None if it is none; with ``stride`` of its own
            queries.

    Returns:
        Blocks in order, and the pixels that a side of a token stands for at the first of them.
    """
    found = [
        (pixels // block.stride, block)
        for stage, pixels in stages
        for block in map(describe, stage.modules())
        if block is not None
    ]
    first = found[0][0]
    return tuple(replace(block, stride=pixels // first) for pixels, block in found), first


def width_of(layer: nn.Module) -> int:
    """Channels that go into a norm, a linear layer or a 1 x 1 convolution."""
    weight = next(layer.parameters())
    return weight.shape[min(1, weight.ndim - 1)]


def recomputes_of(model: nn.Module) -> Callable[[], bool]:
    """Whether some part of a timm model recomputes activations just now."""
    return partial(
        _any_recomputes, [part for part in model.modules() if hasattr(part, "grad_checkpointing")]
    )


def _any_recomputes(parts: Sequence[Any]) -> bool:
    return any(part.grad_checkpointing for part in parts)
