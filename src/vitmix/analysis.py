"""What the papers' figures show, as arrays: detectors of saliency, shares from block to block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitmix.errors import UnsupportedModelError
from vitmix.functional.grids import coarsen
from vitmix.functional.mixture import Mixture
from vitmix.functional.sharpness import sharpness, top_share
from vitmix.mixing import MixingModel
from vitmix.preview import looking
from vitmix.step import StepRecord
from vitmix.tokens import HorizontalTokenMixup

__all__ = [
    "DETECTORS",
    "Detected",
    "Fluctuation",
    "difficulty_quantiles",
    "follow_origins",
    "saliency_by_detector",
]

# How TokenMixup's Figure 3 and Table 3 find salient tokens.
DETECTORS = ("gradient", "attention", "rollout")
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class Detected:
    """Saliency that one detector finds.

    Attributes:
        maps: ``(B, h, w)``, each sums to 1; None where the model has no such saliency.
        sharpness: ``(B,)``, see :func:`vitmix.functional.sharpness`.
        top_share: ``(B,)`` share of the most salient tenth of the tokens.
        reason: why there is none; empty if there is one.
    """

    maps: Tensor | None
    sharpness: Tensor | None = None
    top_share: Tensor | None = None
    reason: str = ""


def saliency_by_detector(
    mixing: MixingModel,
    images: Tensor,
    targets: Tensor,
    *,
    block: int,
    detectors: Sequence[str] = DETECTORS,
) -> dict[str, Detected]:
    """Saliency at a block by the gradient, by its attention, and by a rollout to the last block.

    Args:
        mixing: whose model is looked at; it is left as it is.
        images: ``(B, C, H, W)`` as the model takes them.
        targets: ``(B,)`` classes, which the gradient is of.
        block: the block.
        detectors: which of ``gradient``, ``attention``, ``rollout``.
    """
    found = {}
    backbone = mixing.backbone
    grid = backbone.block_grid(block, backbone.grid((images.shape[2], images.shape[3])))
    for detector in detectors:
        stage = HorizontalTokenMixup(  # finds no sample easy: it only looks
            block, tau=-1.0, saliency=detector,  # type: ignore[arg-type]
            rollout_steps=max(1, backbone.depth - 1 - block),
        )  # fmt: skip
        if detector == "rollout" and block == backbone.depth - 1:
            found[detector] = Detected(None, reason="no block behind this one to roll out to")
            continue
        try:
            eye = MixingModel(
                mixing.model, tokens=[stage], num_classes=mixing.num_classes, backbone=backbone
            )
        except UnsupportedModelError as error:
            if detector != "rollout":
                raise
            found[detector] = Detected(None, reason=str(error))
            continue
        with looking(eye, 0):
            saliency = eye(images, targets).trace.saliency[block]
        saliency = saliency / saliency.sum(1, keepdim=True)
        found[detector] = Detected(
            saliency.view(-1, *grid).cpu(), sharpness(saliency).cpu(), top_share(saliency).cpu()
        )
    return found


@dataclass(frozen=True)
class Fluctuation:
    """The share of the own image at the input and behind every block, L + 1 places (TL-Align).

    Attributes:
        own: ``(L + 1, B)`` in tokens that were the image's own at the input, on average.
        partner: ``(L + 1, B)`` in tokens that were the partner's; NaN for a sample without any.
        prefix: ``(L + 1, B)`` in the first prefix token, or None.
        maps: for each place ``(B, h, w)``.
        label: ``(B,)`` in what the classifier sees: the weight of the own label.
        area: ``(B,)`` in the image: the weight by area.
    """

    own: Tensor
    partner: Tensor
    prefix: Tensor | None
    maps: tuple[Tensor, ...]
    label: Tensor
    area: Tensor


@torch.no_grad()
def follow_origins(record: StepRecord, num_prefix_tokens: int = 0) -> Fluctuation:
    """How tokens of a mixed image lose what they were, from block to block.

    Args:
        record: of a step whose images were mixed: ``mixing(..., record=True).trace.record``.
        num_prefix_tokens: of the model.

    Raises:
        UnsupportedModelError: a model whose shares cannot be followed to the output.
    """
    pooled = record.evidence.pooled_shares
    if pooled is None:
        raise UnsupportedModelError(
            "looked for a model whose shares can be followed to the output, found one whose "
            "labels cannot be aligned; vitmix models NAME says why"
        )
    first_grid, first = record.history[0]
    start = _own(first)[:, num_prefix_tokens:]
    own, partner, prefix, maps = [], [], [], []
    for grid, mixture in record.history:
        shares = _own(mixture)
        origin = coarsen(start[..., None], first_grid, grid)[..., 0]
        image = shares[:, num_prefix_tokens:]
        own.append((image * origin).sum(1) / origin.sum(1))
        partner.append((image * (1 - origin)).sum(1) / (1 - origin).sum(1))
        prefix.append(shares[:, 0])
        maps.append(image.view(-1, *grid).cpu())
    pooled_own = _own(Mixture(record.mixture.sources, pooled[:, None]))[:, 0]
    return Fluctuation(
        torch.stack(own).cpu(),
        torch.stack(partner).cpu(),
        torch.stack(prefix).cpu() if num_prefix_tokens else None,
        tuple(maps),
        pooled_own.cpu(),
        start.mean(1).cpu(),
    )


def _own(mixture: Mixture) -> Tensor:
    """``(B, T)`` share of each sample's own image in its tokens."""
    mine = mixture.sources == mixture.sources[:, :1]
    return (mixture.shares * mine[:, None]).sum(2)


def difficulty_quantiles(difficulty: Tensor) -> dict[str, Tensor]:
    """Quantiles of the difficulty ``(B,)`` of a batch, by the names they are logged under."""
    found = torch.quantile(difficulty.float(), difficulty.new_tensor(QUANTILES, dtype=torch.float))
    return {
        f"difficulty_q{100 * level:.0f}": value
        for level, value in zip(QUANTILES, found.unbind(), strict=True)
    }
