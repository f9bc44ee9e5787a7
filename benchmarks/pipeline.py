"""Time the input pipeline alone beside whole training steps: which of the two limits a run?

Batches are read, cropped, mirrored, augmented, normalised and erased exactly as by
``vitmix train``, with the published augmentation of a recipe. Both sides take turns in one process,
so that a machine whose speed drifts is fair to both; printed are medians over the rounds and the
median of the ratio round by round, with its quartiles.

    python benchmarks/pipeline.py --data path/to/cifar100 --recipe cct7-cifar100
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from vitmix.models import create_model
from vitmix.train.config import TrainConfig
from vitmix.train.data import ImageData, load_data
from vitmix.train.loading import make_augment, make_loader
from vitmix.train.recipes import settings_under

Work = Callable[[], int]  # does a turn, returns how many images that were


def make_pipeline(data: ImageData, config: TrainConfig, device: str, batches: int) -> Work:
    """Make a function that prepares this many batches for a step."""
    loader = make_loader(data, config, train=True)
    augment = make_augment(data, config, torch.Generator().manual_seed(0), train=True)

    def endless() -> Iterator[Any]:
        while True:
            yield from loader

    stream = endless()

    def prepare() -> int:
        count = 0
        for _ in range(batches):
            images, _ = (part.to(device, non_blocking=True) for part in next(stream))
            count += len(augment(images))
        _finish(device)
        return count

    return prepare


def make_step(data: ImageData, config: TrainConfig, device: str) -> Work:
    """Make a function that does one plain training step on a batch that is already there."""
    classes, size = len(data.classes), config.batch_size
    model = create_model(config.model, num_classes=classes, img_size=data.img_size).to(device)
    images = torch.randn(size, 3, data.img_size, data.img_size, device=device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    targets = torch.randint(classes, (size,), device=device)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-5)

    def step() -> int:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=config.precision == "bf16"):
            loss = torch.nn.functional.cross_entropy(model(images), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        _finish(device)
        return size

    return step


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def rates(works: dict[str, Work], rounds: int) -> dict[str, list[float]]:
    """Images a second of each work in each round, on the clock; the order turns every round."""
    for work in works.values():
        work()
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds):
        for name in list(works)[:: 1 if turn % 2 == 0 else -1]:
            start = time.perf_counter()
            images = works[name]()
            found[name].append(images / (time.perf_counter() - start))
    return found


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="as --data of vitmix train")
    parser.add_argument("--train-limit", type=int, help="read only the first N training images")
    parser.add_argument("--img-size", type=int)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--recipe", default="cct7-cifar100", help="see vitmix recipes")
    parser.add_argument("--model", help="another model than the recipe's")
    parser.add_argument("--batch-size", type=int, help="another batch size")
    parser.add_argument("--batches", type=int, default=20, help="batches a turn of the pipeline")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="arithmetic of the steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--channels-last", action="store_true", default=None)
    parser.add_argument("--json", type=Path, help="write the images a second of every round here")
    options = parser.parse_args()
    given = {key: value for key, value in vars(options).items() if value is not None}
    config = TrainConfig.from_dict({**settings_under(given), **given})
    start = time.perf_counter()
    data = load_data(config)
    reading = time.perf_counter() - start
    found = rates(
        {
            "pipeline": make_pipeline(data, config, options.device, options.batches),
            "step": make_step(data, config, options.device),
        },
        options.rounds,
    )
    ratios = [fed / used for fed, used in zip(found["pipeline"], found["step"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{config.model}, batch {config.batch_size}, {config.precision}, {options.device}")
    print(machine)
    print(f"reading {len(data.train) + len(data.test)} images took {reading:.1f} s")
    for name, values in found.items():
        print(f"{name:10}{statistics.median(values):12.1f} images/s")
    print(f"{'ratio':10}{middle:12.1f}   quartiles {low:.1f} {high:.1f}")
    if options.json:
        result = {
            "settings": {key: str(value) for key, value in vars(options).items()},
            "machine": machine, "reading_seconds": reading, "images_per_second": found,
            "ratio": middle,
        }  # fmt: skip
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
