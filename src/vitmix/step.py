"""What a training step gives: logits, targets and losses, what was mixed, figures to log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vitmix.flow import Flow
from vitmix.functional.grids import Grid
from vitmix.functional.horizontal import HorizontalPlan
from vitmix.functional.mixture import Mixture
from vitmix.functional.pixel_plan import PixelPlan
from vitmix.functional.targets import soft_cross_entropy
from vitmix.labels import LabelEvidence
from vitmix.tokens import BlendPlan

__all__ = ["MixOutput", "MixTrace", "StepRecord"]


@dataclass(frozen=True)
class StepRecord:
    """What is kept of a step only on request: ``mixing(images, targets, record=True)``.

    Attributes:
        evidence: what label rules may look at, as far as the model supports it: attention of the
            last block (or the one that the rule in use asks for) and pooled shares, too.
        mixture: sources and shares behind the last block, as followed by TL-Align.
        history: token grid and mixture at the input, then behind every block.
    """

    evidence: LabelEvidence
    mixture: Mixture
    history: tuple[tuple[Grid, Mixture], ...]


@dataclass(frozen=True)
class MixTrace:
    """What was mixed in a step, for pictures and analysis.

    Attributes:
        images: ``(B, C, H, W)`` as fed to the model.
        pixels: plan of the pixel stage, or None.
        sources: ``(B, K)`` int64, samples of the batch in each target; None in evaluation. With
            ``gather=True`` they count over the batches of all processes, and so do partners in
            ``horizontal``.
        weights: ``(B, K)`` weight of each source's label by the label rule, or None.
        weights_cover_tokens: whether that is all of the target, as for rules that follow shares;
            else token stages mix the targets afterwards.
        plans: block and plan of each token stage that mixed, in order.
        saliency: ``(B, N)`` that the plan of each horizontal stage was made by, by block.
        difficulty: ``(B,)`` ScoreNet's cross-entropy in nats, likewise.
        selected: for each block of vertical mixing, by the block that tokens come from, which of
            the N image tokens were selected, ``(B, kappa)`` int64, most salient first.
        record: more, on request.
    """

    images: Tensor
    pixels: PixelPlan | None = None
    sources: Tensor | None = None
    weights: Tensor | None = None
    weights_cover_tokens: bool = False
    plans: tuple[tuple[int, HorizontalPlan | BlendPlan], ...] = ()
    saliency: dict[int, Tensor] = field(default_factory=dict)
    difficulty: dict[int, Tensor] = field(default_factory=dict)
    selected: dict[int, dict[int, Tensor]] = field(default_factory=dict)
    record: StepRecord | None = None

    @property
    def horizontal(self) -> dict[int, HorizontalPlan]:
        """Plan of each horizontal stage, by block."""
        return {block: plan for block, plan in self.plans if isinstance(plan, HorizontalPlan)}

    @property
    def blended(self) -> dict[int, BlendPlan]:
        """Plan of each manifold stage, by block."""
        return {block: plan for block, plan in self.plans if isinstance(plan, BlendPlan)}


@dataclass(frozen=True)
class MixOutput:
    """Result of a step.

    Attributes:
        logits: ``(B, C)``; a pair for a distilled model in distilled training.
        targets: ``(B, C)`` float32; rows sum to 1, but for ``TeacherLabels(normalise=False)``.
        aux_loss: scalar, ScoreNet's weighted loss; 0 without horizontal mixing.
        stats: scalars without gradient, for logging.
        trace: what was mixed.
        output: what the model returned: the logits themselves, or an object that holds them.
    """

    logits: Any
    targets: Tensor
    aux_loss: Tensor
    stats: dict[str, Tensor]
    trace: MixTrace
    output: Any = None

    def loss(self, criterion: Callable[[Tensor, Tensor], Tensor] = soft_cross_entropy) -> Tensor:
        """Loss of the logits plus ``aux_loss``; the mean over a distilled model's heads.

        Args:
            criterion: function of logits and targets ``(B, C)``; soft-target cross-entropy by
                default.
        """
        heads = self.logits if isinstance(self.logits, tuple) else (self.logits,)
        losses = [criterion(logits, self.targets) for logits in heads]
        return torch.stack(losses).mean() + self.aux_loss


def trace_of(fed: Tensor, plan: PixelPlan | None, flow: Flow) -> MixTrace:
    """What was mixed, as far as the pixel stage and the pass know it.

    Args:
        fed: ``(B, C, H, W)`` images as fed to the model.
        plan: of the pixel stage, or None.
        flow: what happened inside the model, after the pass.
    """
    plans = tuple((block, outcome.plan) for block, _, outcome in flow.outcomes)
    trace = MixTrace(fed, plan, plans=plans)
    for block, _, outcome in flow.outcomes:
        if outcome.saliency is not None and outcome.difficulty is not None:
            trace.saliency[block], trace.difficulty[block] = outcome.saliency, outcome.difficulty
    prefix = flow.backbone.num_prefix_tokens
    for block, stages in flow.verticals.items():
        trace.selected[block] = {
            index: torch.cat([flow.selected[stage][index] for stage in stages], 1) - prefix
            for index in flow.selected[stages[0]]
        }
    return trace


def stats_of(plan: PixelPlan | None, weights: Tensor, flow: Flow) -> dict[str, Tensor]:
    """Scalars without gradient, for logging.

    Args:
        plan: of the pixel stage, or None.
        weights: ``(B, K)`` weight of each source's label; the first is the sample's own.
        flow: what happened inside the model, after the pass.
    """
    stats = {"target/own_weight": weights[:, 0].mean()}
    if plan is not None:
        stats["pixels/own_share"] = plan.lam.mean()
    for block, stage, outcome in flow.outcomes:
        name = f"{stage.short_name}_{block}"
        stats |= {f"{name}/{key}": value.detach() for key, value in outcome.stats.items()}
        if outcome.loss is not None:
            stats[f"aux/scorenet_{block}"] = outcome.loss.detach()
    return stats
