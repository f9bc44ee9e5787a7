"""Vertical TokenMixup: the most salient tokens of earlier layers (TokenMixup, Sec. 3.4)."""

from __future__ import annotations

from torch import Tensor

from vitmix.errors import InputError

__all__ = ["salient_indices", "salient_tokens", "take_tokens"]


def salient_indices(saliency: Tensor, kappa: int, *, num_prefix_tokens: int = 0) -> Tensor:
    """Positions in the whole sequence of the ``kappa`` most salient tokens.

    Args:
        saliency: ``(B, N)``, of the tokens behind the prefix.
        kappa: how many, from 1 to N.
        num_prefix_tokens: tokens in front of those that ``saliency`` covers.

    Returns:
        ``(B, kappa)`` int64, most salient first.

    Raises:
        InputError: ``kappa`` out of range.

    Example:
        >>> import torch
        >>> salient_indices(torch.tensor([[0.1, 0.2, 0.7]]), 2, num_prefix_tokens=1)
        tensor([[3, 2]])
    """
    if not 1 <= kappa <= saliency.shape[1]:
        raise InputError(
            f"expected `kappa` from 1 to the {saliency.shape[1]} tokens of a layer, got {kappa}"
        )
    return saliency.topk(kappa, dim=1).indices + num_prefix_tokens


def salient_tokens(
    tokens: Tensor, saliency: Tensor, kappa: int, *, num_prefix_tokens: int = 0
) -> Tensor:
    """Collect the ``kappa`` most salient tokens of a layer's input (TokenMixup, Sec. 3.4).

    The released code counts positions without the class token and uses them on the sequence that
    has one, which selects the token before each salient one; here positions are right.

    Args:
        tokens: ``(B, num_prefix_tokens + N, D)``, the input of a layer.
        saliency: ``(B, N)``, of that layer's attention.
        kappa: how many, from 1 to N.
        num_prefix_tokens: tokens in front that stand for no image region, never collected.

    Returns:
        ``(B, kappa, D)``, most salient first; gradients flow to ``tokens``.

    Raises:
        InputError: ``kappa`` out of range, or shapes that don't fit.

    Example:
        >>> import torch
        >>> salient_tokens(torch.arange(3.0).view(1, 3, 1), torch.tensor([[0.1, 0.2, 0.7]]), 2)
        tensor([[[2.],
                 [1.]]])
    """
    if tokens.shape[:2] != (len(saliency), saliency.shape[1] + num_prefix_tokens):
        raise InputError(
            f"expected `tokens` (B, {num_prefix_tokens} + N, D) and `saliency` (B, N), "
            f"got {tuple(tokens.shape)} and {tuple(saliency.shape)}"
        )
    index = salient_indices(saliency, kappa, num_prefix_tokens=num_prefix_tokens)
    return take_tokens(tokens, index)


def take_tokens(values: Tensor, index: Tensor) -> Tensor:
    """Rows of each sample.

    Args:
        values: ``(B, T, D)``, a tensor of tokens or of their shares.
        index: ``(B, K)`` int64 positions in the sequence.

    Returns:
        ``(B, K, D)``.
    """
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[2]))
