"""``vitmix teach``: a teacher's activation maps of a whole data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torchvision.transforms.v2.functional as F
from torch.utils.data import DataLoader, Dataset, Subset

from vitmix.maps import TeacherMaps, store_maps
from vitmix.teacher import ActivationMaps
from vitmix.train.augment import normalise
from vitmix.train.data import find_source, image_side
from vitmix.train.decoding import DECODE_ERRORS, CorruptImageError, centred, pixels_of
from vitmix.train.loading import ignore_interrupt, loading_processes
from vitmix.train.provenance import pick_device
from vitmix.train.teachers import find_teacher

if TYPE_CHECKING:
    from torch import Tensor

    from vitmix.train.config import TrainConfig
    from vitmix.train.records import Records

__all__ = ["teach"]


class ViewedImages(Dataset[Any]):
    """Images as a teacher sees them, ``(3, side, side)`` uint8, with their labels.

    An image that cannot be decoded stops everything, or is black with ``skip_corrupt``: no run
    that skips it asks for its map.
    """

    def __init__(
        self, records: Records, cut: Callable[[Tensor], Tensor] | None, side: int, skip: bool
    ) -> None:
        self.records, self.cut, self.side, self.skip = records, cut, side, skip

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        size = [self.side, self.side]
        try:
            pixels = pixels_of(self.records.content(row))
        except DECODE_ERRORS as error:
            if not self.skip:
                raise CorruptImageError.at(self.records.describe(row)) from error
            pixels = torch.zeros(3, *size, dtype=torch.uint8)
        if self.cut is not None:
            pixels = self.cut(pixels)
        if list(pixels.shape[1:]) != size:
            pixels = F.resize(pixels, size, antialias=True)
        return pixels, int(self.records.labels[row])


def teach(
    config: TrainConfig, out: str, *, model: str | None = None, checkpoint: str | None = None
) -> TeacherMaps:
    """Store a teacher's maps of all training images of a data set.

    The images are those of the data set's reader, in its order, held out ones too: whichever of
    them a run trains on, it finds its maps. Images that training keeps in memory are seen as they
    are there, others as a whole, so that random crops of them find their part.

    Args:
        config: data, batch size, workers and device; see ``TEACH_OPTIONS``.
        out: folder of the maps; one that was begun goes on where it stopped.
        model: name of the teacher.
        checkpoint: checkpoint of the teacher; see :func:`vitmix.train.teachers.find_teacher`.

    Raises:
        InputError: data, teacher and folder don't fit; nothing was changed.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    source = find_source(config)
    size, in_memory = image_side(config, source, source.train)
    side = size if in_memory else config.img_size
    teacher = find_teacher(
        source.classes, source.name, model=model, checkpoint=checkpoint, side=side
    )
    cut = partial(centred, size=size) if in_memory else None
    images = ViewedImages(source.train, cut, teacher.side, config.skip_corrupt)
    maps_of = ActivationMaps(teacher.model.to(device))
    mean, std = tuple(config.mean or teacher.mean), tuple(config.std or teacher.std)

    def batches(start: int) -> Iterable[tuple[Tensor, Tensor]]:
        rest = Subset(images, range(start, len(images)))
        loader = DataLoader(
            rest,
            config.batch_size,
            num_workers=loading_processes(config),
            worker_init_fn=ignore_interrupt,
        )
        for pixels, labels in loader:
            yield normalise(pixels.to(device), mean, std), labels.to(device)

    facts = {
        "data": source.name, "classes": list(source.classes), "fingerprint": source.fingerprint,
        "teacher": teacher.name, "side": teacher.side, "mean": mean, "std": std,
        "part": "middle" if in_memory else "whole",
    }  # fmt: skip
    from tqdm import tqdm

    finished = 0
    with tqdm(total=len(images), unit="image", disable=None, leave=False) as bar:

        def show(done: int) -> None:
            nonlocal finished
            bar.update(done - finished)
            finished = done

        try:
            return store_maps(out, maps_of, batches, len(images), facts=facts, progress=show)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{finished} of {len(images)} maps are in {out}; the same command goes on there"
            ) from None
