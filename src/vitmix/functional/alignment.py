"""Carry label shares through attention (TL-Align, Xiao et al. 2023).

A token's label is a mixture of the labels of K sources, and rows of attention sum to 1. So instead
of a ``(B, N, C)`` label tensor it is enough to move the shares of the sources, ``(B, N, K)``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitmix.errors import InputError
from vitmix.functional.precision import no_autocast
from vitmix.functional.riding import MAX_WIDTH, attend, padded_width

__all__ = [
    "align_shares",
    "attend_with_shares",
    "attended_by_keys",
    "attended_shares",
    "pooled_shares",
]


def align_shares(shares: Tensor, attention: Tensor, *, key_shares: Tensor | None = None) -> Tensor:
    """Move shares through one attention layer with its residual connection (TL-Align).

    ``(mean_h(A) @ shares + shares) / 2``: half from attention, half from the residual connection.

    Args:
        shares: ``(B, N, K)``, rows sum to 1.
        attention: ``(B, H, N, N)`` after softmax, before dropout; no gradient is kept.
        key_shares: ``(B, M, K)`` shares of the keys when they are not the queries, with
            ``attention`` ``(B, H, N, M)``.

    Returns:
        ``(B, N, K)``, rows sum to 1.

    Raises:
        InputError: shapes that don't fit.

    Example:
        >>> shares = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> align_shares(shares, torch.full((1, 1, 2, 2), 0.5))
        tensor([[[0.7500, 0.2500],
                 [0.2500, 0.7500]]])
    """
    keys = shares if key_shares is None else key_shares
    expected = (len(shares), shares.shape[1], keys.shape[1])
    if attention.ndim != 4 or (len(attention), *attention.shape[2:]) != expected:
        raise InputError(
            f"expected `attention` ({expected[0]}, H, {expected[1]}, {expected[2]}) for `shares` "
            f"{tuple(shares.shape)}, got {tuple(attention.shape)}"
        )
    with no_autocast(shares):
        return (attention.detach().to(shares.dtype).mean(1) @ keys + shares) / 2


def attended_shares(attention: Tensor, key_shares: Tensor) -> Tensor:
    """Shares that queries get from what they attend to, over those keys that have shares.

    Args:
        attention: ``(..., H, N, M)`` after softmax, before dropout; no gradient is kept.
        key_shares: ``(B, M, K)``; rows sum to 1, or are 0 for padding.

    Returns:
        ``(B, N, K)``, rows sum to 1.
    """
    heads = attention.detach().flatten(0, -4).to(key_shares.dtype).mean(1)
    with no_autocast(key_shares):
        attended = heads @ key_shares
    return attended / attended.sum(-1, keepdim=True)


def attend_with_shares(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shares: Tensor,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Fused attention that carries shares along: ``softmax(q k) v`` and ``mean_h(A) @ shares``.

    The shares ride as extra value channels of one and the same kernel call, so that no ``(N, M)``
    matrix is ever held. With attention dropout, which must not touch them, they take a second call
    without gradient.

    Args:
        query: ``(B, H, N, d)``.
        key: ``(B, H, M, d)``.
        value: ``(B, H, M, e)``.
        shares: ``(B, M, K)`` float32 shares of the keys; rows sum to 1, or are 0 for padding, which
            then does not count.
        attn_mask: as for ``torch.nn.functional.scaled_dot_product_attention``.
        dropout_p: attention dropout of the model's own output.
        is_causal: as for ``scaled_dot_product_attention``.
        scale: factor on the products; ``1 / sqrt(d)`` by default.

    Returns:
        Output ``(B, H, N, e)``, with gradient, and attended shares ``(B, N, K)``, without. The
        residual half of :func:`align_shares` is not in them.

    Example:
        >>> query, shares = torch.zeros(1, 1, 2, 4), torch.eye(2)[None]
        >>> attend_with_shares(query, query, query, shares)[1]
        tensor([[[0.5000, 0.5000],
                 [0.5000, 0.5000]]])
    """
    width, extra = max(value.shape[-1], query.shape[-1]), shares.shape[-1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    options: dict[str, Any] = {"attn_mask": attn_mask, "is_causal": is_causal, "scale": scale}
    if dropout_p > 0.0 or padded_width(width + extra) > MAX_WIDTH:
        output = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, **options)
        return output, attended_by_keys(query, key, shares, **options)
    riders, centre = _riders(shares, value)
    output, attended = attend(query, key, value, riders, **options)
    return output, _landed(attended, centre)


@torch.no_grad()
def attended_by_keys(
    query: Tensor,
    key: Tensor,
    shares: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Shares that queries get from what they attend to, by a fused call of their own.

    Args:
        query: ``(B, H, N, d)``.
        key: ``(B, H, M, d)``.
        shares: ``(B, M, K)`` as for :func:`attend_with_shares`.
        attn_mask: as for ``scaled_dot_product_attention``.
        is_causal: as for ``scaled_dot_product_attention``.
        scale: factor on the products; ``1 / sqrt(d)`` by default.

    Returns:
        ``(B, N, K)``, rows sum to 1.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    riders, centre = _riders(shares, key)
    nothing = riders[..., :0]
    options: dict[str, Any] = {"attn_mask": attn_mask, "is_causal": is_causal, "scale": scale}
    return _landed(attend(query, key, nothing, riders, **options)[1], centre)


def _riders(shares: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Shares as value channels ``(B, H, M, K)``, less their mean ``(B, 1, K)``.

    Rows of A sum to 1, so a constant per source can be left at home: what is rounded to the
    kernel's dtype is then only the small deviation from it.
    """
    centre = shares.mean(1, keepdim=True)
    return (shares - centre).to(like.dtype)[:, None].expand(-1, like.shape[1], -1, -1), centre


def _landed(attended: Tensor, centre: Tensor) -> Tensor:
    """Shares ``(B, N, K)`` from what riders have become.

    Rounding may leave a share just below 0 or a row that is not quite 1.
    """
    attended = (attended.to(centre.dtype) + centre).clamp_min(0)
    return attended / attended.sum(-1, keepdim=True)


def pooled_shares(shares: Tensor, weights: Tensor) -> Tensor:
    """Shares of what a model pools from its tokens (TL-Align: the label that the target is).

    Args:
        shares: ``(B, N, K)``.
        weights: ``(B, N)`` weight of each token in the pooling.

    Returns:
        ``(B, K)``.

    Example:
        >>> pooled_shares(torch.eye(2)[None], torch.tensor([[0.75, 0.25]]))
        tensor([[0.7500, 0.2500]])
    """
    return (shares * weights.to(shares.dtype)[..., None]).sum(1)
