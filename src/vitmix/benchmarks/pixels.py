"""The pixel stage alone: images and labels of a batch are mixed, no model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import vitmix
from vitmix.benchmarks.measure import Comparison, Job, Work
from vitmix.benchmarks.options import BenchOptions
from vitmix.errors import InputError
from vitmix.functional.targets import smooth_targets

__all__ = ["VARIANTS", "comparisons", "mixer", "pixel_comparison"]

VARIANTS = ("cutmix-timm", "cutmix+in-place", "cutmix", "cutmix-aligned", "cutmix-torchvision",
            "tokenmix+in-place", "tokenmix", "mixup-timm", "mixup+in-place", "mixup",
            "mixup-torchvision")  # fmt: skip
CLASSES = 1000


def comparisons(options: BenchOptions) -> Iterator[Job]:
    """ImageNet batches of the sizes chosen."""
    for batch in options.batch_sizes or (8 if options.quick else 128,):
        yield Job(pixel_comparison, (batch, 224, options.variants, options.device), 20)


def pixel_comparison(batch: int, side: int, variants: tuple[str, ...], device: str) -> Comparison:
    """Compare pixel mixes with timm's and torchvision's; images ``(batch, 3, side, side)``.

    timm's class overwrites the images it is given, as do variants with ``+in-place`` behind; the
    others make new ones.

    Raises:
        InputError: an unknown variant.
    """
    images = torch.randn(batch, 3, side, side, device=device)
    targets = torch.randint(CLASSES, (batch,), device=device)
    names = variants or VARIANTS
    for variant in names:
        if variant not in VARIANTS:
            raise InputError(f"expected variants of {', '.join(VARIANTS)}, got {variant!r}")
    return Comparison(
        "pixels",
        f"batch {batch}, 3x{side}x{side}",
        names[0],
        {variant: partial(_maker, variant, images, targets) for variant in names},
        {"batch_size": batch, "side": side, "num_classes": CLASSES},
        images=batch,
    )


def _maker(variant: str, images: Tensor, targets: Tensor) -> Work:
    if variant.endswith(("-timm", "+in-place")):
        images = images.clone()  # it will be overwritten
    return partial(mixer(variant, CLASSES), images, targets)


def mixer(variant: str, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images and class indices in, mixed images and soft targets out."""
    ours = variant.removesuffix("+in-place")
    name, _, library = ours.partition("-")
    cutmix = name == "cutmix"
    if library == "timm":
        from timm.data import Mixup

        return Mixup(  # type: ignore[no-any-return]
            mixup_alpha=0.0 if cutmix else 1.0,
            cutmix_alpha=1.0 if cutmix else 0.0,
            num_classes=classes,
            label_smoothing=0.0,
        )
    if library == "torchvision":
        from torchvision.transforms import v2

        other: Any = (v2.CutMix if cutmix else v2.MixUp)(num_classes=classes)
        return other  # type: ignore[no-any-return]
    mixes = {
        "cutmix": vitmix.CutMix(),
        "cutmix-aligned": vitmix.CutMix(align=True),
        "tokenmix": vitmix.TokenMix(),
        "mixup": vitmix.Mixup(alpha=1.0),
    }
    mix, grid = mixes[ours], (14, 14)

    def mixed_batch(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        size = (images.shape[2], images.shape[3])
        plan = mix.plan(len(images), size, grid=grid).to(images.device)
        mixture = plan.mixture(grid)
        soft = smooth_targets(targets, classes)
        mixed = plan.apply(images, out=None if ours == variant else images)
        return mixed, mixture.targets(mixture.shares.mean(1), soft)

    return mixed_batch
