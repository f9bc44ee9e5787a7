"""Activation maps of a whole data set, made once and read again in every epoch."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitmix.errors import InputError

__all__ = ["TeacherMaps", "store_maps"]

FORMAT = 1
META, ARRAY, TEMPORARY = "meta.json", "maps.npy", ".tmp"
SAVE_SECONDS = 5.0  # between two notes of how far storing has come


class TeacherMaps:
    """Stored activation maps of the ground-truth classes, one an image, memory-mapped.

    Each map is uint8 with a largest value of 255: a label rule divides it by its sum. Maps are
    made by ``vitmix teach`` or :func:`store_maps`.

    Attributes:
        folder: where they are.
        grid: rows and columns of each map.
        facts: what was written with them.

    Args:
        folder: folder of ``maps.npy`` and ``meta.json``.

    Raises:
        InputError: no maps there, or not all of them yet.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        meta = _read_meta(self.folder)
        if meta is None:
            raise InputError(
                f"expected a folder of maps, found no {META} in {self.folder}; "
                "vitmix teach makes one"
            )
        if meta["done"] < meta["images"]:
            raise InputError(
                f"expected maps of all {meta['images']} images in {self.folder}, got "
                f"{meta['done']}; run what makes them again, it goes on where it stopped"
            )
        self.grid: tuple[int, int] = (meta["grid"][0], meta["grid"][1])
        self.facts: dict[str, Any] = meta["facts"]
        self._array = _open_array(self.folder, (meta["images"], *self.grid), "r")

    def __len__(self) -> int:
        return len(self._array)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, rows: int | Tensor) -> Tensor:
        """Maps of these images: ``(h, w)`` of one, ``(..., h, w)`` of a tensor of rows; uint8.

        Raises:
            InputError: rows that are no whole numbers from 0 on, or beyond the last.
        """
        index = np.asarray(rows.cpu() if isinstance(rows, Tensor) else rows)
        inside = index.dtype.kind in "iu" and np.all((index >= 0) & (index < len(self)))
        if not inside:
            raise InputError(
                f"expected rows of stored maps as whole numbers from 0 to {len(self) - 1}, got "
                f"{rows}; rows are those of the data set that the maps were made of"
            )
        return torch.from_numpy(np.array(self._array[index]))

    def __repr__(self) -> str:
        return f"TeacherMaps({str(self.folder)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return TeacherMaps, (self.folder,)  # a loading process opens the file itself


def store_maps(
    folder: str | Path,
    teacher: Callable[[Tensor, Tensor], Tensor],
    batches: Callable[[int], Iterable[tuple[Tensor, Tensor]]],
    count: int,
    *,
    facts: dict[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> TeacherMaps:
    """Store the maps that a teacher gives for a data set. Interrupted, it can be called again.

    Args:
        folder: where to; made if it isn't there.
        teacher: :class:`vitmix.ActivationMaps` of a classifier, or a function of images
            ``(B, C, H, W)`` and classes ``(B,)`` that gives maps ``(B, h, w)`` of at least 0.
        batches: function of a row: the batches of images and classes from that row on, in order.
        count: images in all.
        facts: plain values to be stored with the maps; other maps in the folder must have the same.
        progress: called with the number of images that are done.

    Returns:
        The maps.

    Raises:
        InputError: the folder holds something else, or maps with other facts.

    Example:
        >>> import tempfile
        >>> images, classes = torch.rand(10, 3, 8, 8), torch.zeros(10).long()
        >>> def batches(start):
        ...     return zip(images[start:].split(4), classes[start:].split(4))
        >>> brightness = lambda images, classes: images.mean(1)
        >>> maps = store_maps(tempfile.mkdtemp(), brightness, batches, len(images))
        >>> len(maps), maps[torch.tensor([3, 1])].shape
        (10, torch.Size([2, 8, 8]))
    """
    folder = Path(folder)
    facts = json.loads(json.dumps(facts or {}))
    meta = _continued(folder, count, facts)
    if meta is None or meta["done"] < count:
        meta = _fill(folder, meta, teacher, batches, count, facts, progress)
    return TeacherMaps(folder)


def _fill(
    folder: Path,
    meta: dict[str, Any] | None,
    teacher: Callable[[Tensor, Tensor], Tensor],
    batches: Callable[[int], Iterable[tuple[Tensor, Tensor]]],
    count: int,
    facts: dict[str, Any],
    progress: Callable[[int], None] | None,
) -> dict[str, Any]:
    done = 0 if meta is None else int(meta["done"])
    array = None if meta is None else _open_array(folder, (count, *meta["grid"]), "r+")
    saved = time.monotonic()

    def save() -> None:
        if array is not None and meta is not None:
            array.flush()
            _write_meta(folder, {**meta, "done": done})

    try:
        for images, classes in batches(done):
            maps = as_uint8(teacher(images, classes)).cpu().numpy()
            if array is None:
                meta = {"format": FORMAT, "images": count, "grid": maps.shape[1:], "facts": facts}
                folder.mkdir(parents=True, exist_ok=True)
                array = _open_array(folder, (count, *maps.shape[1:]), "w+")
            if done + len(maps) > count or maps.shape[1:] != array.shape[1:]:
                raise InputError(
                    f"expected {count} maps of {array.shape[1]}x{array.shape[2]}, got a batch of "
                    f"{len(maps)} maps of {maps.shape[1]}x{maps.shape[2]} from row {done} on"
                )
            array[done : done + len(maps)] = maps
            done += len(maps)
            if time.monotonic() - saved > SAVE_SECONDS:
                save()
                saved = time.monotonic()
            if progress is not None:
                progress(done)
    finally:
        save()
    if done < count or meta is None:
        raise InputError(f"expected batches of {count} images, got {done}")
    return meta


def as_uint8(maps: Tensor) -> Tensor:
    """Maps ``(B, h, w)`` of at least 0 as uint8, the largest value of each as 255."""
    top = maps.float().amax((1, 2), keepdim=True)
    return (maps.float() / top.where(top > 0, 1) * 255).round().clamp_(0, 255).to(torch.uint8)


def _continued(folder: Path, count: int, facts: dict[str, Any]) -> dict[str, Any] | None:
    """Where an earlier call stopped; None for a new folder."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"expected a folder to store maps in, got the file {folder}")
    meta = _read_meta(folder)
    if meta is None:
        others = [] if not folder.exists() else [p.name for p in folder.iterdir()]
        if set(others) - {ARRAY, META + TEMPORARY}:
            raise InputError(
                f"expected a new or empty folder to store maps in, {folder} holds {others[0]}"
            )
        return None
    kept = {"images": meta["images"], **meta["facts"]}
    wanted = {"images": count, **facts}
    if kept != wanted:
        first = next(key for key in {**kept, **wanted} if kept.get(key) != wanted.get(key))
        raise InputError(
            f"expected maps of the same kind in {folder}, its {first} is "
            f"{_short(kept.get(first))}, not {_short(wanted.get(first))}; choose another folder"
        )
    return meta


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _read_meta(folder: Path) -> dict[str, Any] | None:
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"expected {META} of stored maps in {folder}: {error}") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise InputError(f"expected {META} of stored maps in {folder}, it is something else")
    return meta


def _write_meta(folder: Path, meta: dict[str, Any]) -> None:
    temporary = folder / (META + TEMPORARY)
    temporary.write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder / META)


def _open_array(folder: Path, shape: tuple[int, ...], mode: Any) -> np.memmap[Any, np.dtype[Any]]:
    path = folder / ARRAY
    if mode == "w+":
        return np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    try:
        array = np.lib.format.open_memmap(path, mode)
    except (OSError, ValueError) as error:
        raise InputError(f"expected the array of stored maps {path}: {error}") from error
    if array.shape != shape or array.dtype != np.uint8:
        raise InputError(
            f"expected uint8 maps {shape} in {path}, got {array.dtype} {array.shape}; "
            "delete the folder and make them again"
        )
    return array
