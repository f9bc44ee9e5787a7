"""The input pipeline beside whole training steps, and both together: what limits a run?

Batches are read, cropped, mirrored, augmented, normalised and erased exactly as by
``vitmix train``, with the published augmentation of a recipe. A product of two large matrices in
the same precision says what the machine's matrix units give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vitmix.benchmarks.measure import Comparison, Job, Work
from vitmix.benchmarks.options import BenchOptions
from vitmix.models import create_model
from vitmix.train.config import TrainConfig
from vitmix.train.data import ImageData, load_data
from vitmix.train.loading import make_augment, make_loader
from vitmix.train.recipes import get_recipe, settings_under
from vitmix.train.stages import build_mixing

__all__ = ["comparisons", "pipeline_comparison"]

# Batches of a turn. A loader works ahead: of the pipeline few batches alone would say nothing.
_BATCHES = {"step": 1, "pipeline": 24, "end to end": 2}
# Images of an epoch of CIFAR.
_EPOCH = 50_000


def comparisons(options: BenchOptions) -> Iterator[Job]:
    """The pipeline of a recipe."""
    yield Job(pipeline_comparison, (options,), 60)


def pipeline_comparison(options: BenchOptions) -> Comparison:
    """Compare the pipeline, the plain step, and both with the recipe's method."""
    given: dict[str, Any] = {
        "recipe": options.recipe,
        "data": options.data,
        "workers": options.workers,
        "precision": options.precision,
        "device": options.device,
        "compile": options.compile,
    }
    if options.data == "fake":
        given["data"] = get_recipe(options.recipe).fake_data()
    if options.models:
        given["model"] = options.models[0]
    size = options.batch_sizes[0] if options.batch_sizes else 8 if options.quick else 0
    if size:
        given["batch_size"] = size
    config = TrainConfig.from_dict({**settings_under(given), **given})
    data = load_data(config)
    augment = make_augment(data, config, torch.Generator().manual_seed(0), train=True)
    stream = _batches(data, config, augment, options.device)
    images, targets = next(stream)
    images = images.clone()

    def feed() -> None:
        for _ in range(_BATCHES["pipeline"]):
            next(stream)

    def end_to_end(step: Callable[[Tensor, Tensor], None]) -> None:
        for _ in range(_BATCHES["end to end"]):
            step(*next(stream))

    def plain() -> Work:
        return partial(_step(data, config, options.device, mixed=False), images, targets)

    def all_of_it() -> Work:
        return partial(end_to_end, _step(data, config, options.device, mixed=True))

    side = 8192 if options.device != "cpu" else 1024
    factor = torch.randn(side, side, device=options.device)
    if config.precision == "bf16":
        factor = factor.bfloat16()
    work = _operations(data, config, images)

    def rates(seconds: Mapping[str, float]) -> dict[str, dict[str, float]]:
        speeds = {"product": 2 * side**3 / seconds["product"]}
        speeds |= {name: work / seconds[name] for name in ("step", "end to end")}
        found = {}
        for name in _BATCHES:
            rate = len(images) / seconds[name]
            found[name] = {"images/s": rate, "s/epoch": _EPOCH / rate}
        for name, speed in speeds.items():
            found.setdefault(name, {})["TFLOP/s"] = speed / 1e12
            found[name]["of product"] = speed / speeds["product"]
        return found

    return Comparison(
        "pipeline",
        f"{config.recipe}, {config.model}, batch {config.batch_size}, {config.precision}"
        + (", compiled" if options.compile else ""),
        "step",
        {
            "step": plain,
            "pipeline": lambda: feed,
            "end to end": all_of_it,
            "product": lambda: partial(torch.mm, factor, factor),
        },
        {"data": str(config.data), "train_images": len(data.train), **given},
        images=len(images),
        parts=_BATCHES,
        rates=rates,
    )


def _batches(
    data: ImageData, config: TrainConfig, augment: Any, device: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches as a step takes them, without end."""
    loader = make_loader(data, config, train=True)
    while True:
        for batch in loader:
            images, targets = (part.to(device, non_blocking=True) for part in batch[:2])
            images = augment(images)
            if config.channels_last:
                images = images.to(memory_format=torch.channels_last)
            yield images, targets


def _step(
    data: ImageData, config: TrainConfig, device: str, *, mixed: bool
) -> Callable[[Tensor, Tensor], None]:
    """A function that does one training step: the plain one, or that of the recipe."""
    torch.manual_seed(0)
    classes = len(data.classes)
    model = create_model(config.model, num_classes=classes, img_size=data.img_size).to(device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    mixing = None
    if mixed:
        mixing = build_mixing(model, config, num_classes=classes, img_size=data.img_size)
    trained = (model if mixing is None else mixing).to(device).train()
    if config.compile:
        trained.compile()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-5)

    def step(images: Tensor, targets: Tensor) -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=config.precision == "bf16"):
            if mixing is None:
                loss = torch.nn.functional.cross_entropy(trained(images), targets)
            else:
                loss = trained(images, targets).loss()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step


def _operations(data: ImageData, config: TrainConfig, images: Tensor) -> int:
    """Floating-point operations of matrix products in one plain step."""
    with torch.device("meta"):
        model = create_model(config.model, num_classes=len(data.classes), img_size=data.img_size)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(images.shape)).sum().backward()
    total: int = counter.get_total_flops()
    return total
