"""What a pixel mix does to a batch: pairs, and a raster of shares over the image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from vitmix.errors import InputError
from vitmix.functional.grids import on_pixels, overlap
from vitmix.functional.mixture import Mixture
from vitmix.functional.precision import no_autocast

__all__ = ["PixelPlan", "Size"]

Size = tuple[int, int]


@dataclass(frozen=True)
class PixelPlan:
    """How a batch of images is mixed.

    Attributes:
        partner: ``(B,)`` int64, the other image of each sample; may be the sample itself.
        own: ``(B or 1, h', w')`` float32, share of the own image in every cell of a raster laid
            over the image: one cell, the token grid, or the pixels.
        binary: whether every entry of ``own`` is 0 or 1, so that images are cut, not blended.
    """

    partner: Tensor
    own: Tensor
    binary: bool

    @property
    def lam(self) -> Tensor:
        """``(B,)`` share of the own image."""
        return self.own.mean((1, 2)).expand(len(self.partner))

    @property
    def mask(self) -> Tensor | None:
        """``(B or 1, h', w')`` bool, True = from the partner; None if images are blended."""
        return self.own < 0.5 if self.binary else None

    def to(self, device: torch.device | str) -> PixelPlan:
        """Copy to a device without waiting for it."""
        return replace(
            self,
            partner=self.partner.to(device, non_blocking=True),
            own=self.own.to(device, non_blocking=True),
        )

    def apply(self, images: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Mix images; the given ones stay as they are, unless they are ``out``.

        Args:
            images: ``(B, C, H, W)``, floating point.
            out: what to write into, of the shape and dtype of ``images``: ``images`` themselves, or
                another batch that is no more needed. Finding memory for a new one is most of what
                cutting costs on a CPU. Not for images with a gradient.

        Returns:
            ``out``, or a new tensor of the same shape, dtype and memory format.

        Raises:
            InputError: another batch size, another number of axes, an integer dtype, or an ``out``
                that does not fit.
        """
        if images.ndim != 4 or len(images) != len(self.partner):
            raise InputError(
                f"expected images ({len(self.partner)}, C, H, W), got {tuple(images.shape)}"
            )
        if not images.is_floating_point():
            raise InputError(
                f"expected floating-point images, got {images.dtype}; convert and normalise first"
            )
        tracked = images.requires_grad and torch.is_grad_enabled()
        if out is not None:
            if tracked:
                raise InputError("expected images without gradient for `out`, got some with one")
            if (out.shape, out.dtype) != (images.shape, images.dtype):
                raise InputError(
                    f"expected `out` {tuple(images.shape)} of {images.dtype}, "
                    f"got {tuple(out.shape)} of {out.dtype}"
                )
        plan = self.to(images.device)
        on_host = images.device.type == "cpu" and not torch.compiler.is_compiling()
        if self.binary and on_host and len(self.own) == 1:
            return plan._pasted(images, out, tracked)
        own = on_pixels(plan.own, (images.shape[2], images.shape[3])).unsqueeze(1)
        other = images[plan.partner]
        # The partners' images are a copy already: what is new is written over them.
        target = None if tracked else other if out is None else out
        if self.binary:
            return torch.where(own > 0.5, images, other, out=target)
        return torch.lerp(other, images, own.to(images.dtype), out=target)

    def _pasted(self, images: Tensor, out: Tensor | None, tracked: bool) -> Tensor:
        """One raster for all: a copy, with rectangles of the partners on it.

        A CPU spends its time on memory, and this moves half as much as a choice between two
        batches.
        """
        in_place = out is images
        mixed = images if in_place else images.clone() if out is None else out.copy_(images)
        _, height, width = self.own.shape
        for top, bottom, left, right in _rectangles((self.own[0] <= 0.5).numpy()):
            rows = slice(
                _first(top, height, images.shape[2]), _first(bottom, height, images.shape[2])
            )
            columns = slice(
                _first(left, width, images.shape[3]), _first(right, width, images.shape[3])
            )
            given, pasted = images[:, :, rows, columns], mixed[:, :, rows, columns]
            if tracked or in_place:
                pasted.copy_(given.index_select(0, self.partner))
            else:
                torch.index_select(given, 0, self.partner, out=pasted)
        return mixed

    def mixture(self, grid: Size, *, num_prefix_tokens: int = 0) -> Mixture:
        """Shares of own and partner in every token.

        Args:
            grid: rows and columns of tokens that the image is cut into.
            num_prefix_tokens: tokens in front; their share is that of the whole image.

        Returns:
            A mixture of two sources, ``shares`` of shape ``(B, num_prefix_tokens + h * w, 2)``.
        """
        batch = len(self.partner)
        own = self.cells(grid).flatten(1).expand(batch, -1)
        index = torch.arange(batch, device=self.partner.device)
        sources = torch.stack((index, self.partner), 1)
        return Mixture.of_tokens(sources, torch.stack((own, 1 - own), -1), num_prefix_tokens)

    def cells(self, grid: Size) -> Tensor:
        """``(B or 1, h, w)``: share of the own image in each cell of another raster, by area."""
        rows = overlap(self.own.shape[1], grid[0]).to(self.own, non_blocking=True)
        columns = overlap(self.own.shape[2], grid[1]).to(self.own, non_blocking=True)
        with no_autocast(self.own):
            return rows @ self.own @ columns.T


def _rectangles(mask: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
    """Cut what is True in ``(h, w)`` into rectangles: top, bottom, left and right, ends open.

    >>> list(_rectangles(np.array([[True, False], [True, False], [False, True]])))
    [(0, 2, 0, 1), (2, 3, 1, 2)]
    """
    changes = np.flatnonzero((mask[1:] != mask[:-1]).any(1)) + 1
    edges = [0, *changes.tolist(), len(mask)]
    for top, bottom in pairwise(edges):
        steps = np.diff(mask[top].astype(np.int8), prepend=0, append=0)
        starts, ends = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
        for left, right in zip(starts.tolist(), ends.tolist(), strict=True):
            yield top, bottom, left, right


def _first(cell: int, cells: int, pixels: int) -> int:
    """The first pixel of a cell of one axis; see :func:`vitmix.functional.grids.on_pixels`."""
    return -(-cell * pixels // cells)
