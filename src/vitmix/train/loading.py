"""Data loaders: batches of uint8 images, out of memory or from decoding processes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from vitmix.train.augment import BatchAugment
from vitmix.train.data import DECODE_ERRORS, ImageData, Split, corrupt, decode
from vitmix.train.policies import Policy, make_policy

if TYPE_CHECKING:
    from torch import Tensor

    from vitmix.train.config import TrainConfig

__all__ = ["make_augment", "make_loader"]


class MemoryDataset(Dataset[Any]):
    """Decoded images; a batch is one index operation."""

    def __init__(self, split: Split) -> None:
        assert split.images is not None
        self.images, self.labels = split.images, split.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        index = torch.tensor(rows)
        return self.images[index], self.labels[index]


class DecodingDataset(Dataset[Any]):
    """Images decoded when needed. A corrupt one gives its place instead of its pixels."""

    def __init__(self, split: Split, size: int, crop: v2.Transform | None, policy: Policy | None):
        assert split.records is not None
        self.records, self.size, self.crop, self.policy = split.records, size, crop, policy

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, row: int) -> tuple[Tensor | str, int]:
        try:
            with self.records.open(row) as image:
                return self._pixels(image), int(self.records.labels[row])
        except DECODE_ERRORS:
            return self.records.describe(row), -1

    def _pixels(self, image: Any) -> Tensor:
        if self.crop is None:
            return decode(image, self.size)
        pixels: Tensor = v2.functional.pil_to_tensor(self.crop(image.convert("RGB")))
        if self.policy is not None:
            # The process' own generator: PyTorch seeds each worker from the loader's.
            seed = int(torch.randint(2**62, ()))
            pixels = self.policy(pixels[None], torch.Generator().manual_seed(seed))[0]
        return pixels


@dataclass
class CollateReadable:
    """Stacks a batch; corrupt images stop the run, or are left out if ``skip`` is set."""

    skip: bool

    def __call__(self, samples: list[tuple[Tensor | str, int]]) -> tuple[Tensor, Tensor]:
        images = []
        labels = []
        for pixels, label in samples:
            if isinstance(pixels, str):
                if not self.skip:
                    raise corrupt(pixels)
                print(f"vitmix: skipped {pixels}: cannot be decoded", file=sys.stderr)
            else:
                images.append(pixels)
                labels.append(label)
        return torch.stack(images), torch.tensor(labels)


def _as_is(batch: Any) -> Any:
    return batch


def make_loader(
    data: ImageData, config: TrainConfig, *, train: bool, generator: torch.Generator | None = None
) -> DataLoader[Any]:
    """Batches ``(images (B, 3, H, W) uint8, labels (B,))`` of one split."""
    split = data.train if train else data.test
    dataset: Dataset[Any]
    workers = 0
    collate: Any = _as_is
    if split.images is not None:
        dataset = MemoryDataset(split)
    else:
        crop = None
        if train:
            steps: list[Any] = [v2.RandomResizedCrop(data.img_size, interpolation=3)]
            flip = _flip_probability(data, config)
            if flip:
                steps.append(v2.RandomHorizontalFlip(flip))
            crop = v2.Compose(steps)
        policy = make_policy(config.aa) if train else None
        dataset = DecodingDataset(split, data.img_size, crop, policy)
        workers = config.workers
        collate = CollateReadable(config.skip_corrupt)
    return DataLoader(
        dataset,
        batch_size=config.batch_size if train else max(config.batch_size, 256),
        shuffle=train,
        drop_last=train and len(split) >= config.batch_size,
        generator=generator,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        collate_fn=collate,
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
    return BatchAugment(
        data.mean,
        data.std,
        generator,
        crop_padding=data.img_size // 8 if padding is None else padding,
        hflip=_flip_probability(data, config),
        policy=make_policy(config.aa),
        reprob=config.reprob,
    )


def _flip_probability(data: ImageData, config: TrainConfig) -> float:
    if config.hflip is not None:
        return config.hflip
    return 0.5 if data.mirror else 0.0
