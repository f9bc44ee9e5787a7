"""First stage, pixels: which parts of which image make the input?

A mixer draws a :class:`PixelPlan` on the host; the plan mixes the images and says which share of
every token comes from whom. Drawing and applying are separate, so that a plan can be looked at,
stored and applied again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vitmix.errors import InputError
from vitmix.functional.draws import host_generator
from vitmix.functional.grids import on_pixels
from vitmix.functional.masks import block_mask, box_mask, random_mask
from vitmix.functional.pixel_plan import PixelPlan, Size

__all__ = ["CutMix", "Mixup", "OneOf", "PixelMix", "PixelPlan", "TokenMix"]

Draw = Literal["batch", "pair", "element"]
Pairing = Literal["permutation", "flip"]


class PixelMix(ABC):
    """A way of mixing images: pairs samples, decides where to mix, draws what comes from whom.

    Args:
        alpha: both parameters of the Beta distribution that ``lam`` is drawn from.
        prob: probability that a sample (with ``draw="batch"``: the batch) is mixed at all.
        draw: one draw for the whole ``"batch"``, one for each ``"pair"`` (a sample and its partner,
            which are then each other's partners), or one for each ``"element"``.
        pairing: ``"permutation"`` pairs at random; ``"flip"`` pairs first with last, and so on. The
            sample left over by an odd batch in pairs is its own partner.

    Raises:
        InputError: a parameter outside its range.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        prob: float = 1.0,
        draw: Draw = "batch",
        pairing: Pairing = "permutation",
    ) -> None:
        if not alpha > 0:
            raise InputError(f"expected `alpha` above 0, got {alpha}; for no mixing use mix=None")
        if not 0 <= prob <= 1:
            raise InputError(f"expected `prob` in [0, 1], got {prob}")
        if draw not in ("batch", "pair", "element"):
            raise InputError(f"expected `draw` 'batch', 'pair' or 'element', got {draw!r}")
        if pairing not in ("permutation", "flip"):
            raise InputError(f"expected `pairing` 'permutation' or 'flip', got {pairing!r}")
        self.alpha = alpha
        self.prob = prob
        self.draw = draw
        self.pairing = pairing

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({options})"

    def plan(
        self,
        batch_size: int,
        size: Size,
        *,
        grid: Size | None = None,
        generator: torch.Generator | None = None,
    ) -> PixelPlan:
        """Draw a plan for one batch.

        Args:
            batch_size: number of samples, at least 1.
            size: height and width of the images in pixels.
            grid: rows and columns of tokens, for mixers that follow the token grid.
            generator: source of all draws; the global one by default.

        Returns:
            The plan, on the CPU.

        Raises:
            InputError: a token mask without a grid, or a grid finer than the pixels.
        """
        if batch_size < 1:
            raise InputError(f"expected at least one sample, got a batch of {batch_size}")
        if grid is not None and (grid[0] > size[0] or grid[1] > size[1]):
            raise InputError(f"expected a token grid within {size} pixels, got {grid}")
        rng = host_generator(generator)
        partner = self._pair(batch_size, rng)
        unit = self._units(partner)
        own, binary = self.own_shares(int(unit.max()) + 1, size, grid, rng)
        if len(own) > 1:
            own = own[unit]
        return PixelPlan(torch.from_numpy(partner), torch.from_numpy(own), binary)

    @abstractmethod
    def own_shares(
        self, count: int, size: Size, grid: Size | None, rng: np.random.Generator
    ) -> tuple[np.ndarray, bool]:
        """Draw ``count`` independent rasters ``(count, h', w')`` of own shares, float32.

        Returns:
            The rasters (all of them full where nothing is mixed), and whether they are binary.
        """

    def _pair(self, batch: int, rng: np.random.Generator) -> np.ndarray:
        partner: np.ndarray = np.arange(batch)
        if self.pairing == "flip":
            flipped: np.ndarray = partner[::-1].copy()
            return flipped
        if self.draw != "pair":
            return np.asarray(rng.permutation(batch))
        order = rng.permutation(batch)
        even = batch - batch % 2
        partner[order[0:even:2]] = order[1:even:2]
        partner[order[1:even:2]] = order[0:even:2]
        return partner

    def _units(self, partner: np.ndarray) -> np.ndarray:
        """Number the draws: samples of one unit share one."""
        index: np.ndarray = np.arange(len(partner))
        if self.draw == "batch":
            return np.zeros_like(index)
        if self.draw == "element":
            return index
        return np.asarray(np.unique(np.minimum(index, partner), return_inverse=True)[1])

    def _mixed(self, count: int, rng: np.random.Generator) -> np.ndarray:
        return rng.random(count) < self.prob

    def _lam(self, count: int, rng: np.random.Generator, fixed: float | None = None) -> np.ndarray:
        mixed, drawn = self._mixed(count, rng), rng.beta(self.alpha, self.alpha, count)
        return np.where(mixed, drawn if fixed is None else fixed, 1.0)


class Mixup(PixelMix):
    """Blend images: ``lam * own + (1 - lam) * partner`` (Zhang et al., ICLR 2018).

    Example:
        >>> plan = Mixup(alpha=0.8).plan(4, (32, 32), generator=torch.Generator().manual_seed(0))
        >>> plan.apply(torch.rand(4, 3, 32, 32)).shape
        torch.Size([4, 3, 32, 32])
    """

    def own_shares(
        self, count: int, size: Size, grid: Size | None, rng: np.random.Generator
    ) -> tuple[np.ndarray, bool]:
        """Draw one share for the whole image."""
        return self._lam(count, rng).astype(np.float32).reshape(count, 1, 1), False


class CutMix(PixelMix):
    """Paste one box of the partner's image (Yun et al., ICCV 2019).

    Args:
        alpha: both parameters of the Beta distribution that ``lam`` is drawn from.
        prob: probability of mixing.
        draw: ``"batch"``, ``"pair"`` or ``"element"``; see :class:`PixelMix`.
        pairing: ``"permutation"`` or ``"flip"``; see :class:`PixelMix`.
        align: False: a box on the pixels as in the paper, its centre uniform over the image, its
            sides ``sqrt(1 - lam)`` of the image's, clipped at the borders, and ``lam`` taken anew
            from what is left of it. True: a box of whole tokens, see
            :func:`vitmix.functional.box_mask`.

    Example:
        >>> plan = CutMix(align=True).plan(4, (32, 32), grid=(8, 8))
        >>> plan.mask.shape
        torch.Size([1, 8, 8])
    """

    def __init__(
        self,
        alpha: float = 1.0,
        prob: float = 1.0,
        draw: Draw = "batch",
        pairing: Pairing = "permutation",
        align: bool = False,
    ) -> None:
        super().__init__(alpha, prob, draw, pairing)
        self.align = align

    def own_shares(
        self, count: int, size: Size, grid: Size | None, rng: np.random.Generator
    ) -> tuple[np.ndarray, bool]:
        """Draw boxes on the pixels, or on the tokens."""
        lams = self._lam(count, rng)
        if self.align:
            masks = _token_masks(box_mask, grid, lams, rng)
            return masks, True
        height, width = size
        own = np.ones((count, height, width), dtype=np.float32)
        for raster, lam in zip(own, lams, strict=True):
            side = np.sqrt(1.0 - lam)
            box_height, box_width = int(height * side), int(width * side)
            top = int(rng.integers(height)) - box_height // 2
            left = int(rng.integers(width)) - box_width // 2
            rows = slice(max(0, top), max(0, top + box_height))
            raster[rows, max(0, left) : max(0, left + box_width)] = 0.0
        return own, True


class TokenMix(PixelMix):
    """Mix whole tokens in a scattered region (TokenMix, Liu et al., ECCV 2022).

    Args:
        alpha: both parameters of the Beta distribution that ``lam`` is drawn from.
        prob: probability of mixing.
        draw: ``"batch"``, ``"pair"`` or ``"element"``; see :class:`PixelMix`.
        pairing: ``"permutation"`` or ``"flip"``; see :class:`PixelMix`.
        mask: ``"block"`` for many rectangles, ``"random"`` for single tokens, ``"box"`` for one box
            (the paper's region masks).
        min_block_tokens: least size of a rectangle; see :func:`vitmix.functional.block_mask`.
        extra_tokens: tokens added to the number to be replaced (released setting: 14).
        lam: a fixed share of the own image instead of a draw (released setting: 0.5).
        patch: side of a cell of the mask in pixels; that of the model's tokens by default. Models
            with tokens of 4 pixels (Swin) may want 16.

    Raises:
        InputError: a parameter outside its range.

    Example:
        >>> plan = TokenMix().plan(4, (224, 224), grid=(14, 14))
        >>> plan.mask.shape
        torch.Size([1, 14, 14])
    """

    def __init__(
        self,
        alpha: float = 1.0,
        prob: float = 1.0,
        draw: Draw = "batch",
        pairing: Pairing = "permutation",
        mask: Literal["block", "random", "box"] = "block",
        min_block_tokens: int | None = None,
        extra_tokens: int = 0,
        lam: float | None = None,
        patch: int | None = None,
    ) -> None:
        super().__init__(alpha, prob, draw, pairing)
        if patch is not None and patch < 1:
            raise InputError(f"expected `patch` of at least 1 pixel, got {patch}")
        if mask not in ("block", "random", "box"):
            raise InputError(f"expected `mask` 'block', 'random' or 'box', got {mask!r}")
        if min_block_tokens is not None and min_block_tokens < 1:
            raise InputError(f"expected `min_block_tokens` of at least 1, got {min_block_tokens}")
        if extra_tokens and mask != "block":
            raise InputError(f"expected `extra_tokens` with block masks only, got mask={mask!r}")
        if lam is not None and not 0 <= lam <= 1:
            raise InputError(f"expected `lam` in [0, 1], got {lam}")
        self.kind = mask
        self.min_block_tokens = min_block_tokens
        self.extra_tokens = extra_tokens
        self.fixed_lam = lam
        self.patch = patch

    @classmethod
    def released(cls, prob: float = 1.0) -> TokenMix:
        """Return the released code's setting on 14 x 14 tokens: half the tokens and 14 more."""
        return cls(prob=prob, pairing="flip", min_block_tokens=1, extra_tokens=14, lam=0.5)

    def own_shares(
        self, count: int, size: Size, grid: Size | None, rng: np.random.Generator
    ) -> tuple[np.ndarray, bool]:
        """Draw masks on the token grid."""
        if self.patch is not None:
            grid = (max(1, size[0] // self.patch), max(1, size[1] // self.patch))
        lams = self._lam(count, rng, self.fixed_lam)
        if self.kind == "block":
            masks = _token_masks(
                block_mask,
                grid,
                lams,
                rng,
                min_block_tokens=self.min_block_tokens,
                extra_tokens=self.extra_tokens,
            )
        else:
            masks = _token_masks(
                random_mask if self.kind == "random" else box_mask, grid, lams, rng
            )
        return masks, True


class OneOf(PixelMix):
    """Switch between mixers at random, as timm does between Mixup and CutMix.

    Pairing and the unit of a draw are those given here; those of the single mixers are not used.

    Args:
        mixers: at least one.
        weights: relative probability of each; equal by default.
        prob: probability of mixing at all, on top of the mixers' own ``prob``.
        draw: unit of a draw, of the choice too; see :class:`PixelMix`.
        pairing: ``"permutation"`` or ``"flip"``; see :class:`PixelMix`.

    Raises:
        InputError: no mixers, another kind of object, or weights that don't fit them.

    Example:
        >>> mix = OneOf([Mixup(0.8), CutMix(1.0)], weights=[0.5, 0.5])
        >>> mix.plan(5, (32, 32)).partner.shape
        torch.Size([5])
    """

    def __init__(
        self,
        mixers: Sequence[PixelMix],
        weights: Sequence[float] | None = None,
        prob: float = 1.0,
        draw: Draw = "batch",
        pairing: Pairing = "permutation",
    ) -> None:
        super().__init__(1.0, prob, draw, pairing)
        for mixer in mixers:
            if not isinstance(mixer, PixelMix):
                raise InputError(f"expected `mixers` as PixelMix, got {mixer!r}")
        weights = [1.0] * len(mixers) if weights is None else list(weights)
        if not mixers or len(weights) != len(mixers):
            raise InputError(
                "expected at least one mixer and one weight for each, "
                f"got {len(mixers)} mixers and {len(weights)} weights"
            )
        if min(weights) < 0 or sum(weights) <= 0:
            raise InputError(f"expected weights of at least 0 and not all 0, got {weights}")
        self.mixers = list(mixers)
        self.weights = [weight / sum(weights) for weight in weights]

    def own_shares(
        self, count: int, size: Size, grid: Size | None, rng: np.random.Generator
    ) -> tuple[np.ndarray, bool]:
        """Draw a mixer for each unit, then its raster."""
        chosen = rng.choice(len(self.mixers), count, p=self.weights)
        mixed = self._mixed(count, rng)
        if count == 1 and mixed[0]:
            only = self.mixers[int(chosen[0])]
            return only.own_shares(1, size, grid, rng)
        shape = (count, *size) if mixed.any() else (count, 1, 1)
        own: np.ndarray = np.ones(shape, dtype=np.float32)
        binary: bool = True
        for index, mixer in enumerate(self.mixers):
            rows = np.flatnonzero((chosen == index) & mixed)
            if len(rows):
                shares, cut = mixer.own_shares(len(rows), size, grid, rng)
                own[rows] = on_pixels(torch.from_numpy(shares), size).numpy()
                binary &= cut
        return own, binary


def _token_masks(
    draw_mask: Callable[..., Tensor],
    grid: Size | None,
    lams: np.ndarray,
    rng: np.random.Generator,
    **options: int | None,
) -> np.ndarray:
    """Own shares ``(n, h, w)`` from one token mask per lam, drawn from ``rng``."""
    if grid is None:
        raise InputError("expected `grid`, the rows and columns of tokens, for a mask of tokens")
    own = np.ones((len(lams), *grid), dtype=np.float32)
    for raster, lam in zip(own, lams, strict=True):
        if lam < 1.0:
            seed = torch.Generator().manual_seed(int(rng.integers(2**62)))
            mask = draw_mask(grid, float(lam), generator=seed, **options)
            raster[mask.numpy()] = 0.0
    return own
