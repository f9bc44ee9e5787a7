"""Whole training steps: what does mixing cost on top of the plain step?

``plain-again`` is the plain step once more: what its ratio is off from 1 is noise. A variant with
``+baseline`` behind it is the method as it is usually coded
(:mod:`vitmix.benchmarks.baselines`), one with ``+compiled`` is compiled in one graph.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import vitmix
from vitmix.benchmarks.baselines import PlainMixing, has_baseline
from vitmix.benchmarks.measure import Comparison, Job, Work
from vitmix.benchmarks.options import BenchOptions
from vitmix.benchmarks.pixels import mixer
from vitmix.errors import InputError, UnsupportedModelError
from vitmix.models import create_model

__all__ = ["VARIANTS", "comparisons", "image_side", "step_comparison", "supported_variants"]

MODELS = ("deit_small_patch16_224", "cct_7_3x1_32", "vit_base_patch16_224",
          "swin_tiny_patch4_window7_224")  # fmt: skip
VARIANTS = ("plain", "plain-again", "cutmix", "cutmix-timm", "cutmix-torchvision", "tokenmix",
            "transmix", "transmix+baseline", "tl-align", "tl-align+baseline",
            "tokenmixup-h", "tokenmixup-h+baseline", "tokenmixup-v", "tokenmixup-v+baseline",
            "tokenmixup", "tokenmixup+baseline", "everything", "everything+baseline")  # fmt: skip
# What the larger models are asked for, whose steps take seconds.
SHORT = ("plain", "plain-again", "transmix", "tl-align", "tokenmixup-h", "tokenmixup-v",
         "tokenmixup", "everything")  # fmt: skip
# Steps as one graph, beside the plain step as it is; compiling each takes up to a minute.
COMPILED = ("plain", "plain+compiled", "tl-align+compiled", "tokenmixup+compiled",
            "everything+compiled")  # fmt: skip
BLOCK, RHO, KAPPA = 2, 0.005, 3

Loss = Callable[[Tensor, Tensor], Tensor]


def comparisons(options: BenchOptions) -> Iterator[Job]:
    """Steps of the models chosen; by default of four, with those batches that two cores take.

    By default those of two models are compiled, too, where there is a C++ compiler.
    """
    models = options.models or (MODELS[1:2] if options.quick else MODELS)
    for name in models:
        variants = options.variants
        if not variants:
            short = name in MODELS[2:] and not options.models
            variants = supported_variants(name, SHORT if short else VARIANTS)
            if options.compile:
                variants = tuple(f"{each}+compiled" for each in variants if "+" not in each)
        for batch in options.batch_sizes or (_batch_size(name, options),):
            note = "" if options.variants else ", overview"
            args = (name, batch, variants, options.device, options.precision, note)
            yield Job(step_comparison, args, 45)
    narrowed = options.models or options.variants or options.quick or options.compile
    if narrowed or not any(map(shutil.which, ("g++", "clang++"))):
        return
    for name in MODELS[:2]:
        for batch in options.batch_sizes or (_batch_size(name, options),):
            args = (name, batch, COMPILED, options.device, options.precision, ", compiled")
            yield Job(step_comparison, args, 45)


def _batch_size(name: str, options: BenchOptions) -> int:
    if options.device != "cpu":
        return 128
    if options.quick:
        return 8
    return 32 if image_side(name) <= 32 else 8 if "base" not in name else 4


def supported_variants(name: str, variants: Sequence[str] = VARIANTS) -> tuple[str, ...]:
    """Those variants that a model of this name allows."""
    with torch.device("meta"):
        model = create_model(name, num_classes=10, img_size=image_side(name))
    found = []
    for variant in variants:
        if variant.endswith("+baseline") and not has_baseline(model):
            continue
        try:
            _loss_of(variant.removesuffix("+baseline"), model, 10, None)
        except (ImportError, InputError, UnsupportedModelError):
            continue
        found.append(variant)
    return tuple(found)


def step_comparison(
    name: str,
    batch: int,
    variants: Sequence[str],
    device: str,
    precision: str,
    note: str = "",
) -> Comparison:
    """Compare training steps; the first variant is what the others are divided by.

    Args:
        name: model.
        batch: samples in a step.
        variants: of :data:`VARIANTS`, also with ``+compiled`` behind.
        device: where.
        precision: ``"fp32"`` or ``"bf16"`` (autocast).
        note: what the title ends with.

    Raises:
        InputError: an unknown variant.
    """
    for variant in variants:
        known = variant.removesuffix("+compiled")
        if known not in VARIANTS:
            raise InputError(
                f"expected variants of {', '.join(VARIANTS)} (with +compiled behind, if wanted), "
                f"got {variant!r}"
            )
    side = image_side(name)
    classes = 100 if side <= 32 else 1000
    images = torch.randn(batch, 3, side, side, device=device)
    targets = torch.randint(classes, (batch,), device=device)
    make = partial(_make_step, name, images, targets, classes, device, precision == "bf16")
    title = f"{name}, batch {batch}, {precision}"
    return Comparison(
        "steps",
        title + (", compiled" if all("+compiled" in each for each in variants) else "") + note,
        variants[0],
        {variant: partial(make, variant) for variant in variants},
        {"model": name, "batch_size": batch, "precision": precision, "num_classes": classes},
        images=batch,
    )


def image_side(name: str) -> int:
    """Side of the images that a model's name speaks of; 224 pixels without."""
    last = name.split(".")[0].removesuffix("_sine").rsplit("_", 1)[-1]
    return int(last) if last.isdigit() else 224


def _make_step(
    name: str,
    images: Tensor,
    targets: Tensor,
    classes: int,
    device: str,
    bf16: bool,
    variant: str,
) -> Work:
    """A function that does one whole training step; the optimiser has its state already."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=classes, img_size=images.shape[-1]).to(device).train()
    maps = torch.rand(len(images), 14, 14, device=device)
    loss_of, trained = _loss_of(variant.removesuffix("+compiled"), model, classes, maps)
    trained.to(device)
    if variant.endswith("+compiled"):
        trained.compile(fullgraph=True)
    parameters = [each for each in trained.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
            loss = loss_of(images, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step


def _loss_of(
    variant: str, model: nn.Module, classes: int, maps: Tensor | None
) -> tuple[Loss, nn.Module]:
    """The loss of a step, and the module that is trained."""
    if variant in ("plain", "plain-again"):
        return lambda images, targets: _cross_entropy(model(images), targets), model
    if variant.startswith("cutmix-"):
        mix = mixer(variant, classes)

        def loss(images: Tensor, targets: Tensor) -> Tensor:
            mixed, soft = mix(images, targets)
            return _cross_entropy(model(mixed), soft)

        return loss, model
    if variant.endswith("+baseline"):
        plain = PlainMixing(model, classes, **_plain_stages(variant.removesuffix("+baseline")))
        return plain.step_loss, plain
    stages = _stages(variant, lambda images, classes: maps)
    mixing = vitmix.MixingModel(model, num_classes=classes, **stages)
    return lambda images, targets: mixing(images, targets).loss(), mixing


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, targets)


def _stages(variant: str, teacher: Any) -> dict[str, Any]:
    """Arguments of ``MixingModel``. Every sample is easy: the most that the methods can cost."""
    box = vitmix.CutMix(align=True)
    horizontal = vitmix.HorizontalTokenMixup(block=BLOCK, tau=float("inf"), rho=RHO)
    vertical = vitmix.VerticalTokenMixup(block=BLOCK, kappa=KAPPA)
    table: dict[str, dict[str, Any]] = {
        "cutmix": {"mix": vitmix.CutMix()},
        "tokenmix": {"mix": vitmix.TokenMix(), "labels": vitmix.TeacherLabels(teacher)},
        "transmix": {"mix": box, "labels": vitmix.AttentionLabels()},
        "tl-align": {"mix": box, "labels": vitmix.TokenAlignedLabels()},
        "tokenmixup-h": {"tokens": [horizontal]},
        "tokenmixup-v": {"tokens": [vertical]},
        "tokenmixup": {"tokens": [horizontal, vertical]},
        "everything": {
            "mix": vitmix.TokenMix(),
            "labels": vitmix.TokenAlignedLabels(),
            "tokens": [horizontal, vertical],
        },
    }
    return table[variant]


def _plain_stages(variant: str) -> dict[str, Any]:
    """The same, as arguments of ``PlainMixing``."""
    horizontal, vertical = {"horizontal": BLOCK, "rho": RHO}, {"vertical": BLOCK, "kappa": KAPPA}
    box = vitmix.CutMix(align=True)
    table: dict[str, dict[str, Any]] = {
        "transmix": {"mix": box, "labels": "attention"},
        "tl-align": {"mix": box, "labels": "aligned"},
        "tokenmixup-h": horizontal,
        "tokenmixup-v": vertical,
        "tokenmixup": horizontal | vertical,
        "everything": {"mix": vitmix.TokenMix(), "labels": "aligned"} | horizontal | vertical,
    }
    return table[variant]
