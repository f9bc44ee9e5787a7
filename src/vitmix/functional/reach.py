"""Which tokens attend to which: everywhere, within windows, or from and to coarser grids.

A :class:`Reach` says where the queries and keys of an attention call come from, so that shares go
the way that tokens go. Windows are one table of token numbers, made by cutting a grid of numbers
as the model cuts its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitmix.functional.grids import Grid, coarsen, refine, spread

__all__ = ["Reach", "halos", "windows"]


def windows(
    grid: Grid,
    window: Grid,
    shift: tuple[int, ...] = (0, 0),
    *,
    pad_first: bool = False,
    dilated: bool = False,
) -> Tensor:
    """Cut a token grid into windows.

    Args:
        grid: rows and columns of tokens.
        window: rows and columns of a window.
        shift: the grid is rolled up and to the left by so many tokens.
        pad_first: whether the grid is padded, at the bottom and the right, to a multiple of the
            window before it is rolled; else behind.
        dilated: a window is not a rectangle, but takes its tokens from all over the grid at equal
            distances (grid attention of MaxViT).

    Returns:
        ``(W, M)`` int64: which token of the grid, counted row by row, is at each place of each
        window; ``h * w`` where there is only padding.

    Example:
        >>> windows((2, 4), (2, 2))
        tensor([[0, 1, 4, 5],
                [2, 3, 6, 7]])
        >>> windows((2, 4), (2, 2), dilated=True)
        tensor([[0, 2, 4, 6],
                [1, 3, 5, 7]])
    """
    return torch.from_numpy(_windows(grid, window, shift, pad_first, dilated).copy())


# Tables are kept as arrays: a tensor is made on the device, or in the mode, of its first caller.
@lru_cache(maxsize=256)
def _windows(grid: Grid, window: Grid, shift: Grid, pad_first: bool, dilated: bool) -> np.ndarray:
    height, width = grid
    padding = height * width
    numbers = np.arange(padding, dtype=np.int64).reshape(height, width)
    margin = ((0, -height % window[0]), (0, -width % window[1]))
    if pad_first:
        numbers = np.pad(numbers, margin, constant_values=padding)
    numbers = np.roll(numbers, (-shift[0], -shift[1]), (0, 1))
    if not pad_first:
        numbers = np.pad(numbers, margin, constant_values=padding)
    rows, columns = numbers.shape[0] // window[0], numbers.shape[1] // window[1]
    if dilated:
        cut = numbers.reshape(window[0], rows, window[1], columns).transpose(1, 3, 0, 2)
    else:
        cut = numbers.reshape(rows, window[0], columns, window[1]).transpose(0, 2, 1, 3)
    return cut.reshape(-1, window[0] * window[1])


def halos(grid: Grid, window: int, halo: int) -> Tensor:
    """Square windows that reach into their neighbours.

    Args:
        grid: rows and columns of tokens, multiples of the window.
        window: rows and columns of a window.
        halo: rows and columns that are added on each side.

    Returns:
        ``(W, M)`` as :func:`windows` does.

    Example:
        >>> halos((1, 2), 1, 1)
        tensor([[2, 2, 2, 2, 0, 1, 2, 2, 2],
                [2, 2, 2, 0, 1, 2, 2, 2, 2]])
    """
    return torch.from_numpy(_halos(grid, window, halo).copy())


@lru_cache(maxsize=256)
def _halos(grid: Grid, window: int, halo: int) -> np.ndarray:
    padding = grid[0] * grid[1]
    numbers = np.pad(
        np.arange(padding, dtype=np.int64).reshape(grid), halo, constant_values=padding
    )
    size = window + 2 * halo
    cut = np.lib.stride_tricks.sliding_window_view(numbers, (size, size))[::window, ::window]
    return cut.reshape(-1, size * size)


@dataclass(frozen=True)
class Reach:
    """Which tokens the queries of one attention see.

    Attributes:
        grid: token grid that goes in.
        num_prefix_tokens: tokens in front of it; none with windows.
        windows: ``(W, M)`` as :func:`windows` gives it: attention stays within each, and windows
            follow one another in the batch; None if it does not.
        keys: coarser grid that keys are reduced to, or None.
        queries: coarser grid that queries are reduced to, and with them what comes out, or None.
        query_windows: ``(W, M')`` which queries are in each window, if they are not its keys.
        restored: whether what comes out of a reduced query goes to all tokens that it stands for.
        cell: rows and columns of tokens that a reduced key stands for, where tokens that don't fill
            one are left out; None if the sizes of both grids say it.
        flat_keys: whether keys are reduced along the tokens row by row: ``(1, h w)`` is their grid.
        adaptive: whether keys are reduced by ``nn.AdaptiveAvgPool2d``, whose cells overlap where
            the sizes of both grids are no multiples.
    """

    grid: Grid
    num_prefix_tokens: int = 0
    windows: Tensor | None = None
    keys: Grid | None = None
    queries: Grid | None = None
    query_windows: Tensor | None = None
    restored: bool = False
    cell: Grid | None = None
    flat_keys: bool = False
    adaptive: bool = False

    @property
    def kind(self) -> str:
        """Name of the attention, for people."""
        if self.windows is not None:
            return f"within windows of {self.windows.shape[1]}"
        if self.keys is not None:
            return f"to {self.keys[0]} x {self.keys[1]} keys"
        return "global"

    @property
    def result_grid(self) -> Grid:
        """Token grid that comes out."""
        return self.grid if self.restored else self._query_grid

    def sizes(self, batch: int) -> tuple[int, int, int]:
        """Batch, queries and keys of the attention call for a batch of images."""
        if self.windows is not None and self._query_table is not None:
            count, keys = self.windows.shape
            return batch * count, self._query_table.shape[1], keys
        queries, keys = (
            rows * columns for rows, columns in (self._query_grid, self.keys or self.grid)
        )
        return batch, self.num_prefix_tokens + queries, self.num_prefix_tokens + keys

    @property
    def _query_grid(self) -> Grid:
        return self.queries or self.grid

    @property
    def _query_table(self) -> Tensor | None:
        return self.windows if self.query_windows is None else self.query_windows

    def key_shares(self, shares: Tensor) -> Tensor:
        """Shares of what queries attend to.

        Args:
            shares: ``(B, T, K)`` of the tokens that go in.

        Returns:
            ``(B', M, K)`` for the batch of the attention call. Padding has no share.
        """
        if self.windows is not None:
            index = self.windows.to(shares.device, non_blocking=True)
            return F.pad(shares, (0, 0, 0, 1))[:, index].flatten(0, 1)
        if self.keys is None:
            return shares
        return coarsen(
            shares,
            self._key_source,
            self.keys,
            num_prefix_tokens=self.num_prefix_tokens,
            cell=self.cell,
            adaptive=self.adaptive,
        )

    def own_shares(self, shares: Tensor) -> Tensor:
        """Shares that the residual connection carries past the attention, ``(B, T', K)``."""
        if self.result_grid == self.grid:
            return shares
        prefix = self.num_prefix_tokens
        return coarsen(shares, self.grid, self._query_grid, num_prefix_tokens=prefix)

    def merged(self, attended: Tensor) -> Tensor:
        """From the batch of the attention call back to tokens.

        Args:
            attended: ``(B', N, K)``.

        Returns:
            ``(B, T', K)``.
        """
        table, grid = self._query_table, self._query_grid
        if table is not None:
            places = _places(table, grid).to(attended.device, non_blocking=True)
            attended = attended.reshape(-1, table.numel(), attended.shape[-1])[:, places]
        if self.result_grid != grid:
            prefix = self.num_prefix_tokens
            attended = refine(attended, grid, self.result_grid, num_prefix_tokens=prefix)
        return attended

    def query_weights(self, device: torch.device) -> Tensor | None:
        """``(W, M')`` weight of each query in an image's mean over queries; None if all are alike.

        Queries are 1 / (h w) each, padding does not count.
        """
        if self._query_table is None:
            return None
        total = self._query_grid[0] * self._query_grid[1]
        return (self._query_table < total).to(device, torch.float32, non_blocking=True) / total

    def image_saliency(self, saliency: Tensor) -> Tensor:
        """Saliency of keys as saliency of the tokens that went in.

        Args:
            saliency: ``(B', M)`` of keys, prefix tokens aside.

        Returns:
            ``(B, N)``: that of a reduced key is divided evenly among the tokens it stands for.
        """
        if self.windows is not None:
            table = self.windows.flatten().to(saliency.device, non_blocking=True)
            places = saliency.reshape(-1, len(table))
            tokens = places.new_zeros(len(places), self.grid[0] * self.grid[1] + 1)
            return tokens.index_add(1, table, places)[:, :-1]
        if self.keys is None:
            return saliency
        return spread(saliency, self.keys, self._key_source, cell=self.cell, adaptive=self.adaptive)

    @property
    def _key_source(self) -> Grid:
        return (1, self.grid[0] * self.grid[1]) if self.flat_keys else self.grid


def _places(table: Tensor, grid: Grid) -> Tensor:
    """Where in the row of all windows each token of the grid is."""
    places = torch.empty(grid[0] * grid[1] + 1, dtype=torch.int64)
    places[table.flatten()] = torch.arange(table.numel())
    return places[:-1]
