"""What the ratios should be, and whether they are.

Each target names a comparison with pinned sizes and a figure of it. A target that needs a GPU waits
for one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from vitmix.benchmarks.horizontal import gain_comparison, growth_comparison, horizontal_comparison
from vitmix.benchmarks.measure import Job, Measured, Ratio
from vitmix.benchmarks.options import BenchOptions
from vitmix.benchmarks.pipeline import pipeline_comparison
from vitmix.benchmarks.pixels import pixel_comparison
from vitmix.benchmarks.saliency import saliency_comparison
from vitmix.benchmarks.steps import step_comparison

__all__ = ["Sizes", "Target", "Verdict", "comparisons", "targets", "verdicts"]


@dataclass(frozen=True)
class Sizes:
    """What the targets speak of.

    Attributes:
        vit: model with a class token, and its batch.
        cct: model without, and its batch.
        pixels: images of a batch, and their side.
        small: batch, tokens and width of horizontal mixing.
        large: the same.
        growth: two batches, and the tokens and width of both.
        gpu: batches of a GPU.
        pipeline: recipe, model and batch of training end to end.
    """

    vit: tuple[str, int] = ("deit_small_patch16_224", 8)
    cct: tuple[str, int] = ("cct_7_3x1_32", 64)
    pixels: tuple[int, int] = (128, 224)
    small: tuple[int, int, int] = (128, 256, 256)
    large: tuple[int, int, int] = (1024, 196, 384)
    growth: tuple[int, int, int, int] = (512, 4096, 196, 384)
    gpu: tuple[int, ...] = (128, 1024)
    pipeline: tuple[str, str, int] = ("cct7-cifar100", "cct_7_3x1_32", 128)


SIZES = Sizes()
_ALIGNED = ("plain", "plain-again", "tl-align", "tl-align+baseline")
_MIXUPS = ("plain", "plain-again", "tokenmixup-h", "tokenmixup-v", "tokenmixup")
_GPU = ("plain", "tl-align", "tokenmixup-h", "tokenmixup-v")


@dataclass(frozen=True)
class Target:
    """A ratio that should be reached.

    Attributes:
        what: in words.
        key: of the comparison.
        bound: of the ratio.
        variant: what is divided ...
        base: ... by what.
        of: ``"time"``; ``"memory"``, the peak; ``"working memory"``, the peak beyond inputs and
            results; or a figure of the variant, which is no ratio any more.
        at_least: whether the bound is a lower one.
        unit: of the bound.
    """

    what: str
    key: str
    bound: float
    variant: str
    base: str
    of: str = "time"
    at_least: bool = False
    unit: str = "x"

    @property
    def on_gpu(self) -> bool:
        """Whether it needs a GPU."""
        return self.what.startswith("GPU")

    def meets(self, ratio: Ratio) -> bool:
        """Whether a median is on the right side of the bound."""
        return ratio.median >= self.bound if self.at_least else ratio.median <= self.bound

    def read(self, measured: Measured, kind: str = "clock") -> Ratio:
        """The ratio in a comparison; ``kind`` of time as in ``Measured.ratio``."""
        if self.of == "time":
            return measured.ratio(self.variant, self.base, kind)
        mine, other = measured.rows[self.variant], measured.rows[self.base]
        if "memory" not in self.of:
            value = mine.figures[self.of]
        elif self.of == "memory":
            value = mine.memory.peak / other.memory.peak
        else:
            value = mine.memory.working / max(other.memory.working, 1)
        return Ratio(value, value, value)


@dataclass(frozen=True)
class Verdict:
    """A target beside what was measured.

    Attributes:
        target: the target.
        ratio: by the clock; None if it was not measured.
        processor: by the processor's time, for targets of time.
        noise: the plain step again over the plain step, for targets of steps.
    """

    target: Target
    ratio: Ratio | None = None
    processor: Ratio | None = None
    noise: Ratio | None = None

    @property
    def reached(self) -> bool | None:
        """Whether the clock says so; None if it was not measured."""
        return None if self.ratio is None else self.target.meets(self.ratio)

    @property
    def reached_by_processor(self) -> bool | None:
        """Whether the processor's time says so; None if it was not measured."""
        return None if self.processor is None else self.target.meets(self.processor)


def comparisons(options: BenchOptions) -> Iterator[Job]:
    """The comparisons that the targets speak of, one by one: those of a GPU, or of a CPU."""
    sizes, device = SIZES, options.device
    if device == "cuda":
        for name in (sizes.vit[0], sizes.cct[0]):
            for batch in sizes.gpu:
                for behind in ("", "+compiled"):
                    variants = tuple(variant + behind for variant in _GPU)
                    yield Job(step_comparison, (name, batch, variants, device, "bf16"), 10)
        recipe, model, batch = sizes.pipeline
        for compiled in (False, True):
            chosen = replace(
                options, recipe=recipe, models=(model,), batch_sizes=(batch,), precision="bf16",
                compile=compiled,
            )  # fmt: skip
            yield Job(pipeline_comparison, (chosen,), 60)
        return
    yield Job(step_comparison, (*sizes.vit, _ALIGNED, device, "fp32"), 200)
    yield Job(step_comparison, (*sizes.cct, _MIXUPS, device, "fp32"), 150)
    yield Job(pixel_comparison, (*sizes.pixels, (), device), 40)
    yield Job(saliency_comparison, (*sizes.cct, (), device, "fp32"), 80)
    yield Job(gain_comparison, (*sizes.small[:2], device), 10)
    yield Job(horizontal_comparison, (*sizes.small, device), 15)
    yield Job(horizontal_comparison, (*sizes.large, device), 60)
    yield Job(growth_comparison, (*sizes.growth, device), 20)


def targets() -> list[Target]:
    """All targets."""
    sizes = SIZES
    vit, cct = _steps(*sizes.vit), _steps(*sizes.cct)
    pixels = "pixels: batch {0}, 3x{1}x{1}".format(*sizes.pixels)
    saliency = "saliency: {}, batch {}, fp32".format(*sizes.cct)
    gain = "gain: batch {}, {} tokens".format(*sizes.small)
    small, large = (
        "horizontal: batch {}, {} tokens, {} wide".format(*each)
        for each in (sizes.small, sizes.large)
    )
    growth = "growth: batch {} to {}, {} tokens, {} wide".format(*sizes.growth)
    few, many = sizes.growth[:2]
    found = [
        Target("TL-Align step over plain", vit, 1.02, "tl-align", "plain"),
        Target("its peak memory", vit, 1.02, "tl-align", "plain", "memory"),
        Target("dense TL-Align step over ours", vit, 1.06, "tl-align+baseline", "tl-align",
               at_least=True),
        Target("horizontal step over plain", cct, 1.03, "tokenmixup-h", "plain"),
        Target("vertical step over plain", cct, 1.05, "tokenmixup-v", "plain"),
        Target("horizontal and vertical step over plain", cct, 1.06, "tokenmixup", "plain"),
        Target("CutMix over timm's, both in place", pixels, 1.0, "cutmix+in-place",
               "cutmix-timm"),
        Target("TokenMix over timm's CutMix, both in place", pixels, 1.0, "tokenmix+in-place",
               "cutmix-timm"),
        Target("CutMix into a new batch over timm's in place", pixels, 1.0, "cutmix",
               "cutmix-timm"),
        Target("TokenMix into a new batch over timm's CutMix in place", pixels, 1.0, "tokenmix",
               "cutmix-timm"),
        Target("gradient over attention saliency", saliency, 60.0, "gradient+baseline",
               "attention", at_least=True),
        Target("gradient as here, without parameters', over attention saliency", saliency, 60.0,
               "gradient", "attention", at_least=True),
        Target("gain matrix, broadcast over ours", gain, 10.0, "baseline", "exact",
               at_least=True),
        Target("horizontal mixing, broadcast over ours", small, 3.0, "baseline", "exact",
               at_least=True),
        Target("horizontal mixing, broadcast over ours", large, 6.0, "baseline", "exact",
               at_least=True),
        Target("its memory beyond inputs and results, ours over broadcast", large, 0.05, "exact",
               "baseline", "working memory"),
        Target(f"growth in groups of 128, for {many // few} times the batch", growth,
               1.25 * many / few, f"batch {many}", f"batch {few}"),
        Target("total gain in groups of 128 over exact", growth, 0.97, f"batch {many}",
               f"batch {few}", "gain share", at_least=True),
    ]  # fmt: skip
    bounds = {"tl-align": 1.03, "tokenmixup-h": 1.05, "tokenmixup-v": 1.05}
    for name in (sizes.vit[0], sizes.cct[0]):
        for batch in sizes.gpu:
            for behind, ending in (("", ""), ("+compiled", ", compiled")):
                key = _steps(name, batch, "bf16") + ending
                found += [
                    Target(f"GPU: {each} step over plain", key, bound, each + behind,
                           "plain" + behind)
                    for each, bound in bounds.items()
                ]  # fmt: skip
    recipe, name, batch = sizes.pipeline
    for ending in ("", ", compiled"):
        key = f"pipeline: {recipe}, {name}, batch {batch}, bf16{ending}"
        found.append(
            Target("GPU: an epoch of CIFAR-100 end to end", key, 4.0, "end to end", "end to end",
                   "s/epoch", unit="s")
        )  # fmt: skip
    return found


def verdicts(measured: Sequence[Measured]) -> list[Verdict]:
    """Every target beside what was measured."""
    by_key = {each.key: each for each in measured}
    return [_verdict(target, by_key.get(target.key)) for target in targets()]


def _verdict(target: Target, measured: Measured | None) -> Verdict:
    if measured is None or not {target.variant, target.base} <= set(measured.rows):
        return Verdict(target)
    timed, again = target.of == "time", "plain-again"
    return Verdict(
        target,
        target.read(measured),
        target.read(measured, "processor") if timed else None,
        measured.ratio(again) if timed and again in measured.rows else None,
    )


def _steps(name: str, batch: int, precision: str = "fp32") -> str:
    return f"steps: {name}, batch {batch}, {precision}"
