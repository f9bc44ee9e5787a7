"""Samples of a step, followed from stage to stage as arrays that can be drawn.

:func:`choose_rows` finds samples that tell something, :func:`make_samples` follows them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vitmix.functional.grids import Grid, on_pixels
from vitmix.functional.horizontal import HorizontalPlan, mix_targets
from vitmix.functional.mixture import Mixture
from vitmix.functional.pixel_plan import PixelPlan
from vitmix.labels import (
    AreaLabels,
    AttentionLabels,
    LabelEvidence,
    LabelRule,
    TeacherLabels,
    TokenAlignedLabels,
)
from vitmix.mixing import MixingModel
from vitmix.step import MixTrace
from vitmix.tokens import BlendPlan, HorizontalTokenMixup

__all__ = ["Sample", "Selection", "Step", "choose_rows", "evenness", "make_samples", "shown_as"]

RULES: dict[type[LabelRule], str] = {
    AreaLabels: "area", TeacherLabels: "teacher", AttentionLabels: "attention",
    TokenAlignedLabels: "aligned shares",
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A stage that mixed a sample with a partner.

    Attributes:
        block: block in front of which tokens were mixed; None for pixels.
        partner: which of the sample's sources the partner is.
        partner_image: ``(H, W, 3)`` as it came into the stage, in [0, 1].
        shares: ``(H, W, K)`` share of each source in every pixel behind the stage.
        mixed: ``(H, W, 3)`` behind the stage; tokens are drawn as patches of their source image.
        saliency: ``(h, w)`` of the sample's tokens, relative to even saliency, or None.
        partner_saliency: the same of the partner's.
        blended: own share, where everything was interpolated alike, or None.
        replaced: ``(h, w)`` bool, tokens that came from the partner, or None.
        difficulty: ScoreNet's cross-entropy in nats, or None.
    """

    block: int | None
    partner: int
    partner_image: Tensor
    shares: Tensor
    mixed: Tensor
    blended: float | None = None
    saliency: Tensor | None = None
    partner_saliency: Tensor | None = None
    replaced: Tensor | None = None
    difficulty: float | None = None


@dataclass(frozen=True)
class Selection:
    """Tokens of one block that vertical mixing selected.

    Attributes:
        target: the block that attends to them.
        block: the block whose input they are.
        chosen: ``(h, w)`` bool.
        image: ``(H, W, 3)`` whose patches they stand for.
        shares: ``(H, W, K)`` share of each source in every pixel of it.
    """

    target: int
    block: int
    chosen: Tensor
    image: Tensor
    shares: Tensor


@dataclass(frozen=True)
class Sample:
    """One sample of a step.

    Attributes:
        row: its place in the batch.
        names: class of each of its K sources; the first is its own.
        original: ``(H, W, 3)`` in [0, 1].
        shares: ``(H, W, K)`` share of each source in every pixel behind all stages.
        mixed: ``(H, W, 3)`` behind all stages.
        steps: the stages that mixed it, in order.
        selections: of vertical mixing.
        labels: weight of each source's label ``(K,)``, by the name of the label rule.
        rule: the one of them that is the target.
    """

    row: int
    names: tuple[str, ...]
    original: Tensor
    shares: Tensor
    mixed: Tensor
    steps: tuple[Step, ...]
    selections: tuple[Selection, ...]
    labels: dict[str, Tensor]
    rule: str


def shown_as(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalised images ``(B, C, H, W)`` as they look, ``(B, H, W, 3)`` in [0, 1] on the CPU."""
    images = images.detach().float().cpu()
    scale, shift = (torch.tensor(list(values))[:, None, None] for values in (std, mean))
    return (images * scale + shift).clamp(0, 1).permute(0, 2, 3, 1).expand(-1, -1, -1, 3)


def _stages(trace: MixTrace) -> list[tuple[int | None, Any]]:
    """The plans of a step that mix samples, in order, with their blocks."""
    pixels = [] if trace.pixels is None else [(None, trace.pixels)]
    return [*pixels, *trace.plans]


def _first(trace: MixTrace) -> int:
    """What partners count from: samples of other processes come before."""
    return 0 if trace.sources is None else int(trace.sources[0, 0])


def choose_rows(trace: MixTrace, labels: Tensor, count: int) -> list[int]:
    """Samples that every stage mixes evenly with one of another class, the best first.

    Left out are those that no stage mixes, and those with a partner in another process.

    Args:
        trace: what was mixed.
        labels: ``(B,)`` classes.
        count: samples at most.
    """
    best = evenness(trace, labels).topk(min(count, len(labels)))
    return [
        row
        for row, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        if value > 0
    ]


@torch.no_grad()
def evenness(trace: MixTrace, labels: Tensor) -> Tensor:
    """``(B,)`` how evenly the stages mix each sample with another class; 0 if not at all."""
    batch, first = len(labels), _first(trace)
    worth = torch.zeros(batch)
    here = torch.ones(batch, dtype=torch.bool)
    for block, plan in _stages(trace):
        others = plan.partner.cpu() - (0 if block is None else first)
        inside = (others >= 0) & (others < batch)
        others = others.clamp(0, batch - 1)
        here &= inside & here[others]
        own = plan.lam if isinstance(plan, PixelPlan) else plan.own_weight
        if isinstance(plan, HorizontalPlan):
            own = 1 - plan.replace.float().mean(1)
        own = own.float().cpu()
        same = (labels[others.to(labels.device)] == labels).cpu()
        worth += own * (1 - own) * torch.where(same, 0.01, 1.0)
    return worth * here


@torch.no_grad()
def make_samples(
    trace: MixTrace,
    images: Tensor,
    names: Sequence[str],
    rows: Sequence[int],
    mixing: MixingModel,
    mean: Sequence[float],
    std: Sequence[float],
) -> list[Sample]:
    """Follow samples through the stages of a step.

    Args:
        trace: what was mixed.
        images: ``(B, C, H, W)`` before mixing.
        names: class of each sample.
        rows: which samples.
        mixing: what took the step.
        mean: that the images were normalised by.
        std: likewise.
    """
    followed = _Followed(trace, images, rows, mixing, mean, std)
    return [followed.sample(row, names) for row in rows]


@dataclass(frozen=True)
class _State:
    """The samples at hand between two stages: pictures ``(n, H, W, 3)``, and whose pixels."""

    block: int | None
    plan: Any
    partner: Tensor
    mixed: Tensor
    whose: Mixture


class _Followed:
    """Some samples of a step, and those that they were mixed with, from stage to stage.

    Only these n samples are looked at. They have numbers of their own, by ``local``.
    """

    def __init__(
        self,
        trace: MixTrace,
        images: Tensor,
        rows: Sequence[int],
        mixing: MixingModel,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.trace = _moved(trace)
        self.backbone = mixing.backbone
        self.rule = _rule_name(mixing.labels, mixing.tokens, trace.pixels is not None)
        self.mixing = mixing
        self.batch = len(images)
        # What an image has beyond whole patches is not seen, and not shown.
        self.size = height, width = mixing.backbone.seen((images.shape[2], images.shape[3]))
        needed = torch.tensor(rows, dtype=torch.long)
        for block, plan in reversed(_stages(self.trace)):
            both = torch.cat((needed, self._partner(block, plan)[needed]))
            needed = both.unique()  # type: ignore[no-untyped-call]
        self.needed = needed
        self.local = torch.zeros(self.batch, dtype=torch.long)
        self.local[needed] = torch.arange(len(needed))
        here = needed.to(images.device)
        self.images, fed = (
            shown_as(batch[here, :, :height, :width], mean, std) for batch in (images, trace.images)
        )
        self.states = self._states(fed)
        self.labels = self._labels()

    def _partner(self, block: int | None, plan: Any) -> Tensor:
        """``(B,)`` places in the batch; those of other processes are not asked for."""
        others: Tensor = plan.partner - (0 if block is None else _first(self.trace))
        return others.clamp(0, self.batch - 1)

    def _grid(self, block: int) -> Grid:
        return self.backbone.block_grid(block, self.backbone.grid(self.size))

    def _states(self, fed: Tensor) -> list[_State]:
        """The samples before mixing, then behind every stage that mixes."""
        count, pixels = len(self.needed), self.size[0] * self.size[1]
        whose = Mixture.unmixed(count, pixels, self.needed.device)
        state = _State(None, None, torch.arange(count), self.images, whose)
        states = [state]
        for block, plan in _stages(self.trace):
            partner = self.local[self._partner(block, plan)[self.needed]]
            if isinstance(plan, PixelPlan):
                own = plan.own if len(plan.own) == 1 else plan.own[self.needed]
                mixed = fed
                drawn = PixelPlan(partner, on_pixels(own, self.size), plan.binary)
                whose = drawn.mixture(self.size)
            elif isinstance(plan, HorizontalPlan):
                cells = plan.replace[self.needed].view(count, *self._grid(block or 0))
                over = on_pixels(cells, self.size)
                mixed = torch.where(over[..., None], state.mixed[partner], state.mixed)
                whose = state.whose.replaced(partner, over.flatten(1))
            else:
                own = plan.own_weight[self.needed]
                mixed = torch.lerp(state.mixed[partner], state.mixed, own[:, None, None, None])
                whose = state.whose.blended(partner, own)
            state = _State(block, plan, partner, mixed, whose)
            states.append(state)
        return states

    def _labels(self) -> dict[str, Tensor]:
        """By rule, the weight ``(n, n)`` of each sample's label in each one's target."""
        trace, found = self.trace, {}
        if trace.sources is not None and trace.weights is not None:
            found[self.rule] = self._spread(
                trace.sources, trace.weights, trace.weights_cover_tokens
            )
        if trace.record is not None:
            evidence = trace.record.evidence
            for rule in _told_by(evidence):
                name = _rule_name(rule, self.mixing.tokens, trace.pixels is not None)
                if name not in found:
                    mixture = trace.record.mixture if rule.follows_shares else evidence.mixture
                    weights = rule.weights(replace(evidence, mixture=mixture))
                    found[name] = self._spread(mixture.sources, weights, rule.follows_shares)
        return found

    def _spread(self, sources: Tensor, weights: Tensor, complete: bool) -> Tensor:
        """Weights of sources as a table; token stages mix it by Eq. 11 if shares did not follow."""
        inside = torch.zeros(self.batch, dtype=torch.bool)
        inside[self.needed] = True
        at = (sources[self.needed] - _first(self.trace)).clamp(0, self.batch - 1)
        table = torch.zeros(len(self.needed), len(self.needed))
        table.scatter_add_(
            1, self.local[at], torch.where(inside[at], weights[self.needed].float(), 0)
        )
        for state in self.states:
            if state.block is not None and not complete:
                table = mix_targets(table, state.partner, state.plan.own_weight[self.needed])
        return table

    def sample(self, row: int, names: Sequence[str]) -> Sample:
        """What happened to one of the samples."""
        place, last = int(self.local[row]), self.states[-1]
        sources = list(dict.fromkeys(last.whose.sources[place].tolist()))
        shares = self._shares(last, place, sources)
        labels = {self.rule: self.labels[self.rule][place, sources]}
        labels |= {} if "area" in labels else {"area": shares.mean((0, 1))}
        labels |= {k: table[place, sources] for k, table in self.labels.items() if k not in labels}
        return Sample(
            row=row,
            names=tuple(names[int(self.needed[source])] for source in sources),
            original=self.images[place],
            shares=shares,
            mixed=last.mixed[place],
            steps=tuple(
                self._step(before, state, place, sources)
                for before, state in pairwise(self.states)
                if int(state.partner[place]) != place
            ),
            selections=tuple(self._selections(place, sources)),
            labels=labels,
            rule=self.rule,
        )

    def _shares(self, state: _State, place: int, sources: list[int]) -> Tensor:
        """``(H, W, K)`` of these sources."""
        known = state.whose.shares[place]
        index = torch.tensor([sources.index(k) for k in state.whose.sources[place].tolist()])
        shares = torch.zeros(len(known), len(sources)).index_add_(1, index, known)
        return shares.view(*self.size, -1)

    def _step(self, before: _State, state: _State, place: int, sources: list[int]) -> Step:
        row, other = int(self.needed[place]), int(state.partner[place])
        step = Step(
            block=state.block,
            partner=sources.index(other),
            partner_image=before.mixed[other],
            shares=self._shares(state, place, sources),
            mixed=state.mixed[place],
        )
        if not isinstance(state.plan, HorizontalPlan):
            return replace(step, blended=_own_share(state.plan, row))
        block, trace = state.block or 0, self.trace
        grid = self._grid(block)
        step = replace(step, replaced=state.plan.replace[row].view(grid))
        if block not in trace.saliency:
            return step
        saliency = trace.saliency[block].view(-1, *grid) * (grid[0] * grid[1])
        return replace(
            step,
            saliency=saliency[row],
            partner_saliency=saliency[int(self.needed[other])],
            difficulty=float(trace.difficulty[block][row]),
        )

    def _selections(self, place: int, sources: list[int]) -> Iterator[Selection]:
        """What vertical mixing took of a sample as it was at each block."""
        row = int(self.needed[place])
        for target, by_block in sorted(self.trace.selected.items()):
            for block, positions in sorted(by_block.items()):
                seen = [s for s in self.states if s.block is None or s.block <= block]
                chosen = torch.zeros(self._grid(block), dtype=torch.bool)
                chosen.view(-1)[positions[row]] = True
                yield Selection(
                    target, block, chosen, seen[-1].mixed[place],
                    self._shares(seen[-1], place, sources),
                )  # fmt: skip


def _own_share(plan: PixelPlan | BlendPlan, row: int) -> float | None:
    """The share of the own image in a sample that is blended evenly; None for one that is cut."""
    if isinstance(plan, BlendPlan):
        return float(plan.own_weight[row])
    own = plan.own[row if len(plan.own) > 1 else 0]
    return None if plan.binary or own.numel() > 1 else float(own)


def _moved(trace: MixTrace) -> MixTrace:
    """A trace on the CPU, where pictures are made."""

    def to_cpu(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().cpu()
        if isinstance(value, dict):
            return {key: to_cpu(entry) for key, entry in value.items()}
        if isinstance(value, tuple):
            parts = [to_cpu(entry) for entry in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if hasattr(value, "__dataclass_fields__"):
            return replace(value, **{k: to_cpu(getattr(value, k)) for k in vars(value)})
        return value

    moved: MixTrace = to_cpu(replace(trace, images=trace.images[:0]))
    return moved


def _told_by(evidence: LabelEvidence) -> list[LabelRule]:
    """The rules that a step tells the weights of, whichever was in use."""
    rules: list[LabelRule] = []
    if evidence.attention is not None and evidence.pixels is not None:
        rules.append(AttentionLabels())
    if evidence.pooled_shares is not None:
        rules.append(TokenAlignedLabels())
    return rules


def _rule_name(rule: LabelRule, stages: Iterable[object], pixels: bool) -> str:
    """What to call a label rule, with the rule by which horizontal mixing goes on from it."""
    name = RULES.get(type(rule), type(rule).__name__)
    then = [stage.relabel for stage in stages if isinstance(stage, HorizontalTokenMixup)]
    if rule.follows_shares or not then:
        return name
    return f"{name}, then {then[0]}" if pixels else then[0]
