"""Token grids of different sizes: shares are averaged on the way down, saliency is spread back.

Where a model merges tokens or takes every other one, a token of the new grid stands for a cell of
the old one. Convolutions between attentions, or inside a block, are treated like the MLP: shares
stay with their position, and a strided one merges the tokens of its cell. Both directions are
products with one small matrix an axis.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitmix.functional.precision import no_autocast

__all__ = ["Grid", "coarsen", "on_pixels", "overlap", "refine", "spread"]

Grid = tuple[int, int]


def on_pixels(cells: Tensor, size: Grid) -> Tensor:
    """Values of cells on the pixels whose upper left corner they cover; nothing is blended.

    Args:
        cells: ``(B, h, w)``, any dtype.
        size: ``(H, W)``, at least ``(h, w)`` for every cell to be seen.

    Returns:
        ``(B, H, W)``.

    Example:
        >>> on_pixels(torch.tensor([[[1, 2]]]), (1, 3))
        tensor([[[1, 1, 2]]])
    """
    rows, columns = (
        torch.arange(pixels, device=cells.device) * cells.shape[axis] // pixels
        for axis, pixels in enumerate(size, 1)
    )
    return cells[:, rows][:, :, columns]


def overlap(old: int, new: int) -> Tensor:
    """``(new, old)``: part of each new cell of one axis in each old cell; rows sum to 1."""
    edges_old = torch.arange(old + 1, dtype=torch.float64) / old
    edges_new = torch.arange(new + 1, dtype=torch.float64) / new
    upper = torch.minimum(edges_new[1:, None], edges_old[None, 1:])
    lower = torch.maximum(edges_new[:-1, None], edges_old[None, :-1])
    return ((upper - lower).clamp_min(0) * new).float()


def coarsen(
    shares: Tensor,
    old: Grid,
    new: Grid,
    *,
    num_prefix_tokens: int = 0,
    cell: Grid | None = None,
    adaptive: bool = False,
) -> Tensor:
    """Shares on a coarser grid: the mean over the tokens that a new one stands for.

    Where ``cell`` is not given, a step that divides the axis leaves whole cells, the last one cut
    off where an axis was padded; any other size takes what its cells cover by area.

    Args:
        shares: ``(B, num_prefix_tokens + h * w, K)``, rows sum to 1.
        old: ``(h, w)``.
        new: ``(h', w')``.
        num_prefix_tokens: tokens in front, which stay as they are.
        cell: rows and columns of tokens that a new one stands for; those left over have none.
        adaptive: cells are those of ``nn.AdaptiveAvgPool2d``, which overlap where sizes are no
            multiples.

    Returns:
        ``(B, num_prefix_tokens + h' * w', K)``, rows sum to 1.

    Example:
        >>> coarsen(torch.tensor([[[1.0], [0.0], [0.0], [0.0]]]), (2, 2), (1, 1))
        tensor([[[0.2500]]])
    """
    prefix, image = shares[:, :num_prefix_tokens], shares[:, num_prefix_tokens:]
    axes = _axes(old, new, cell, adaptive)
    rows, columns = (axis.to(shares, non_blocking=True) for axis in axes)
    with no_autocast(shares):
        cells = torch.einsum("ih,jw,bhwk->bijk", rows, columns, image.reshape(len(image), *old, -1))
    return torch.cat((prefix, cells.flatten(1, 2)), 1)


def _owners(cells: Tensor) -> Tensor:
    """Cells ``(new, old)`` whose last has the tokens of none, too; columns sum to 1."""
    left = torch.zeros_like(cells)
    left[-1] = cells.sum(0) == 0
    return (cells + left) / (cells + left).sum(0)


def refine(shares: Tensor, old: Grid, new: Grid, *, num_prefix_tokens: int = 0) -> Tensor:
    """Shares on a finer grid: each token has those of the one that stood for it.

    Tokens at the end of an axis that none stood for have those of the last.

    Args:
        shares: ``(B, num_prefix_tokens + h * w, K)``, rows sum to 1.
        old: ``(h, w)``.
        new: ``(h', w')``.
        num_prefix_tokens: tokens in front, which stay as they are.

    Returns:
        ``(B, num_prefix_tokens + h' * w', K)``, rows sum to 1.

    Example:
        >>> refine(torch.tensor([[[1.0], [0.0]]]), (1, 2), (1, 4)).flatten()
        tensor([1., 1., 0., 0.])
    """
    prefix, image = shares[:, :num_prefix_tokens], shares[:, num_prefix_tokens:]
    rows, columns = (_owners(axis).to(shares, non_blocking=True) for axis in _axes(new, old, None))
    image = image.reshape(len(image), *old, -1)
    with no_autocast(shares):
        tokens = torch.einsum("ih,jw,bijk->bhwk", rows, columns, image)
    return torch.cat((prefix, tokens.flatten(1, 2)), 1)


def spread(
    saliency: Tensor, new: Grid, old: Grid, *, cell: Grid | None = None, adaptive: bool = False
) -> Tensor:
    """Saliency on the finer grid that was coarsened: a cell's is divided evenly among its tokens.

    Args:
        saliency: ``(B, h' * w')``.
        new: ``(h', w')``.
        old: ``(h, w)``.
        cell: as for :func:`coarsen`.
        adaptive: as for :func:`coarsen`.

    Returns:
        ``(B, h * w)`` with the same sum.

    Example:
        >>> spread(torch.tensor([[1.0]]), (1, 1), (2, 2))
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    axes = _axes(old, new, cell, adaptive)
    rows, columns = (axis.to(saliency, non_blocking=True) for axis in axes)
    with no_autocast(saliency):
        tokens = torch.einsum("ih,jw,bij->bhw", rows, columns, saliency.view(-1, *new))
    return tokens.flatten(1)


def _axes(old: Grid, new: Grid, cell: Grid | None, adaptive: bool = False) -> list[Tensor]:
    if adaptive:
        return [_pooled(*sizes) for sizes in zip(old, new, strict=True)]
    steps = (None, None) if cell is None else cell
    return [_cells(*sizes) for sizes in zip(old, new, steps, strict=True)]


def _cells(old: int, new: int, step: int | None) -> Tensor:
    """``(new, old)``: weight of each old token of one axis in each new one; rows sum to 1."""
    if step is None:
        step = -(-old // new)
        if -(-old // step) != new:
            step = max(1, old // new)
            if old // step != new:
                return overlap(old, new)
    places = torch.arange(old) // step
    members = (places == torch.arange(new)[:, None]).float()
    return members / members.sum(1, keepdim=True)


def _pooled(old: int, new: int) -> Tensor:
    """As :func:`_cells` gives it, for the cells of ``nn.AdaptiveAvgPool2d``."""
    places, cells = torch.arange(old), torch.arange(new)[:, None]
    first, end = cells * old // new, -(-(cells + 1) * old // new)
    members = ((places >= first) & (places < end)).float()
    return members / members.sum(1, keepdim=True)
