"""What a step did to some of its samples, as arrays that can be drawn.

A picture is made in three parts: :func:`choose_rows` finds samples that tell something,
:func:`make_samples` follows them through the stages, :mod:`vitmix.plots.examples` draws them.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vitmix.backbones import Backbone
from vitmix.errors import InputError
from vitmix.functional.grids import Grid
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
from vitmix.mixing import MixingModel, MixTrace
from vitmix.tokens import BlendPlan, HorizontalTokenMixup, TokenMixer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vitmix.plots.style import Theme

__all__ = [
    "Preview",
    "Sample",
    "Selection",
    "Step",
    "choose_rows",
    "looking",
    "make_samples",
    "preview",
    "rule_name",
    "shown_as",
]

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


@dataclass(frozen=True)
class Preview:
    """Samples of a step as arrays, and as a picture.

    Attributes:
        samples: those that are shown.
        note: what the picture cannot tell, such as why nothing was mixed; empty if nothing.
        title: heading of the picture.
    """

    samples: tuple[Sample, ...]
    note: str = ""
    title: str = ""

    def figure(self, theme: Theme | None = None) -> Figure:
        """The picture, as a figure of matplotlib (``pip install 'vitmix[train]'``)."""
        from vitmix.plots.examples import preview_figure
        from vitmix.plots.style import LIGHT, themed

        theme = theme or LIGHT
        with themed(theme):
            return preview_figure(self, theme)

    def save(self, path: str | Path, *, dpi: int = 110) -> Path:
        """Write the picture in the format that the name ends in, such as ``.png`` or ``.pdf``.

        Raises:
            InputError: an unknown format, or a place that cannot be written to.
        """
        from vitmix.plots.style import save_figure

        return save_figure(self.figure(), Path(path), dpi=dpi)

    def _repr_png_(self) -> bytes:
        """What notebooks show."""
        buffer = io.BytesIO()
        self.figure().savefig(buffer, dpi=110)
        return buffer.getvalue()


def preview(
    mixing: MixingModel,
    images: Tensor,
    targets: Tensor,
    *,
    maps: Tensor | None = None,
    classes: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    samples: int | Sequence[int] = 3,
    draws: int = 1,
    seed: int = 0,
    title: str = "",
) -> Preview:
    """What a training step would do to a batch; see :meth:`vitmix.MixingModel.preview`."""
    if classes is not None and len(classes) != mixing.num_classes:
        raise InputError(
            f"expected {mixing.num_classes} names in `classes`, got {len(classes)}: "
            "one for each class of the model"
        )
    if samples == 0 or draws < 1:
        raise InputError(f"expected `samples` and `draws` of at least 1, got {samples} and {draws}")
    labels = targets if targets.ndim == 1 else targets.argmax(1)
    steps = []
    for attempt in range(draws):
        with looking(mixing, seed + attempt):
            steps.append(mixing(images, targets, maps=maps, record=True))
    out = max(steps, key=lambda step: float(_worth(step.trace, labels).max()))
    known = (
        [f"class {label}" for label in range(mixing.num_classes)] if classes is None else classes
    )
    if isinstance(samples, int):
        rows = choose_rows(out.trace, labels, samples)
        rows += [row for row in range(len(images)) if row not in rows][: samples - len(rows)]
    else:
        rows = list(samples)
        if not all(0 <= row < len(images) for row in rows):
            raise InputError(
                f"expected `samples` as places in the batch from 0 to {len(images) - 1}, got {rows}"
            )
    chosen = make_samples(
        out.trace, shown_as(images, mean, std), shown_as(out.trace.images, mean, std, like=images),
        [known[label] for label in labels.tolist()], rows, mixing.backbone, rule_name(mixing),
    )  # fmt: skip
    return Preview(tuple(chosen), _note(mixing, out.trace), title)


@contextmanager
def looking(mixing: MixingModel, seed: int) -> Iterator[None]:
    """Let a step be taken that leaves everything as it was: modes, draws, thresholds.

    The model itself is in evaluation mode, so that nothing is dropped out.
    """
    modes = {module: module.training for module in mixing.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in mixing.tokens.buffers()]
    generator = mixing.generator
    devices = [p.device for p in mixing.parameters() if p.device.type == "cuda"][:1]
    try:
        mixing.eval()
        mixing.training = True
        mixing.generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(seed)
            yield
    finally:
        mixing.generator = generator
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def shown_as(
    images: Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    like: Tensor | None = None,
) -> Tensor:
    """Normalised images ``(B, 3, H, W)`` as they look, ``(B, H, W, 3)`` in [0, 1].

    Without mean and standard deviation the range of ``like`` is stretched to [0, 1].
    """
    images = images.detach().float()
    if mean is None or std is None:
        like = images if like is None else like
        low, high = like.min(), like.max()
        images = (images - low) / (high - low).clamp_min(1e-6)
    else:
        scale, shift = (images.new_tensor(list(value))[:, None, None] for value in (std, mean))
        images = images * scale + shift
    return images.clamp(0, 1).permute(0, 2, 3, 1).cpu().expand(-1, -1, -1, 3)


def _stages(trace: MixTrace) -> list[tuple[int | None, Any]]:
    """The plans of a step that mix samples, in order, with their blocks."""
    pixels = [] if trace.pixels is None else [(None, trace.pixels)]
    tokens = [*trace.horizontal.items(), *trace.blended.items()]
    return [*pixels, *sorted(tokens, key=itemgetter(0))]


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
    best = _worth(trace, labels).topk(min(count, len(labels)))
    return [
        row
        for row, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        if value > 0
    ]


@torch.no_grad()
def _worth(trace: MixTrace, labels: Tensor) -> Tensor:
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


@dataclass(frozen=True)
class _State:
    """The samples at hand between two stages: pictures ``(n, H, W, 3)``, and whose pixels."""

    mixed: Tensor
    whose: Mixture


@torch.no_grad()
def make_samples(
    trace: MixTrace,
    images: Tensor,
    fed: Tensor,
    names: Sequence[str],
    rows: Sequence[int],
    backbone: Backbone,
    rule: str,
) -> list[Sample]:
    """Follow samples through the stages of a step.

    Args:
        trace: what was mixed.
        images: ``(B, H, W, 3)`` before mixing, as they look.
        fed: ``(B, H, W, 3)`` as fed to the model.
        names: class of each sample.
        rows: which samples.
        backbone: of the model.
        rule: name of the label rule in use.
    """
    trace = _moved(trace)
    plans, first = _stages(trace), _first(trace)
    needed = torch.tensor(rows, dtype=torch.long)
    for block, plan in reversed(plans):
        others = plan.partner[needed] - (0 if block is None else first)
        needed = torch.cat((needed, others)).unique()  # type: ignore[no-untyped-call]
    local = torch.zeros(len(images), dtype=torch.long)
    local[needed] = torch.arange(len(needed))

    def partner_of(block: int | None, plan: Any) -> Tensor:
        others = plan.partner[needed] - (0 if block is None else first)
        return local[others.clamp(0, len(images) - 1)]

    size: Grid = (images.shape[1], images.shape[2])
    states: list[tuple[int | None, Any, _State]] = []
    state = _State(images[needed], Mixture.unmixed(len(needed), size[0] * size[1], images.device))
    start = state
    for block, plan in plans:
        partner = partner_of(block, plan)
        if isinstance(plan, PixelPlan):
            own = plan.own if len(plan.own) == 1 else plan.own[needed]
            whose = PixelPlan(partner, _raster(own, size), plan.binary).mixture(size)
            state = _State(fed[needed], whose)
        elif isinstance(plan, HorizontalPlan):
            cells = plan.replace[needed].view(-1, *_grid(backbone, block, size))
            over = _raster(cells, size)
            mixed = torch.where(over[..., None], state.mixed[partner], state.mixed)
            state = _State(mixed, state.whose.replaced(partner, over.flatten(1)))
        else:
            own = plan.own_weight[needed]
            mixed = torch.lerp(state.mixed[partner], state.mixed, own[:, None, None, None])
            state = _State(mixed, state.whose.blended(partner, own))
        states.append((block, plan, state))
    labels = _label_weights(trace, needed, local, first, rule)
    made = []
    for row in rows:
        place = int(local[row])
        sources = list(dict.fromkeys(state.whose.sources[place].tolist()))

        def shares_of(at: _State, place: int = place, sources: list[int] = sources) -> Tensor:
            shares = torch.zeros(at.whose.shares.shape[1], len(sources))
            index = torch.tensor([sources.index(k) for k in at.whose.sources[place].tolist()])
            return shares.index_add_(1, index, at.whose.shares[place]).view(*size, -1)

        steps, before = [], start
        for block, plan, after in states:
            other = int(partner_of(block, plan)[place])
            step = Step(
                block,
                sources.index(other),
                before.mixed[other],
                shares_of(after),
                after.mixed[place],
            )
            if not isinstance(plan, HorizontalPlan):
                step = replace(step, blended=_own_share(plan, row))
            before = after
            if block is not None and isinstance(plan, HorizontalPlan):
                step = _with_evidence(step, trace, backbone, block, row, int(needed[other]), size)
            if other != place:
                steps.append(step)
        selections = []
        for target, by_block in sorted(trace.selected.items()):
            for block, positions in sorted(by_block.items()):
                seen = [s for at, _, s in states if at is None or at <= block]
                here = seen[-1] if seen else start
                chosen = torch.zeros(_grid(backbone, block, size), dtype=torch.bool)
                chosen.view(-1)[positions[row]] = True
                selections.append(
                    Selection(target, block, chosen, here.mixed[place], shares_of(here))
                )
        shares = shares_of(state)
        by_rule = {rule: labels[rule][place, sources]} if rule in labels else {}
        by_rule |= {"area": shares.mean((0, 1))} if rule != "area" else {}
        by_rule |= {name: w[place, sources] for name, w in labels.items() if name not in by_rule}
        made.append(
            Sample(
                row=row,
                names=tuple(names[int(needed[source])] for source in sources),
                original=images[row],
                shares=shares,
                mixed=state.mixed[place],
                steps=tuple(steps),
                selections=tuple(selections),
                labels=by_rule,
                rule=rule,
            )
        )
    return made


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


def _grid(backbone: Backbone, block: int | None, size: Grid) -> Grid:
    """Token grid at a block."""
    assert block is not None
    return backbone.block_grid(block, backbone.grid(size))


def _raster(cells: Tensor, size: Grid) -> Tensor:
    """Values ``(n, h, w)`` of cells on the pixels they cover, ``(n, H, W)``."""
    rows = torch.arange(size[0]) * cells.shape[1] // size[0]
    columns = torch.arange(size[1]) * cells.shape[2] // size[1]
    return cells[:, rows][:, :, columns]


def _with_evidence(
    step: Step, trace: MixTrace, backbone: Backbone, block: int, row: int, other: int, size: Grid
) -> Step:
    """A step of horizontal mixing with what it was decided by."""
    grid = _grid(backbone, block, size)
    step = replace(step, replaced=trace.horizontal[block].replace[row].view(grid))
    if block not in trace.saliency:
        return step
    saliency = trace.saliency[block] * (grid[0] * grid[1])
    return replace(
        step,
        saliency=saliency[row].view(grid),
        partner_saliency=saliency[other].view(grid),
        difficulty=float(trace.difficulty[block][row]),
    )


def _label_weights(
    trace: MixTrace, needed: Tensor, local: Tensor, first: int, rule: str
) -> dict[str, Tensor]:
    """By rule, the weight of each sample's label in each one's target, ``(n, n)``.

    Token stages mix targets by Eq. 11 of TokenMixup, where shares did not follow them.
    """
    inside = torch.zeros(len(local), dtype=torch.bool)
    inside[needed] = True

    def spread(sources: Tensor, weights: Tensor, complete: bool) -> Tensor:
        at = (sources[needed] - first).clamp(0, len(local) - 1)
        table = torch.zeros(len(needed), len(needed))
        table.scatter_add_(1, local[at], torch.where(inside[at], weights[needed].float(), 0))
        for block, plan in _stages(trace):
            if block is not None and not complete:
                others = (plan.partner[needed] - first).clamp(0, len(local) - 1)
                table = mix_targets(table, local[others], plan.own_weight[needed])
        return table

    found = {}
    if trace.sources is not None and trace.weights is not None:
        found[rule] = spread(trace.sources, trace.weights, trace.weights_cover_tokens)
    if trace.record is not None:
        evidence = trace.record.evidence
        for other in _other_rules(evidence):
            mixture = trace.record.mixture if other.follows_shares else evidence.mixture
            known = replace(evidence, mixture=mixture)
            name = _joined(RULES[type(other)], trace.pixels, bool(trace.horizontal), other)
            if name not in found:
                found[name] = spread(mixture.sources, other.weights(known), other.follows_shares)
    return found


def _other_rules(evidence: LabelEvidence) -> list[LabelRule]:
    """The rules that a step tells the weights of, whichever was in use."""
    rules: list[LabelRule] = []
    if evidence.attention is not None and evidence.pixels is not None:
        rules.append(AttentionLabels())
    if evidence.pooled_shares is not None:
        rules.append(TokenAlignedLabels())
    return rules


def rule_name(mixing: MixingModel) -> str:
    """What to call the rule that makes the targets."""
    name = RULES.get(type(mixing.labels), type(mixing.labels).__name__)
    horizontal = any(isinstance(stage, HorizontalTokenMixup) for stage in mixing.tokens)
    return _joined(name, mixing.mix, horizontal, mixing.labels)


def _joined(name: str, pixels: object, horizontal: bool, rule: LabelRule) -> str:
    """The name with that of the rule that token stages then mix targets by."""
    if rule.follows_shares or not horizontal:
        return name
    return "saliency" if pixels is None else f"{name}, then saliency"


def _note(mixing: MixingModel, trace: MixTrace) -> str:
    """Why a step mixed less than one might expect."""
    notes = []
    if mixing.mix is None and not any(isinstance(s, TokenMixer) for s in mixing.tokens):
        notes.append("This method mixes no samples: neither pixels nor tokens of a partner.")
    if trace.pixels is not None and bool((trace.pixels.lam > 0.999).all()):
        notes.append("The pixels were left unmixed in this draw.")
    taus = {s.block: s.tau for s in mixing.tokens if isinstance(s, HorizontalTokenMixup)}
    for block, plan in trace.horizontal.items():
        mixed = plan.replace.any(1)
        if bool(mixed.any()):
            continue
        difficulty = trace.difficulty[block]
        low, high, tau = float(difficulty.min()), float(difficulty.max()), taus[block]
        if isinstance(tau, float | int) and low >= tau:
            notes.append(
                f"No tokens were mixed at block {block}: ScoreNet finds no sample easy. Their "
                f"difficulty is {low:.2f} to {high:.2f} nats, tau is {tau:g}; a higher tau mixes "
                "more, inf mixes all."
            )
        else:
            notes.append(
                f"No tokens were replaced at block {block}: no partner has one that is more "
                "salient by rho; a smaller rho replaces more."
            )
    return " ".join(notes)
