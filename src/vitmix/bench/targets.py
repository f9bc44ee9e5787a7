"""What the ratios should be, and whether they are.

Each target names a comparison with pinned sizes and a figure of it. A target that needs a GPU waits
for one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from vitmix.bench.horizontal import gain_comparison, horizontal_comparison
from vitmix.bench.measure import Comparison, Measured, Ratio
from vitmix.bench.options import BenchOptions
from vitmix.bench.pixels import pixel_comparison
from vitmix.bench.saliency import saliency_comparison
from vitmix.bench.steps import step_comparison

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
        gpu: batches of a GPU.
    """

    vit: tuple[str, int] = ("deit_small_patch16_224", 8)
    cct: tuple[str, int] = ("cct_7_3x1_32", 64)
    pixels: tuple[int, int] = (128, 224)
    small: tuple[int, int, int] = (128, 256, 256)
    large: tuple[int, int, int] = (1024, 196, 384)
    gpu: tuple[int, ...] = (128, 1024)


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
        at_least: whether the bound is a lower one.
        read: the ratio, in a comparison.
        noise: what the same ratio would be if nothing differed, or None.
    """

    what: str
    key: str
    bound: float
    read: Callable[[Measured], Ratio]
    at_least: bool = False
    noise: Callable[[Measured], Ratio] | None = None


@dataclass(frozen=True)
class Verdict:
    """A target beside what was measured; ``ratio`` is None where it was not."""

    target: Target
    ratio: Ratio | None
    noise: Ratio | None = None

    @property
    def reached(self) -> bool | None:
        """Whether the median is on the right side of the bound."""
        if self.ratio is None:
            return None
        if self.target.at_least:
            return self.ratio.median >= self.target.bound
        return self.ratio.median <= self.target.bound


def comparisons(options: BenchOptions) -> Iterator[Comparison]:
    """The comparisons that the targets speak of, one by one; on a GPU also those of GPUs."""
    sizes, device = SIZES, options.device
    yield step_comparison(*sizes.vit, _ALIGNED, device, "fp32", options.time(120))
    yield step_comparison(*sizes.cct, _MIXUPS, device, "fp32", options.time(240))
    yield pixel_comparison(*sizes.pixels, (), device, options.time(20))
    yield saliency_comparison(*sizes.cct, (), device, "fp32", options.time(40))
    yield gain_comparison(*sizes.small[:2], device, options.time(10))
    yield horizontal_comparison(*sizes.small, device, options.time(15))
    yield horizontal_comparison(*sizes.large, device, options.time(40))
    if device != "cuda":
        return
    for name in (sizes.vit[0], sizes.cct[0]):
        for batch in sizes.gpu:
            for behind in ("", "+compiled"):
                variants = tuple(variant + behind for variant in _GPU)
                yield step_comparison(name, batch, variants, device, "bf16", options.time(10))


def targets() -> list[Target]:
    """All targets."""
    sizes = SIZES
    vit = _step_key(*sizes.vit)
    cct = _step_key(*sizes.cct)
    pixels = "pixels: batch {}, 3x{}x{}".format(*sizes.pixels, sizes.pixels[1])
    small = "batch {}, {} tokens, {} wide".format(*sizes.small)
    large = "batch {}, {} tokens, {} wide".format(*sizes.large)
    again = _time("plain-again")
    found = [
        Target("TL-Align step over the plain step", vit, 1.02, _time("tl-align"), noise=again),
        Target("TL-Align step: peak memory", vit, 1.02, _memory("tl-align", "plain")),
        Target(
            "dense TL-Align over ours",
            vit,
            1.06,
            _time("tl-align+baseline", "tl-align"),
            at_least=True,
        ),
        Target("horizontal step", cct, 1.03, _time("tokenmixup-h"), noise=again),
        Target("vertical step", cct, 1.05, _time("tokenmixup-v"), noise=again),
        Target("horizontal and vertical", cct, 1.06, _time("tokenmixup"), noise=again),
        Target("CutMix's pixels over timm's", pixels, 1.0, _time("cutmix", "cutmix-timm")),
        Target("TokenMix's pixels over timm's CutMix", pixels, 1.0,
               _time("tokenmix", "cutmix-timm")),
        Target("gradient saliency over attention saliency",
               "saliency: {}, batch {}, fp32".format(*sizes.cct), 60.0,
               _time("gradient", "attention"), at_least=True),
        Target("gain matrix by broadcasting over ours",
               "gain: batch {}, {} tokens".format(*sizes.small), 10.0,
               _time("baseline", "exact"), at_least=True),
        Target("horizontal mixing by broadcasting over ours", f"horizontal: {small}", 3.0,
               _time("baseline", "exact"), at_least=True),
        Target("horizontal mixing by broadcasting over ours", f"horizontal: {large}", 6.0,
               _time("baseline", "exact"), at_least=True),
        Target("its memory beyond inputs and results, ours over broadcasting",
               f"horizontal: {large}", 1 / 20, _memory("exact", "baseline", kept=False)),
    ]  # fmt: skip
    for name in (sizes.vit[0], sizes.cct[0]):
        for batch in sizes.gpu:
            for behind in ("", "+compiled"):
                key = _step_key(name, batch, "bf16") + (", compiled" if behind else "")
                found += [
                    Target(f"GPU: {variant} step", key, bound,
                           _time(variant + behind, "plain" + behind))
                    for variant, bound in (
                        ("tl-align", 1.03), ("tokenmixup-h", 1.05), ("tokenmixup-v", 1.05)
                    )
                ]  # fmt: skip
    return found


def verdicts(measured: Sequence[Measured]) -> list[Verdict]:
    """Every target beside what was measured."""
    by_key = {each.key: each for each in measured}
    found = []
    for target in targets():
        each = by_key.get(target.key)
        if each is None:
            found.append(Verdict(target, None))
        else:
            noise = None if target.noise is None else target.noise(each)
            found.append(Verdict(target, target.read(each), noise))
    return found


def _step_key(name: str, batch: int, precision: str = "fp32") -> str:
    return f"steps: {name}, batch {batch}, {precision}"


def _time(variant: str, base: str | None = None) -> Callable[[Measured], Ratio]:
    return lambda measured: measured.ratio(variant, base)


def _memory(variant: str, base: str, *, kept: bool = True) -> Callable[[Measured], Ratio]:
    """Ratio of peaks; without what is kept, of what is beyond inputs and results."""

    def read(measured: Measured) -> Ratio:
        rows = (measured.rows[name].memory for name in (variant, base))
        mine, other = (memory.peak - (0 if kept else memory.kept) for memory in rows)
        return _exactly(mine / max(other, 1))

    return read


def _exactly(value: float) -> Ratio:
    return Ratio(value, value, value)
