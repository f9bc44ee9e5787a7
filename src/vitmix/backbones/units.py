"""Hiera, in whatever library: attention within mask units.

Tokens are in such an order that those of a unit lie at equal distances, all the way.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from math import isqrt
from typing import Any

from torch import Tensor

from vitmix.backbones.staged import Located, attends
from vitmix.functional.grids import Grid
from vitmix.functional.reach import Reach

__all__ = ["unit_blocks"]


def unit_blocks(
    modules: Iterable[Any],
    order: Tensor,
    width: int,
    pixels: int,
    *,
    entry: str = "norm1",
    query_stride: str = "q_stride",
    always_in_units: bool = False,
) -> Located:
    """Blocks in order, each with the pixels that a side of a token that comes out stands for.

    Args:
        modules: blocks with their attention under ``attn``.
        order: ``(N,)`` which token of the grid is at each place of the first block's sequence.
        width: columns of that grid.
        pixels: that a side of one of its tokens stands for.
        entry: name of a block's norm in front of the attention.
        query_stride: name of the number of queries of an attention that become one.
        always_in_units: whether attention is cut into units even where there is one alone.
    """
    for module in modules:
        attention, stride, merged = module.attn, 1, order
        if getattr(attention, query_stride) > 1:
            stride = isqrt(getattr(attention, query_stride))
            cells = order // width // stride * (width // stride) + order % width // stride
            merged = cells[: len(order) // stride**2]
        count = 1
        if attention.use_mask_unit_attn:
            count = len(merged) // attention.window_size
        block = attends(
            module,
            entry,
            order=order,
            heads_first=always_in_units or attention.use_mask_unit_attn,
            stride=stride,
            reach=partial(_units, order.view(-1, count).T, merged.view(-1, count).T, stride),
        )
        order, width, pixels = merged, width // stride, pixels * stride
        yield block, pixels


def _units(keys: Tensor, queries: Tensor, stride: int, grid: Grid) -> Reach:
    merged = (grid[0] // stride, grid[1] // stride)
    return Reach(grid, windows=keys, queries=merged, query_windows=queries)
