"""Third stage, labels: how much of each source does the target get?"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitmix.errors import InputError
from vitmix.functional.alignment import pooled_shares
from vitmix.functional.mixture import Mixture
from vitmix.functional.pixel_plan import PixelPlan
from vitmix.functional.targets import activation_weight
from vitmix.maps import TeacherMaps
from vitmix.teacher import ActivationMaps

__all__ = [
    "AreaLabels",
    "AttentionLabels",
    "LabelEvidence",
    "LabelRule",
    "TeacherLabels",
    "TokenAlignedLabels",
]


@dataclass(frozen=True)
class LabelEvidence:
    """What a label rule may look at.

    Attributes:
        mixture: sources and shares; at the input of the model, or after its last block for rules
            that follow shares.
        num_prefix_tokens: tokens in front that stand for no image region.
        grid: rows and columns of the other tokens.
        images: ``(B, C, H, W)`` before mixing.
        classes: ``(B,)`` class of each image before mixing.
        pixels: the plan of the pixel stage, or None.
        maps: activation maps of the images that were given to the step, or None.
        attention: ``(B, N)`` saliency of the block that the rule asked for, or None.
        pooled_shares: ``(B, K)`` shares of what the classifier sees, or None.
    """

    mixture: Mixture
    num_prefix_tokens: int
    grid: tuple[int, int]
    images: Tensor
    classes: Tensor
    pixels: PixelPlan | None
    maps: Tensor | None = None
    attention: Tensor | None = None
    pooled_shares: Tensor | None = None

    @property
    def image_shares(self) -> Tensor:
        """``(B, N, K)`` shares of the tokens behind the prefix."""
        return self.mixture.shares[:, self.num_prefix_tokens :]

    @property
    def area(self) -> Tensor:
        """``(B, K)`` share of each source in the image."""
        return self.image_shares.mean(1)


class LabelRule(ABC):
    """Turns shares into weights of the sources' labels.

    Attributes:
        follows_shares: whether shares are to be carried through every attention layer. The weights
            then cover what token stages did, too.
        attention_block: block whose saliency the rule needs, negative from the end, or None.
        needs_maps: whether each step has to be given maps of its images.
        num_classes: classes that the rule knows itself, as a teacher does; None if it knows none.
    """

    follows_shares: bool = False
    attention_block: int | None = None
    needs_maps: bool = False
    num_classes: int | None = None

    @abstractmethod
    def weights(self, evidence: LabelEvidence) -> Tensor:
        """Weights ``(B, K)`` of ``evidence.mixture.sources``."""

    @property
    def known_before_forward(self) -> bool:
        """Whether the rule needs nothing from the forward pass."""
        return not self.follows_shares and self.attention_block is None

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class AreaLabels(LabelRule):
    """Weights are the shares of the image area (Mixup, CutMix)."""

    def weights(self, evidence: LabelEvidence) -> Tensor:
        """Mean share over the image's tokens."""
        return evidence.area


class AttentionLabels(LabelRule):
    """Weights follow attention: ``lam = sum_t A_t M_t`` (TransMix, Chen et al., CVPR 2022).

    ``A`` is the saliency of a block as in TokenMixup's Eq. 3 (the class token's row, or the mean
    over queries where the model does not classify by a class token), normalised to sum 1, and ``M``
    the shares of the input tokens.

    Args:
        block: block whose attention is read; the last one by default.
        area: part of the weights that stays with the area. 0 follows the paper's formula; 0.5
            takes the mean of both.

    Raises:
        InputError: ``area`` outside [0, 1].
    """

    def __init__(self, block: int = -1, area: float = 0.0) -> None:
        if not 0 <= area <= 1:
            raise InputError(f"expected `area` in [0, 1], got {area}")
        self.attention_block = block
        self.area = area

    def weights(self, evidence: LabelEvidence) -> Tensor:
        """Mean share over the image's tokens, weighted by attention."""
        if evidence.attention is None:
            raise InputError("expected the saliency of a block as evidence, got none")
        attention = evidence.attention / evidence.attention.sum(1, keepdim=True)
        attended = pooled_shares(evidence.image_shares, attention)
        return (1 - self.area) * attended + self.area * evidence.area


class TokenAlignedLabels(LabelRule):
    """Weights are the shares of the representation that is classified (TL-Align, ICCV 2023).

    Shares are carried token by token through every attention layer,
    :func:`vitmix.functional.align_shares`, and pooled as the model pools tokens.
    """

    follows_shares = True

    def weights(self, evidence: LabelEvidence) -> Tensor:
        """Shares after the last block, pooled."""
        if evidence.pooled_shares is None:
            raise InputError("expected pooled shares as evidence, got none")
        return evidence.pooled_shares


class TeacherLabels(LabelRule):
    """Weights are the teacher's activation that is still visible (TokenMix, ECCV 2022, Sec. 3).

    With ``teacher`` it sees the augmented images before mixing, without gradient and in evaluation
    mode. It is not part of the model: it is neither trained nor saved with it, and copies share it.

    With ``maps`` it has seen every image before (``vitmix teach``), and a step costs no more than
    with area labels. Each step is then given ``mixing(images, targets, maps=...)``: either the rows
    of the images in ``maps`` ``(B,)``, if the images are as they were, or the maps themselves
    ``(B, h, w)`` after the same crops and flips.

    Args:
        teacher: a classifier of the same classes (see :class:`vitmix.teacher.ActivationMaps`), or a
            function of images ``(B, C, H, W)`` and classes ``(B,)`` that gives maps ``(B, h, w)``
            of at least 0.
        normalise: divide the two weights by their sum. False gives the released code's targets,
            whose rows sum to anything from about 0.5 to 1.5.
        maps: stored maps, or their folder, instead of a teacher.

    Raises:
        InputError: not a module, a function or stored maps, or not exactly one of them.
    """

    def __init__(
        self,
        teacher: nn.Module | Callable[[Tensor, Tensor], Tensor] | None = None,
        normalise: bool = True,
        *,
        maps: TeacherMaps | str | Path | None = None,
    ) -> None:
        if (teacher is None) == (maps is None):
            raise InputError(
                "expected either a teacher or stored maps, got "
                + ("neither" if maps is None else "both")
            )
        if isinstance(maps, str | Path):
            maps = TeacherMaps(maps)
        if not (isinstance(maps, TeacherMaps) if teacher is None else callable(teacher)):
            kind, got = ("stored maps", maps) if teacher is None else ("teacher", teacher)
            raise InputError(
                "expected a classifier or a function as teacher, or a folder of maps, "
                f"got {type(got).__name__} as {kind}"
            )
        self.needs_maps = maps is not None
        self.maps: Any = teacher if maps is None else maps
        if isinstance(teacher, nn.Module):
            self.maps = ActivationMaps(teacher)
            self.num_classes = self.maps.num_classes
        self.normalise = normalise

    def __deepcopy__(self, memo: dict[int, Any]) -> TeacherLabels:
        return copy.copy(self)

    def __repr__(self) -> str:
        return f"TeacherLabels({self.maps!r}, normalise={self.normalise})"

    def weights(self, evidence: LabelEvidence) -> Tensor:
        """Visible activation of own and partner."""
        if evidence.pixels is None:
            return evidence.area
        plan = evidence.pixels
        with torch.no_grad():
            maps = _resample(self._maps(evidence).float(), evidence.grid)
            mask = 1 - plan.cells(evidence.grid).expand(len(maps), -1, -1)
            own, partner = activation_weight(maps, maps[plan.partner], mask)
        weights = torch.stack((own, partner), 1)
        if not self.normalise:
            return weights
        total = weights.sum(1, keepdim=True)
        return torch.where(total > 0, weights / total, evidence.area)

    def _maps(self, evidence: LabelEvidence) -> Tensor:
        """``(B, h, w)`` maps of the images before mixing."""
        if not self.needs_maps:
            maps: Tensor = self.maps(evidence.images, evidence.classes)
            if maps.ndim != 3 or len(maps) != len(evidence.images):
                raise InputError(
                    f"expected maps ({len(evidence.images)}, h, w) from the teacher, "
                    f"got {tuple(maps.shape)}"
                )
            return maps
        if evidence.maps is None:
            raise InputError("expected maps of the images as evidence, got none")
        given = evidence.maps
        if given.ndim == 1:
            given = self.maps[given]
        return given.to(evidence.images.device, non_blocking=True)


def _resample(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Maps ``(B, h, w)`` on another grid; averaged over areas when that is coarser."""
    if tuple(maps.shape[1:]) == grid:
        return maps
    options: dict[str, Any] = {"size": grid, "mode": "bilinear", "antialias": True}
    return F.interpolate(maps[:, None], **options)[:, 0].clamp_min(0)
