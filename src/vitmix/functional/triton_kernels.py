"""Column means of attention by Triton kernels: nothing of size ``(N, M)`` leaves the processor.

The reference is :func:`vitmix.functional.query_key_saliency` without them. A first kernel finds
the normaliser of each row, as flash attention does; a second one computes the products again and
adds up columns. Imported for CUDA tensors only, and only if the user asks for it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["MOST_CHANNELS", "column_means"]

# Wider heads would need more shared memory than a small GPU has.
MOST_CHANNELS = 128


def column_means(
    query: Tensor, key: Tensor, scale: float, query_weights: Tensor | None = None
) -> Tensor:
    """Attention that each key gets, without the attention map.

    Args:
        query: ``(B, H, N, d)`` float32, bfloat16 or float16, with ``d`` up to 128.
        key: ``(B, H, M, d)`` of the same dtype.
        scale: factor on the products.
        query_weights: ``(B, N)`` weights of a sum over queries; None for their mean.

    Returns:
        ``(B, M)`` float32.
    """
    batch, heads, queries, channels = query.shape
    keys = key.shape[2]
    if query_weights is None:
        query_weights = query.new_full((), 1 / queries, dtype=torch.float32)
    weights = query_weights.float().expand(batch, queries)
    normaliser = query.new_empty(batch * heads, queries, dtype=torch.float32)
    sums = query.new_empty(batch * heads, keys, dtype=torch.float32)
    width = max(16, triton.next_power_of_2(channels))
    side = 64 if width <= 64 else 32
    sizes = (heads, queries, keys, channels, *query.stride(), *key.stride())
    tiles = {"SIDE": side, "WIDTH": width}
    rows = (batch * heads, triton.cdiv(queries, side))
    _normalise[rows](query, key, normaliser, scale, *sizes, **tiles)
    columns = (batch * heads, triton.cdiv(keys, side))
    _add_up[columns](
        query, key, normaliser, weights, sums, scale, *sizes, *weights.stride(), **tiles
    )
    return sums.view(batch, heads, keys).mean(1)


@triton.jit  # type: ignore[untyped-decorator]
def _tile(
    start: Any, first: Any, count: Any, channels: Any, step: Any, hop: Any,
    SIDE: tl.constexpr, WIDTH: tl.constexpr,
) -> Any:  # fmt: skip
    """``(SIDE, WIDTH)`` tokens of one head, zeros beyond the last."""
    token = first + tl.arange(0, SIDE)[:, None]
    channel = tl.arange(0, WIDTH)[None]
    inside = (token < count) & (channel < channels)
    return tl.load(start + token * step + channel * hop, mask=inside, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _normalise(
    query: Any, key: Any, normaliser: Any, scale: Any,
    heads: Any, queries: Any, keys: Any, channels: Any,
    query_sample: Any, query_head: Any, query_token: Any, query_channel: Any,
    key_sample: Any, key_head: Any, key_token: Any, key_channel: Any,
    SIDE: tl.constexpr, WIDTH: tl.constexpr,
) -> None:  # fmt: skip
    """Logarithm of the sum of exponentials of each row of scores."""
    both = tl.program_id(0).to(tl.int64)
    sample, head = both // heads, both % heads
    query += sample * query_sample + head * query_head
    key += sample * key_sample + head * key_head
    first = tl.program_id(1) * SIDE
    own = _tile(query, first, queries, channels, query_token, query_channel, SIDE, WIDTH)
    greatest = tl.full((SIDE,), float("-inf"), tl.float32)
    total = tl.zeros((SIDE,), tl.float32)
    for start in range(0, keys, SIDE):
        other = _tile(key, start, keys, channels, key_token, key_channel, SIDE, WIDTH)
        scores = tl.dot(own, tl.trans(other), input_precision="ieee") * scale
        column = start + tl.arange(0, SIDE)
        scores = tl.where(column[None] < keys, scores, float("-inf"))
        above = tl.maximum(greatest, tl.max(scores, 1))
        total = total * tl.exp(greatest - above) + tl.sum(tl.exp(scores - above[:, None]), 1)
        greatest = above
    row = first + tl.arange(0, SIDE)
    tl.store(normaliser + both * queries + row, greatest + tl.log(total), mask=row < queries)


@triton.jit  # type: ignore[untyped-decorator]
def _add_up(
    query: Any, key: Any, normaliser: Any, weights: Any, sums: Any, scale: Any,
    heads: Any, queries: Any, keys: Any, channels: Any,
    query_sample: Any, query_head: Any, query_token: Any, query_channel: Any,
    key_sample: Any, key_head: Any, key_token: Any, key_channel: Any,
    weight_sample: Any, weight_token: Any,
    SIDE: tl.constexpr, WIDTH: tl.constexpr,
) -> None:  # fmt: skip
    """Weighted sum of each column of attention."""
    both = tl.program_id(0).to(tl.int64)
    sample, head = both // heads, both % heads
    query += sample * query_sample + head * query_head
    key += sample * key_sample + head * key_head
    first = tl.program_id(1) * SIDE
    own = tl.trans(_tile(key, first, keys, channels, key_token, key_channel, SIDE, WIDTH))
    total = tl.zeros((SIDE,), tl.float32)
    for start in range(0, queries, SIDE):
        other = _tile(query, start, queries, channels, query_token, query_channel, SIDE, WIDTH)
        scores = tl.dot(other, own, input_precision="ieee") * scale
        row = start + tl.arange(0, SIDE)
        inside = row < queries
        norm = tl.load(normaliser + both * queries + row, mask=inside, other=0.0)
        place = sample * weight_sample + row * weight_token
        weight = tl.load(weights + place, mask=inside, other=0.0)
        total += tl.sum(tl.exp(scores - norm[:, None]) * weight[:, None], 0)
    column = first + tl.arange(0, SIDE)
    tl.store(sums + both * keys + column, total, mask=column < keys)
