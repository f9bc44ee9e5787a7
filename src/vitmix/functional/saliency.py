"""How much each token matters: saliency read from attention (TokenMixup, Eq. 2 and 3)."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from vitmix.errors import InputError
from vitmix.functional.precision import no_autocast, wide

__all__ = [
    "attention_rollout",
    "attention_saliency",
    "column_saliency",
    "query_key_attention",
    "query_key_saliency",
]

# Elements of attention held at once by the column mean: 4 megabytes of float32, which stay in the
# processor's cache and seldom let threads wait for each other, or 16 where each call has to be
# worth its while.
_HELD_BY_CACHE, _HELD_BY_DEVICE = 1 << 20, 1 << 22


def attention_saliency(
    attention: Tensor, *, num_prefix_tokens: int = 0, class_token: bool = True
) -> Tensor:
    """Saliency of each token from one attention map (TokenMixup, Eq. 3).

    Heads are averaged first. Without prefix tokens a token's saliency is the attention that it gets
    from all queries on average, as in the paper, so that a row sums to 1. With a class token it is
    what the class token gives it, as in the released code for ViT; prefix columns are left out and
    the row is not normalised again.

    Args:
        attention: ``(B, H, N, N)``, after softmax over the last axis and before dropout.
        num_prefix_tokens: tokens in front that stand for no image region (class, registers).
        class_token: whether the first prefix token is a class token. If not (registers only), the
            mean over the queries of image tokens is taken.

    Returns:
        ``(B, N - num_prefix_tokens)`` saliency, float32 or wider.

    Raises:
        InputError: not four axes, or no image token left.

    Example:
        >>> attention_saliency(torch.full((1, 2, 4, 4), 0.25))
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    if attention.ndim != 4:
        raise InputError(
            f"expected `attention` of shape (B, H, N, N), got {tuple(attention.shape)}"
        )
    if not 0 <= num_prefix_tokens < attention.shape[-1]:
        raise InputError(
            f"expected `num_prefix_tokens` from 0 to {attention.shape[-1] - 1}, "
            f"got {num_prefix_tokens}"
        )
    attention = wide(attention)
    if num_prefix_tokens and class_token:
        return attention[:, :, 0, num_prefix_tokens:].mean(1)
    return attention[:, :, num_prefix_tokens:, num_prefix_tokens:].mean((1, 2))


def attention_rollout(attentions: Sequence[Tensor] | Tensor) -> Tensor:
    """Product of the head means of successive layers (TokenMixup, Eq. 2).

    Args:
        attentions: attention ``(B, H, N, N)`` of layer i, i + 1, ... in this order.

    Returns:
        ``(B, N, N)``; ``attention_saliency(rollout[:, None])`` is its saliency.

    Raises:
        InputError: an empty sequence.

    Example:
        >>> attention_rollout([torch.eye(3).expand(1, 2, 3, 3)] * 2)[0].trace()
        tensor(3.)
    """
    if len(attentions) == 0:
        raise InputError("expected `attentions` of at least one layer, got none")
    with no_autocast(attentions[0]):
        product = wide(attentions[0]).mean(1)
        for attention in attentions[1:]:
            product = product @ wide(attention).mean(1)
    return product


def query_key_attention(
    query: Tensor, key: Tensor, *, scale: float | None = None, attn_mask: Tensor | None = None
) -> Tensor:
    """Attention after softmax, ``(B, H, N, M)`` in float32, from queries and keys.

    Args:
        query: ``(B, H, N, d)``.
        key: ``(B, H, M, d)``.
        scale: factor on the products; ``1 / sqrt(d)`` by default.
        attn_mask: bool (True = attend) or additive, broadcastable to ``(B, H, N, M)``.

    Example:
        >>> query = torch.zeros(1, 1, 2, 4)
        >>> query_key_attention(query, query)
        tensor([[[[0.5000, 0.5000],
                  [0.5000, 0.5000]]]])
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    with no_autocast(query):
        scores = (wide(query) * scale) @ wide(key).transpose(-2, -1)
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                scores = scores.masked_fill(~attn_mask, float("-inf"))
            else:
                scores = scores + attn_mask
        if _runs_on_cpu(scores) and not scores.requires_grad:
            return torch.softmax(scores, -1, out=scores)  # row by row, in its place
        return scores.softmax(-1)


def _triton_is_asked_for(tensor: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    kernels = os.environ.get("VITMIX_KERNELS", "torch")
    if kernels not in ("torch", "triton"):
        raise InputError(f"expected VITMIX_KERNELS to be torch or triton, got {kernels!r}")
    return kernels == "triton" and tensor.device.type == "cuda" and tensor.dtype != torch.float64


def _runs_on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def query_key_saliency(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    num_prefix_tokens: int = 0,
    class_token: bool = True,
    num_keys: int | None = None,
    query_weights: Tensor | None = None,
) -> Tensor:
    """:func:`attention_saliency` from queries and keys, without the whole attention map.

    A class token's saliency needs one row of attention. The mean over queries needs all rows, but
    only some samples at a time. On CUDA with the environment variable ``VITMIX_KERNELS=triton``
    (and Triton installed) no row is ever held.

    Args:
        query: ``(B, H, N, d)``.
        key: ``(B, H, M, d)``.
        scale: factor on the products; ``1 / sqrt(d)`` by default.
        attn_mask: bool (True = attend) or additive, broadcastable to ``(B, H, N, M)``.
        num_prefix_tokens: tokens in front that stand for no image region.
        class_token: whether the first prefix token is a class token.
        num_keys: saliency is that of the first ``num_keys`` keys; as many as queries by default.
        query_weights: ``(B, N)`` weights of a sum over queries instead of their mean.

    Returns:
        ``(B, num_keys - num_prefix_tokens)`` float32.

    Example:
        >>> query, key = torch.rand(1, 2, 5, 8), torch.rand(1, 2, 5, 8)
        >>> whole = attention_saliency(query_key_attention(query, key), num_prefix_tokens=1)
        >>> torch.allclose(query_key_saliency(query, key, num_prefix_tokens=1), whole)
        True
    """
    batch, heads, tokens, _ = query.shape
    by_class_token = num_prefix_tokens > 0 and class_token
    rows = slice(0, 1) if by_class_token else slice(num_prefix_tokens, tokens)
    columns = slice(num_prefix_tokens, tokens if num_keys is None else num_keys)
    query = query[:, :, rows]
    if attn_mask is None and not by_class_token and _triton_is_asked_for(query):
        from vitmix.functional.triton_kernels import MOST_CHANNELS, column_means

        if query.shape[-1] <= MOST_CHANNELS and query.dtype == key.dtype:
            factor = query.shape[-1] ** -0.5 if scale is None else scale
            return column_means(query, key, factor, query_weights)[:, columns]
    if attn_mask is not None:
        attn_mask = attn_mask.expand(batch, heads, tokens, key.shape[2])[:, :, rows]
    held = _HELD_BY_CACHE if _runs_on_cpu(query) else _HELD_BY_DEVICE
    chunk = max(1, held // (heads * query.shape[2] * key.shape[2]))
    parts = []
    for start in range(0, batch, chunk):
        part = slice(start, start + chunk)
        mask = None if attn_mask is None else attn_mask[part]
        attention = query_key_attention(query[part], key[part], scale=scale, attn_mask=mask)
        weights = None if query_weights is None else query_weights[part]
        parts.append(column_saliency(attention, weights)[:, columns])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def column_saliency(attention: Tensor, query_weights: Tensor | None = None) -> Tensor:
    """Attention that each key gets: the mean over queries, or their weighted sum.

    Args:
        attention: ``(B, H, N, M)`` after softmax.
        query_weights: ``(B, N)``, or None for the mean.

    Returns:
        ``(B, M)``, float32 or wider.
    """
    if query_weights is None:
        return wide(attention).mean((1, 2))
    with no_autocast(attention):
        rows = wide(attention).mean(1)
        # A row that sees nothing (padding behind a mask) is no number; its weight is 0.
        rows = torch.where(query_weights[..., None] > 0, rows, 0)
        return (query_weights[:, None].to(rows.dtype) @ rows)[:, 0]
