"""Data sets ready for training: split, checked, and decoded into memory where they are small."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from vitmix.errors import InputError
from vitmix.maps import TeacherMaps
from vitmix.models import pretrained_facts
from vitmix.train.decoding import (
    DECODE_ERRORS,
    CorruptImageError,
    centred,
    image_size,
    pixels_of,
)
from vitmix.train.records import Records, Source, read_source

if TYPE_CHECKING:
    from torch import Tensor

    from vitmix.train.config import TrainConfig

__all__ = ["ImageData", "Split", "find_source", "image_side", "load_data", "pretrained_statistics"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Images up to this side are decoded once and kept, if all of them fit into this many bytes.
MEMORY_SIDE = 96
MEMORY_BYTES = 2 << 30


@dataclass(frozen=True)
class Split:
    """Training or test images: a uint8 tensor in memory, or records decoded when needed."""

    labels: Tensor  # (N,)
    images: Tensor | None  # (N, 3, H, W) uint8
    records: Records | None
    rows: Tensor  # (N,) which image of the source each one is

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: Tensor) -> Split:
        """The given ones, in the given order."""
        return Split(
            self.labels[rows],
            None if self.images is None else self.images[rows],
            None if self.records is None else self.records.select(rows),
            self.rows[rows],
        )


@dataclass(frozen=True)
class ImageData:
    """A data set: both splits, class names, one image size, and how to normalise."""

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    img_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mirror: bool
    skipped: int  # corrupt images left out
    maps: TeacherMaps | None = None  # of the source's training images

    def maps_of(self, rows: Tensor) -> Tensor | None:
        """``(B, h, w)`` uint8 maps of these training images, or None where there are none."""
        return None if self.maps is None else self.maps[self.train.rows[rows]]


def load_data(config: TrainConfig) -> ImageData:
    """Read, check, split and, if small, decode the data set that ``config.data`` names.

    Raises:
        InputError: for everything that would make training on it wrong.
    """
    source = find_source(config)
    data = _load(source, config)
    mean, std = pretrained_statistics(config) or (data.mean, data.std)
    mean, std = tuple(config.mean or mean), tuple(config.std or std)
    maps = None if config.teacher_maps is None else _open_maps(config.teacher_maps, source, data)
    return replace(data, mean=mean, std=std, maps=maps)


def pretrained_statistics(config: TrainConfig) -> tuple[tuple[float, ...], ...] | None:
    """Mean and standard deviation that the model's pretrained weights were trained with."""
    if not config.pretrained:
        return None
    facts = pretrained_facts(config.model)
    return None if facts is None else (tuple(facts.mean), tuple(facts.std))


def find_source(config: TrainConfig) -> Source:
    """The data set that ``config.data`` names, as its reader gives it.

    Raises:
        InputError: nothing there, or labels that don't fit its classes.
    """
    source = read_source(
        config.data,
        root=config.data_root,
        download=config.download,
        label_column=config.label_column,
        test_split=config.test_split,
    )
    _check_labels(source)
    return source


def image_side(config: TrainConfig, source: Source, *splits: Records) -> tuple[int, bool]:
    """The side that images are brought to, and whether all of them are kept in memory."""
    size = config.img_size or _first_size(source.name, splits, config.skip_corrupt)
    count = len(source.train) + (0 if source.test is None else len(source.test))
    return size, size <= MEMORY_SIDE and count * 3 * size * size <= MEMORY_BYTES


def _open_maps(folder: str, source: Source, data: ImageData) -> TeacherMaps:
    maps = TeacherMaps(folder)
    if maps.facts.get("fingerprint") != source.fingerprint:
        raise InputError(
            f"expected maps of the training images of {source.name!r} in {folder}, they are of "
            f"{maps.facts.get('data')!r} or of other images; make them with vitmix teach"
        )
    part = "whole" if data.train.images is None else "middle"
    if maps.facts.get("part") != part:
        raise InputError(
            f"expected maps of the {part} of each image in {folder}, got {maps.facts.get('part')}; "
            f"make them with vitmix teach --img-size {data.img_size}"
        )
    return maps


def _load(source: Source, config: TrainConfig) -> ImageData:
    if config.val_share is not None:
        source = replace(source, test=None)
    train, test = _split(source, config.val_share or config.test_share)
    if config.train_limit is not None:
        train = train.select(range(min(config.train_limit, len(train))))
    _check_classes(source, train)
    size, in_memory = image_side(config, source, train, test)
    check = _SizeCheck(source.name, None if config.img_size else size)
    if not in_memory:
        if config.img_size is None:
            _check_headers((train, test), check, config.skip_corrupt)
        return ImageData(
            source.name, source.classes, Split(train.labels, None, train, train.rows),
            Split(test.labels, None, test, test.rows), size, IMAGENET_MEAN, IMAGENET_STD,
            source.mirror, 0,
        )  # fmt: skip
    cut = partial(centred, size=size, interpolation=config.interpolation)
    cut_test = partial(cut, crop_pct=config.crop_pct)
    train_split, train_skipped = _decode(train, size, cut, check, config.skip_corrupt)
    test_split, test_skipped = _decode(test, size, cut_test, check, config.skip_corrupt)
    if not len(test_split) or len(set(train_split.labels.tolist())) < 2:
        raise InputError(f"expected readable images in {config.data}, too few are left of it")
    assert train_split.images is not None
    mean, std = _statistics(train_split.images)
    return ImageData(
        source.name, source.classes, train_split, test_split, size, mean, std,
        source.mirror, train_skipped + test_skipped,
    )  # fmt: skip


def _split(source: Source, test_share: float) -> tuple[Records, Records]:
    """The data set's own split, or a stratified one that is the same for every seed."""
    train, test = source.train, source.test
    generator = torch.Generator().manual_seed(0)
    if test is None:
        held_out, kept = [], []
        for label in sorted(set(train.labels.tolist())):
            rows = (train.labels == label).nonzero().flatten()
            rows = rows[torch.randperm(len(rows), generator=generator)]
            count = max(1, round(len(rows) * test_share)) if len(rows) > 1 else 0
            held_out.append(rows[:count])
            kept.append(rows[count:])
        test = train.select(torch.cat(held_out))
        train = train.select(torch.cat(kept))
        if not len(test):
            raise InputError(
                f"expected at least two images a class in {source.name!r} to hold some out for "
                "testing, got one; add images, or a test folder"
            )
    if _class_by_class(train.labels):  # so that the first N rows hold all classes
        train = train.select(_interleaved(train.labels, generator))
    return train, test


def _class_by_class(labels: Tensor) -> bool:
    """Whether the rows of a class lie together, so that the first rows hold only some classes."""
    changes = int((labels[1:] != labels[:-1]).sum())
    return changes < len(set(labels.tolist()))


def _interleaved(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Rows in an order that goes round the classes, random within each class."""
    rows = torch.randperm(len(labels), generator=generator)
    turn = torch.empty_like(rows)
    for label in sorted(set(labels.tolist())):
        members = (labels[rows] == label).nonzero().flatten()
        turn[members] = torch.arange(len(members))
    return rows[torch.argsort(turn, stable=True)]


def _check_labels(source: Source) -> None:
    for split in (source.train, source.test):
        if split is None or not len(split):
            continue
        low, high = int(split.labels.min()), int(split.labels.max())
        if low < 0 or high >= len(source.classes):
            raise InputError(
                f"expected labels from 0 to {len(source.classes) - 1} in {source.name!r}, "
                f"got {low if low < 0 else high}; correct the labels"
            )


def _check_classes(source: Source, train: Records) -> None:
    present = len(set(train.labels.tolist()))
    if present < 2:
        only = source.classes[int(train.labels[0])] if len(train) else "none"
        raise InputError(
            f"expected images of at least two classes in {source.name!r}, got {present} ({only}); "
            "add class folders, or raise --train-limit if you set it"
        )


@dataclass(frozen=True)
class _SizeCheck:
    """Refuses images whose size differs from ``side``; with ``None`` every size is welcome."""

    name: str
    side: int | None

    def __call__(self, size: tuple[int, int], place: str) -> None:
        if self.side is not None and size != (self.side, self.side):
            raise InputError(
                f"expected square images of one size in {self.name!r}, got {self.side}x{self.side} "
                f"and {_by(size)} ({place}); pass --img-size {self.side} to resize and crop them"
            )


def _first_size(name: str, splits: tuple[Records, ...], skip_corrupt: bool) -> int:
    """The shorter side of the first image that can be read."""
    for records in splits:
        for row in range(len(records)):
            try:
                return min(image_size(records.content(row)))
            except DECODE_ERRORS as error:
                if not skip_corrupt:
                    raise CorruptImageError.at(records.describe(row)) from error
    raise InputError(f"expected images in {name!r}, none can be read")


def _check_headers(splits: tuple[Records, ...], check: _SizeCheck, skip_corrupt: bool) -> None:
    """All sizes before the first step, without decoding."""
    for records in splits:
        for row in range(len(records)):
            try:
                size = image_size(records.content(row))
            except DECODE_ERRORS as error:
                if not skip_corrupt:
                    raise CorruptImageError.at(records.describe(row)) from error
            else:
                check(size, records.describe(row))


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _decode(
    records: Records,
    size: int,
    cut: Callable[[Tensor], Tensor],
    check: _SizeCheck,
    skip_corrupt: bool,
) -> tuple[Split, int]:
    """All images in one tensor, and how many were skipped. Threads: decoders release the GIL."""
    images = torch.empty((len(records), 3, size, size), dtype=torch.uint8)
    readable = torch.ones(len(records), dtype=torch.bool)

    def fill(rows: range) -> None:
        for row in rows:
            try:
                pixels = pixels_of(records.content(row))
            except DECODE_ERRORS as error:
                if not skip_corrupt:
                    raise CorruptImageError.at(records.describe(row)) from error
                readable[row] = False
            else:
                check((pixels.shape[2], pixels.shape[1]), records.describe(row))
                images[row] = cut(pixels)

    parts = [range(start, min(start + 64, len(records))) for start in range(0, len(records), 64)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(fill, parts):
            pass
    skipped = int((~readable).sum())
    if skipped:
        images = images[readable]
    return Split(records.labels[readable], images, None, records.rows[readable]), skipped


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel in [0, 1], over at most 20,000 images."""
    sample = images[:20_000].transpose(0, 1).flatten(1)  # (3, N * H * W)
    mean = [float(channel.double().mean() / 255) for channel in sample]
    std = [max(float(channel.double().std() / 255), 1e-3) for channel in sample]
    return tuple(mean), tuple(std)
