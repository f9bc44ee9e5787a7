"""``MixingModel``: the one line that a user changes. Only this module knows all three stages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vitmix.backbones import Backbone, describe, describe_pixels
from vitmix.compilation import inlined, interpreted, passed_over, uncompiled
from vitmix.errors import InputError, UnsupportedModelError
from vitmix.flow import Flow
from vitmix.functional.grids import Grid
from vitmix.functional.mixture import Mixture
from vitmix.functional.targets import least_cross_entropy, smooth_targets
from vitmix.gradient import gradient_saliency, logits_of
from vitmix.labels import AreaLabels, LabelEvidence, LabelRule
from vitmix.pixels import PixelMix, PixelPlan
from vitmix.processes import gather, process_rank, require_equal_batches, world_size
from vitmix.refusals import (
    require_fit,
    require_kind,
    require_logits,
    require_maps,
    warn_of_smoothing,
)
from vitmix.relay import Relay
from vitmix.replay import Replay
from vitmix.step import MixOutput, MixTrace, StepRecord, stats_of, trace_of
from vitmix.tokens import (
    Given,
    HorizontalTokenMixup,
    TokenMixer,
    TokenStage,
    VerticalTokenMixup,
)
from vitmix.untrained import UntrainedWatch
from vitmix.weights import write_weights

if TYPE_CHECKING:
    from vitmix.preview import Preview

__all__ = ["MixingModel"]


@dataclass(frozen=True)
class _Step:
    """What is known of a training step before the pass.

    Attributes:
        images: ``(B, C, H, W)`` as fed to the model.
        soft: ``(B, C)`` labels of the unmixed samples.
        evidence: what label rules may look at.
        weights: ``(B, K)`` weights of the sources' labels, where nothing better is known yet.
        flow: what happens inside the model.
        compilable: whether the pass is a function of tensors alone. It is not under gradient
            checkpointing, nor where processes exchange samples.
    """

    images: Tensor
    soft: Tensor
    evidence: LabelEvidence
    weights: Tensor
    flow: Flow
    compilable: bool


class MixingModel(nn.Module):
    """Train an unmodified vision transformer with mixed images, tokens and labels.

    The three stages combine freely. Pixel stages with area or teacher labels work on any
    classifier, convolutional networks too. ``mixing(images, targets)`` in training mode mixes and
    returns a :class:`MixOutput`; in evaluation mode it mixes nothing, and ``mixing(images)`` is
    exactly ``model(images)``. The model keeps its class and its parameter names; between calls it
    carries no hook. Parameters of the stages (ScoreNet) belong to this module.

    ``mixing.compile(...)`` and ``torch.compile(mixing, ...)`` compile the pass through the model,
    with all that the stages do inside, as one graph; draws, pixels and labels around it run as
    before. A model whose graph breaks, gradient checkpointing, and ``gather=True`` over several
    processes run uncompiled (an error with ``fullgraph=True``). With ``model.compile()`` instead,
    the model runs compiled in evaluation and where no stage acts inside.

    Args:
        model: a model that :func:`vitmix.describe` supports.
        mix: pixel stage, or None.
        labels: label stage; :class:`vitmix.AreaLabels` by default.
        tokens: token stages, each with its block; or a single one.
        num_classes: classes of the targets; the model must give as many logits.
        label_smoothing: smoothing of the sources' labels, in [0, 1).
        generator: CPU generator of all draws; the global one by default.
        backbone: description of a home-made model, from ``vitmix.describe(model, blocks=...)``;
            models of known families need none.

    Raises:
        UnsupportedModelError: a model or a stage that cannot be followed; nothing was changed.
        InputError: an argument out of range, such as a block beyond the model's depth.

    Example:
        >>> import vitmix
        >>> from vitmix.models import create_model
        >>> model = create_model("cct_2_3x2_32", num_classes=10)
        >>> mixing = vitmix.MixingModel(
        ...     model,
        ...     mix=vitmix.CutMix(),
        ...     labels=vitmix.TokenAlignedLabels(),
        ...     tokens=[vitmix.HorizontalTokenMixup(block=1)],
        ...     num_classes=10,
        ... )
        >>> out = mixing(torch.rand(4, 3, 32, 32), torch.tensor([1, 2, 3, 4]))
        >>> out.loss().backward()
        >>> out.targets.shape
        torch.Size([4, 10])
    """

    def __init__(
        self,
        model: nn.Module,
        mix: PixelMix | None = None,
        labels: LabelRule | None = None,
        tokens: Iterable[TokenStage] | TokenStage = (),
        *,
        num_classes: int,
        label_smoothing: float = 0.0,
        generator: torch.Generator | None = None,
        backbone: Backbone | None = None,
    ) -> None:
        super().__init__()
        labels = AreaLabels() if labels is None else labels
        if isinstance(tokens, TokenStage):
            tokens = (tokens,)
        require_kind("tokens", tokens, (Iterable,))
        tokens = tuple(tokens)
        require_kind("mix", mix, (PixelMix, type(None)))
        require_kind("labels", labels, (LabelRule,))
        if num_classes < 2:
            raise InputError(f"expected `num_classes` of at least 2, got {num_classes}")
        if not 0.0 <= label_smoothing < 1.0:
            raise InputError(f"expected `label_smoothing` in [0, 1), got {label_smoothing}")
        require_kind("backbone", backbone, (Backbone, type(None)))
        if backbone is None:
            only_pixels = not tokens and labels.known_before_forward
            backbone = describe_pixels(model) if only_pixels else describe(model)
        backbone.require_part_of(model)
        require_fit(backbone, labels, tokens, num_classes)
        # Weights that are quantised have whole numbers for parameters.
        floating = (value for value in model.parameters() if value.is_floating_point())
        like = next(floating, torch.empty(0))
        try:
            for stage in tokens:
                stage.attach(
                    backbone.width(stage.blocks[0]),
                    num_classes,
                    backbone.num_prefix_tokens,
                    backbone.class_token,
                )
                if isinstance(stage, HorizontalTokenMixup):
                    _pool_as_classified(stage, backbone)
                stage.to(device=like.device, dtype=like.dtype)
        except InputError:
            for stage in tokens:
                stage.release()
            raise
        self.model = model
        self.mix = mix
        self.labels = labels
        self.tokens = nn.ModuleList(tokens)
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.generator = generator
        self.backbone = backbone
        self._relay = Relay()
        self._replays: list[Replay] = []
        self._watch = UntrainedWatch()
        for stage in tokens:
            warn_of_smoothing(stage, least_cross_entropy(num_classes, label_smoothing))

    def detach(self) -> nn.Module:
        """Return the model, which carries nothing of vitmix from now on.

        Between calls it carries nothing anyway, except under gradient checkpointing between a
        forward pass and its backward pass.
        """
        for replay in self._replays:
            replay.remove()
        self._replays.clear()
        return self.model

    def export(self, path: str | Path, *, head: bool = True) -> Path:
        """Write the model's weights for other programs: nothing of vitmix is needed to load them.

        Args:
            path: a file ``*.safetensors`` for any model, which
                ``timm.create_model(..., checkpoint_path=path)`` and
                :func:`vitmix.models.load_released` load; or, for a model of transformers, a folder
                for ``from_pretrained``.
            head: with the classifier; without it, the file is for dense tasks:
                ``timm.create_model(..., num_classes=0, checkpoint_path=path)``.

        Returns:
            The path.

        Raises:
            InputError: a path that does not fit, or weights spread over processes.
            UnsupportedModelError: no classifier is known to be left out.
        """
        return write_weights(self.model, path, head=head)

    def preview(
        self,
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
        """See what a training step would do to a batch.

        Nothing is changed by it: neither the model, nor thresholds, nor draws to come.

        Args:
            images: ``(B, C, H, W)`` as the model takes them.
            targets: ``(B,)`` class indices or ``(B, C)`` soft labels.
            maps: as in a step.
            classes: names of the classes.
            mean: that the images were normalised by, and ``std``, so that they look right; without
                them their range of values is stretched.
            std: standard deviations.
            samples: how many to show, those first that are mixed most evenly with another class; or
                their places in the batch.
            draws: take so many, and show the one that mixes most evenly.
            seed: of the first draw.
            title: heading of the picture.

        Returns:
            The samples as arrays; a picture in notebooks, and by ``.save("preview.png")``.

        Raises:
            InputError: arguments that don't fit.

        Example:
            >>> import vitmix
            >>> model = vitmix.models.create_model("cct_2_3x2_32", num_classes=10)
            >>> mixing = vitmix.MixingModel(model, mix=vitmix.CutMix(), num_classes=10)
            >>> shown = mixing.preview(torch.rand(4, 3, 32, 32), torch.arange(4), samples=2)
            >>> shown.samples[0].mixed.shape
            torch.Size([32, 32, 3])
        """
        from vitmix.preview import preview

        return preview(
            self, images, targets, maps=maps, classes=classes, mean=mean, std=std,
            samples=samples, draws=draws, seed=seed, title=title,
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        # Passes that wait for their backward belong to this process and this copy.
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "_replays": [], "_watch": UntrainedWatch()}

    def _forget_finished_passes(self) -> None:
        for replay in self._replays:
            if not replay.awaited:
                replay.remove()
        self._replays = [replay for replay in self._replays if replay.awaited]

    @passed_over
    def forward(
        self,
        images: Tensor,
        targets: Tensor | None = None,
        *,
        maps: Tensor | None = None,
        record: bool = False,
    ) -> Any:
        """Mix and run the model.

        Args:
            images: ``(B, C, H, W)`` as the model takes them.
            targets: ``(B,)`` class indices or ``(B, C)`` soft labels; only evaluation goes without.
            maps: for ``TeacherLabels(maps=...)`` in training: activation maps of the images
                ``(B, h, w)``, or their rows in the stored maps ``(B,)`` int64.
            record: follow shares and read attention whatever the label rule needs, and keep them
                in ``trace.record``; the step is otherwise the same, but for rounding.

        Returns:
            A :class:`MixOutput`; in evaluation mode without targets, what the model returns.

        Raises:
            InputError: images, targets and model don't fit.
            UnsupportedModelError: the model did not do what its description says, or this is a
                replica of ``nn.DataParallel``.
        """
        if not self.training:
            return self._evaluated(images, targets, self.model(images))
        if getattr(self, "_is_replica", False):
            raise UnsupportedModelError(
                "looked for a process of its own for each device, found a replica of "
                "nn.DataParallel, whose threads share the hooks of one pass: wrap the MixingModel "
                "in DistributedDataParallel and start the program with torchrun"
            )
        if torch.compiler.is_compiling():
            raise inlined()
        step = self._begin(images, targets, maps, record)
        run = self._pass if step.compilable else self._pass_uncompiled
        try:
            output = run(step.flow, step.images)
        finally:
            self._relay.remove()
        return self._end(step, output)

    @interpreted
    def _evaluated(self, images: Tensor, targets: Tensor | None, output: Any) -> Any:
        if targets is None:
            return output
        soft = smooth_targets(targets, self.num_classes)
        return MixOutput(logits_of(output), soft, soft.new_zeros(()), {}, MixTrace(images), output)

    def _pass(self, flow: Flow, images: Tensor) -> Any:
        """Run the model with all that happens inside of it: what ``torch.compile`` takes."""
        if not torch.compiler.is_compiling():
            return self._pass_uncompiled(flow, images)
        with flow.running():
            return self.model(images)

    @interpreted
    def _pass_uncompiled(self, flow: Flow, images: Tensor) -> Any:
        with uncompiled() if flow.needed else nullcontext(), flow.running():
            return self.model(images)

    @interpreted
    def _begin(
        self, images: Tensor, targets: Tensor | None, maps: Tensor | None, record: bool
    ) -> _Step:
        """Do all that comes before the pass, hooks last."""
        if targets is None:
            raise InputError(
                "expected targets in training mode, got none; call .eval() to predict without"
            )
        if images.ndim != 4 or not len(images) or targets.shape[:1] != images.shape[:1]:
            raise InputError(
                "expected images (B, C, H, W), at least one, and as many targets, "
                f"got {tuple(images.shape)} and {tuple(targets.shape)}"
            )
        require_maps(self.labels, maps, len(images))
        soft = smooth_targets(targets, self.num_classes, self.label_smoothing)
        classes = targets if targets.ndim == 1 else targets.argmax(1)
        prefix = self.backbone.num_prefix_tokens
        size = (int(images.shape[2]), int(images.shape[3]))
        grid = self.backbone.grid(size)
        plan, fed = None, images
        if self.mix is not None:
            seen = self.backbone.seen(size)
            plan = self.mix.plan(len(images), seen, grid=grid, generator=self.generator)
            plan = plan.to(images.device)
            fed = _applied(plan, images, seen)
            mixture = plan.mixture(grid, num_prefix_tokens=prefix)
        else:
            mixture = Mixture.unmixed(len(images), prefix + grid[0] * grid[1], images.device)
        mixture, soft = self._over_processes(mixture, soft)
        evidence = LabelEvidence(mixture, prefix, grid, images, classes, plan, maps)
        # Token stages need labels before the pass is over: by the area, where the rule's own
        # weights are only known afterwards.
        first_rule = self.labels if self.labels.known_before_forward else AreaLabels()
        weights = first_rule.weights(evidence)
        flow = self._flow(fed, mixture, mixture.targets(weights, soft), grid, record)
        self._forget_finished_passes()
        self._watch.look(self.model, self.tokens)
        self._relay.install(flow)
        compilable = not (flow.recomputes or self._gathers)
        return _Step(fed, soft, evidence, weights, flow, compilable)

    @interpreted
    def _end(self, step: _Step, output: Any) -> MixOutput:
        """Do all that comes after the pass."""
        flow, evidence, weights = step.flow, step.evidence, step.weights
        logits = logits_of(output)
        require_logits(logits, self.num_classes)
        record = None
        if flow.history is not None:
            seen = replace(evidence, attention=flow.attention, pooled_shares=flow.pooled_shares())
            record = StepRecord(seen, flow.mixture, tuple(flow.history))
        if not self.labels.known_before_forward:
            evidence = replace(
                evidence,
                mixture=flow.mixture if self.labels.follows_shares else evidence.mixture,
                attention=flow.attention,
                pooled_shares=flow.pooled_shares(),
            )
            weights = self.labels.weights(evidence)
        targets = evidence.mixture.targets(weights, step.soft)
        if not self.labels.follows_shares:
            for _, _, outcome in flow.outcomes:
                targets = outcome.mix_targets(targets)
        trace = replace(
            trace_of(step.images, evidence.pixels, flow),
            sources=evidence.mixture.sources,
            weights=weights,
            weights_cover_tokens=self.labels.follows_shares,
            record=record,
        )
        losses = [outcome.loss for _, _, outcome in flow.outcomes if outcome.loss is not None]
        aux_loss = torch.stack(losses).sum() if losses else step.soft.new_zeros(())
        stats = stats_of(evidence.pixels, weights, flow)
        if flow.replay is not None:  # last: an error leaves no hook
            flow.replay.wait_for(logits)
            flow.replay.install()
            self._replays.append(flow.replay)
        return MixOutput(logits, targets, aux_loss, stats, trace, output)

    @property
    def _gathers(self) -> bool:
        """Whether a stage mixes across processes."""
        return world_size() > 1 and any(getattr(stage, "gather", False) for stage in self.tokens)

    def _over_processes(self, mixture: Mixture, soft: Tensor) -> tuple[Mixture, Tensor]:
        """Sources and their labels, counted over all processes where a stage mixes across them."""
        if not self._gathers:
            return mixture, soft
        require_equal_batches(soft)
        sources = mixture.sources + process_rank() * len(soft)
        return mixture._replace(sources=sources), gather(soft)

    def _flow(
        self, fed: Tensor, mixture: Mixture, targets: Tensor, grid: Grid, record: bool
    ) -> Flow:
        mixers: dict[int, list[tuple[TokenMixer, Given]]] = {}
        verticals: dict[int, list[VerticalTokenMixup]] = {}
        for stage in self.tokens:
            assert isinstance(stage, TokenMixer | VerticalTokenMixup)
            block = stage.draw_block(self.generator)
            rows, columns = self.backbone.block_grid(block, grid)
            if isinstance(stage, VerticalTokenMixup):
                if stage.kappa > rows * columns:
                    raise InputError(
                        f"expected `kappa` of VerticalTokenMixup up to the {rows * columns} "
                        f"tokens of this input, got {stage.kappa}"
                    )
                verticals.setdefault(block, []).append(stage)
            else:
                given = stage.draw(len(fed), rows * columns, self.generator)
                if given is None:
                    continue
                if getattr(stage, "saliency", None) == "gradient":
                    saliency = gradient_saliency(self.model, self.backbone, block, fed, targets)
                    given = given._replace(saliency=saliency)
                mixers.setdefault(block, []).append((stage, given.to(fed.device)))
        follow_shares, attention_block = self.labels.follows_shares, self.labels.attention_block
        if record and self.backbone.is_readable:
            follow_shares |= self.backbone.alignment_reason is None
            attention_block = -1 if attention_block is None else attention_block
        if attention_block is not None:
            attention_block %= self.backbone.depth
        return Flow(
            self.backbone,
            mixture,
            targets,
            grid,
            mixers=mixers,
            verticals=verticals,
            follow_shares=follow_shares,
            attention_block=attention_block,
            recomputes=self.backbone.recomputes() and torch.is_grad_enabled(),
            keep_history=record,
        )


def _applied(plan: PixelPlan, images: Tensor, seen: Grid) -> Tensor:
    """Mix what the model sees of images; the rest stays as it is."""
    rows, columns = seen
    if (rows, columns) == images.shape[2:]:
        return plan.apply(images)
    mixed = images.clone()
    mixed[..., :rows, :columns] = plan.apply(images[..., :rows, :columns])
    return mixed


def _pool_as_classified(stage: HorizontalTokenMixup, backbone: Backbone) -> None:
    """Let ScoreNet average image tokens where the model does, beside a class token without use."""
    assert stage.scorenet is not None
    if stage.pool == "auto" and backbone.class_token and not backbone.reads_class_token:
        stage.scorenet.pool = "average"
