"""Data loaders: batches of uint8 images, out of memory or from decoding processes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from vitmix.errors import InputError
from vitmix.train.augment import BatchAugment, enlarge
from vitmix.train.data import ImageData, Split
from vitmix.train.decoding import DECODE_ERRORS, CorruptImageError, centred, pixels_of
from vitmix.train.parallel import Processes
from vitmix.train.policies import Change, make_policy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from vitmix.maps import TeacherMaps
    from vitmix.train.config import TrainConfig

__all__ = [
    "Loader", "check_crops", "ignore_interrupt", "loading_processes", "make_augment", "make_loader",
]  # fmt: skip

Draw = tuple[int, int]  # row of the data set, seed of what is drawn while it is decoded


class EpochSampler(Sampler[Draw]):
    """Rows of an epoch with their seeds: a function of the run's seed and the epoch, no state.

    With ``repeats`` (Hoffer et al. 2020), a row is drawn so often in a row, and an epoch shows a
    part of the rows. ``own`` are the places in the epoch that this process works on: all of them,
    or :func:`own_places`.
    """

    def __init__(
        self, count: int, *, shuffle: bool, seed: int, repeats: int = 1, own: np.ndarray | None
    ) -> None:
        self.count, self.shuffle, self.seed, self.repeats = count, shuffle, seed, repeats
        self.own = np.arange(count) if own is None else own
        self.epoch = 0  # set by Lightning
        self.start = 0  # set by the loader

    def __len__(self) -> int:
        return len(self.own)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Draw]:
        own = self.own[self.start :]
        if not self.shuffle:
            return ((row, 0) for row in own.tolist())
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(self.count).repeat(self.repeats)[: self.count]
        seeds = rng.integers(2**62, size=self.count)
        return zip(order[own].tolist(), seeds[own].tolist(), strict=True)


def own_places(count: int, batch: int, processes: Processes) -> np.ndarray:
    """Places in a training epoch of ``count`` rows that this process works on.

    Each batch of the run is cut into as many pieces as there are processes, so that together they
    see the batches that one process would see.
    """
    whole = np.arange(count - count % batch).reshape(-1, processes.count, batch // processes.count)
    return whole[:, processes.rank].ravel()


def even_batch(count: int, batch: int, processes: int) -> int:
    """Images that a process tests at a time: ``batch``, or more if some would end one step early.

    >>> even_batch(1000, 256, 4), even_batch(1025, 256, 4)
    (256, 257)
    """
    most = -(-count // processes)
    while count % processes and (most - 1) % batch == 0:
        batch += 1
    return batch


class Loader(DataLoader[Any]):
    """A loader that goes on in the middle of an epoch; what came before is not read again.

    Lightning keeps the state in checkpoints. The order of the rows is chosen when the first batch
    is asked for, after Lightning has set the epoch.
    """

    batch_size: int
    sampler: EpochSampler

    def __init__(self, dataset: Dataset[Any], **options: Any) -> None:
        # A generator of its own: starting a pass draws from it, and no other draw may depend on
        # how often a pass was started.
        super().__init__(dataset, generator=torch.Generator(), **options)
        self._done = 0  # batches of this epoch

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.sampler.start = self._done * self.batch_size
        for batch in super().__iter__():
            self._done = (self._done + 1) % len(self)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """How much of the epoch is done."""
        return {"batches": self._done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next pass where another one was left."""
        self._done = state["batches"]


INTERPOLATIONS = {
    "bicubic": InterpolationMode.BICUBIC,
    "bilinear": InterpolationMode.BILINEAR,
}


class MemoryDataset(Dataset[Any]):
    """Decoded images, with maps where they are given; a batch is one index operation."""

    def __init__(self, split: Split, maps: TeacherMaps | None = None) -> None:
        assert split.images is not None
        self.images, self.labels = split.images, split.labels
        self.rows, self.maps = split.rows, maps

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, draws: list[Draw]) -> tuple[Tensor, ...]:
        index = torch.tensor([row for row, _ in draws])
        batch = self.images[index], self.labels[index]
        return batch if self.maps is None else (*batch, self.maps[self.rows[index]])


class DecodingDataset(Dataset[Any]):
    """Images decoded when needed. A corrupt one gives its place instead of its pixels."""

    def __init__(
        self,
        split: Split,
        cut: Callable[[Tensor], Tensor],
        crop: v2.Transform | None,
        policy: Change | None,
        maps: TeacherMaps | None = None,
    ):
        assert split.records is not None
        self.records, self.cut, self.crop, self.policy = split.records, cut, crop, policy
        self.rows, self.maps = split.rows, maps

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, draw: Draw) -> tuple[Any, ...]:
        row, seed = draw
        try:
            pixels = pixels_of(self.records.content(row))
        except DECODE_ERRORS:
            return self.records.describe(row), -1
        label = int(self.records.labels[row])
        if self.crop is None:
            return self.cut(pixels), label
        if self.maps is None:
            return self._changed(pixels, seed), label
        size = (int(pixels.shape[1]), int(pixels.shape[2]))
        changed = self._changed(pixels, seed, enlarge(self.maps[self.rows[[row]]], size)[0])
        return changed[:3], label, changed[3]

    def _changed(self, pixels: Tensor, seed: int, mask: Tensor | None = None) -> Tensor:
        """Crop, mirror and augment; the mask is put behind the pixels, as a fourth channel."""
        assert self.crop is not None
        # torchvision draws from the global generator: it is seeded for this image, whichever
        # process decodes it, and put back.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if mask is None:
                pixels = self.crop(pixels)
            else:
                both = self.crop(tv_tensors.Image(pixels), tv_tensors.Mask(mask))
                pixels = torch.cat([part.as_subclass(torch.Tensor) for part in both])
        if self.policy is not None:
            pixels = self.policy(pixels[None], torch.Generator().manual_seed(seed + 1))[0]
        return pixels


@dataclass
class CollateReadable:
    """Stacks a batch; corrupt images stop the run, or are left out if ``skip`` is set."""

    skip: bool

    def __call__(self, samples: list[tuple[Any, ...]]) -> tuple[Tensor, ...]:
        for place in (sample[0] for sample in samples if isinstance(sample[0], str)):
            if not self.skip:
                raise CorruptImageError.at(place)
            print(f"vitmix: skipped {place}: cannot be decoded", file=sys.stderr)
        images, labels, *maps = zip(
            *(sample for sample in samples if not isinstance(sample[0], str)), strict=True
        )
        return torch.stack(images), torch.tensor(labels), *map(torch.stack, maps)


def _as_is(batch: Any) -> Any:
    return batch


def ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches all processes; the main one decides when to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_loader(
    data: ImageData,
    config: TrainConfig,
    *,
    train: bool,
    processes: Processes | None = None,
    batch_size: int | None = None,
) -> Loader:
    """Batches ``(images (B, 3, H, W) uint8, labels (B,))`` of one split.

    Of several processes each gets its part: of every training batch, and of the test images, none
    of which is seen twice. With ``config.teacher_maps`` the training batches have maps
    ``(B, h, w)`` uint8 as a third part. Test images come 256 at a time, or as many as in training
    if that is more, or ``batch_size``.

    Raises:
        InputError: fewer images than a batch, or than processes.
    """
    processes = processes or Processes()
    split = data.train if train else data.test
    maps = data.maps if train and config.teacher_maps is not None else None
    least, what = (config.batch_size, "training") if train else (processes.count, "test")
    if processes.count > 1 and len(split) < least:
        raise InputError(
            f"expected at least {least} {what} images for {processes.count} processes and "
            f"--batch-size {config.batch_size}, got {len(split)}"
        )
    dataset: Dataset[Any]
    workers = 0
    collate: Any = _as_is
    if split.images is not None:
        dataset = MemoryDataset(split, maps)
    else:
        crop = None
        if train:
            steps: list[Any] = [_resized_crop(data.img_size, config)]
            flip = _flip_probability(data, config)
            if flip:
                steps.append(v2.RandomHorizontalFlip(flip))
            crop = v2.Compose(steps)
        policy = make_policy(config.aa, config.color_jitter, mean=data.mean) if train else None
        cut = partial(
            centred,
            size=data.img_size,
            crop_pct=config.crop_pct,
            interpolation=config.interpolation,
        )
        dataset = DecodingDataset(split, cut, crop, policy, maps)
        workers = loading_processes(config)
        collate = CollateReadable(config.skip_corrupt)
    size, own = config.batch_size // processes.count, None
    if not train:
        size = max(size, 256) if batch_size is None else batch_size
    if processes.count > 1:
        if train:
            own = own_places(len(split), config.batch_size, processes)
        else:
            own = np.arange(processes.rank, len(split), processes.count)
            size = even_batch(len(split), size, processes.count)
    return Loader(
        dataset,
        batch_size=size,
        sampler=EpochSampler(
            len(split), shuffle=train, seed=config.seed, repeats=config.aug_repeats, own=own
        ),
        drop_last=train and len(split) >= config.batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        collate_fn=collate,
        worker_init_fn=ignore_interrupt,
    )


def loading_processes(config: TrainConfig) -> int:
    """As many as asked for, but no more than processor cores that this process may use."""
    known = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    return min(config.workers, cores)


def check_crops(data: ImageData, config: TrainConfig) -> None:
    """Refuse settings of a crop that these images do not get.

    Raises:
        InputError: names the option.
    """
    if data.train.images is None and config.crop_padding is not None:
        raise InputError(
            "expected --scale, a random resized crop, for images that are too many or too large to "
            "keep in memory, got --crop-padding; leave it out"
        )
    if data.train.images is not None and config.ratio is not None and config.scale is None:
        raise InputError(
            "expected --scale with --ratio, as the crops of small images are padded ones without "
            "it; add --scale, or leave --ratio out"
        )


def make_augment(
    data: ImageData, config: TrainConfig, generator: torch.Generator, *, train: bool
) -> BatchAugment:
    """What happens to a batch on its device, after loading."""
    if not train:
        return BatchAugment(data.mean, data.std, generator)
    if data.train.images is None:  # cropped, flipped and augmented while it was decoded
        return BatchAugment(data.mean, data.std, generator, reprob=config.reprob)
    padding = config.crop_padding
    if padding is None:
        padding = data.img_size // 8 if config.scale is None else 0
    return BatchAugment(
        data.mean,
        data.std,
        generator,
        crop_padding=padding,
        hflip=_flip_probability(data, config),
        policy=make_policy(config.aa, config.color_jitter, mean=data.mean),
        reprob=config.reprob,
        scale=None if config.scale is None else (config.scale[0], config.scale[1]),
        ratio=_ratio(config),
        interpolation=config.train_interpolation,
    )


def _ratio(config: TrainConfig) -> tuple[float, float]:
    return (3 / 4, 4 / 3) if config.ratio is None else (config.ratio[0], config.ratio[1])


def _resized_crop(size: int, config: TrainConfig) -> v2.Transform:
    """A random resized crop of a decoded image."""
    scale = tuple(config.scale or (0.08, 1.0))
    modes = (
        list(INTERPOLATIONS)
        if config.train_interpolation == "random"
        else [config.train_interpolation]
    )
    crops = [
        v2.RandomResizedCrop(
            size, scale=scale, ratio=_ratio(config), interpolation=INTERPOLATIONS[mode]
        )
        for mode in modes
    ]
    return crops[0] if len(crops) == 1 else v2.RandomChoice(crops)


def _flip_probability(data: ImageData, config: TrainConfig) -> float:
    if config.hflip is not None:
        return config.hflip
    return 0.5 if data.mirror else 0.0
