"""Readers of tables: Parquet files, and whatever Hugging Face's datasets library loads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vitmix.errors import InputError
from vitmix.train.config import suggest
from vitmix.train.records import Records, Source, choose_splits, first_line

if TYPE_CHECKING:
    from vitmix.train.decoding import Content

__all__ = ["read_hub", "read_parquet"]

# Files that the datasets library reads by themselves, and the names of their readers.
HUB_READERS = {
    ".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json", ".csv": "csv",
}  # fmt: skip

# Columns of Parquet files that hold the box of an image's object, in pixels.
BOXES = ("box", "bbox")


def read_parquet(
    name: str, files: list[Path], label_column: str | None, test_split: str | None
) -> Source:
    """Parquet files in the Hugging Face image layout, named after their splits.

    Raises:
        InputError: not such files.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(re.split(r"[-_.]", file.name.lower())[0], []).append(file)
    train, test = choose_splits(splits, test_split, str(files[0].parent))

    def read(paths: list[Path]) -> Any:
        try:
            return pa.concat_tables([pq.read_table(path) for path in paths])
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"expected Parquet in {paths[0]}: {first_line(error)}") from error

    train_files = [file for split in train for file in splits[split]]
    table = read(train_files)
    metadata = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    features = metadata.get("info", {}).get("features", {})
    layout = _Layout.of(table.schema.names, features, label_column, str(train_files[0]))

    def records(
        table: Any, file: Path, classes: tuple[str, ...] | None
    ) -> tuple[tuple[str, ...], Records]:
        column = table[layout.label].to_pylist()
        names, labels = layout.labels(column, classes, f"{layout.label!r} of {file}")
        box = None if layout.box is None else _Box(table[layout.box])
        return names, Records(labels, _Column(table[layout.image]), _RowOf(str(file)), box=box)

    classes, train_records = records(table, train_files[0], None)
    test_records = None
    if test is not None:
        _, test_records = records(read(splits[test]), splits[test][0], classes)
    return Source(name, classes, train_records, test_records)


def read_hub(name: str, label_column: str | None, test_split: str | None) -> Source:
    """A data set of the datasets library.

    Args:
        name: a name on the hub, ``NAME:CONFIGURATION``, or a local folder or file.
        label_column: column of the labels; by default the first of class labels.
        test_split: split to test on.

    Raises:
        InputError: the library is not installed, nothing there, or no labelled images.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            "expected the datasets library for --data hf:..., it is not installed; "
            "pip install 'vitmix[hf]'"
        ) from error
    loaded = _load(datasets, name)
    if not isinstance(loaded, dict):
        loaded = {"train": loaded}
    train, test = choose_splits(loaded, test_split, name)
    first = loaded[train[0]]
    layout = _Layout.of(first.column_names, first.features.to_dict(), label_column, name)

    def records(split: str, classes: tuple[str, ...] | None) -> tuple[tuple[str, ...], Records]:
        table, place = loaded[split], f"{name} ({split})"
        names, labels = layout.labels(
            list(table[layout.label]), classes, f"{layout.label!r} of {place}"
        )
        images = table.select_columns(layout.image)
        if isinstance(images.features[layout.image], datasets.Image):  # we decode
            images = images.cast_column(layout.image, datasets.Image(decode=False))
        return names, Records(labels, _HubImages(images, layout.image), _RowOf(place))

    classes, train_records = records(train[0], None)
    test_records = None if test is None else records(test, classes)[1]
    title = Path(name.split(":")[0]).name
    return Source(title, classes, train_records, test_records)


def _load(datasets: Any, name: str) -> Any:
    """What the library makes of a name: splits by name, or one data set without splits."""
    path = Path(name).expanduser()
    try:
        if any((path / file).is_file() for file in ("dataset_dict.json", "state.json")):
            return datasets.load_from_disk(str(path))
        if path.is_dir():
            return datasets.load_dataset(str(path))
        if path.is_file() and path.suffix in HUB_READERS:
            return datasets.load_dataset(HUB_READERS[path.suffix], data_files=str(path))
        hub_name, _, configuration = name.partition(":")
        return datasets.load_dataset(hub_name, configuration or None)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise InputError(
            f"expected a data set that the datasets library loads as {name!r}: {first_line(error)}"
        ) from error


@dataclass(frozen=True)
class _Layout:
    """Which columns hold the images, the labels and boxes, and the names of the classes."""

    image: str
    label: str
    names: tuple[str, ...] | None
    box: str | None

    @classmethod
    def of(
        cls, columns: list[str], features: dict[str, Any], label_column: str | None, place: str
    ) -> _Layout:
        """Find them by the features' types, or by name."""
        features = {key: value for key, value in features.items() if isinstance(value, dict)}
        kinds = {key: value.get("_type") for key, value in features.items()}
        images = [key for key, kind in kinds.items() if kind == "Image"]
        images = images or [key for key in ("image", "img") if key in columns]
        if not images:
            raise InputError(
                f"expected an image column in {place}, got columns {', '.join(columns)}"
            )
        labels = [key for key, kind in kinds.items() if kind == "ClassLabel"]
        label = label_column or (labels[0] if labels else "label")
        if label not in columns:
            known = labels or columns
            raise InputError(
                f"expected --label-column to be one of {', '.join(known)} in {place}, "
                f"got {label!r}{suggest(label, known)}"
            )
        names = features.get(label, {}).get("names")
        box = next((key for key in BOXES if key in columns), None)
        return cls(images[0], label, tuple(names) if names else None, box)

    def labels(
        self, column: list[Any], classes: tuple[str, ...] | None, place: str
    ) -> tuple[tuple[str, ...], torch.Tensor]:
        """Names of the classes, and the column in numbers ``(N,)``."""
        names = self.names or classes or tuple(str(value) for value in sorted(set(column)))
        numbers: Iterable[Any] = column
        if self.names is None:  # values are the names themselves
            position = {entry: index for index, entry in enumerate(names)}
            numbers = [position.get(str(value), -1) for value in column]
        labels = torch.tensor([-1 if value is None else int(value) for value in numbers])
        wrong = ((labels < 0) | (labels >= len(names))).nonzero().flatten()
        if len(wrong):
            row = int(wrong[0])
            raise InputError(
                f"expected labels from 0 to {len(names) - 1} in column {place}, "
                f"got {column[row]!r} in row {row}; correct the data"
            )
        return names, labels


@dataclass(frozen=True)
class _Column:
    """Rows of an image column: ``{bytes, path}`` structs or plain bytes."""

    column: Any

    def __call__(self, row: int) -> Content:
        return _content(self.column[row].as_py())


@dataclass(frozen=True)
class _Box:
    """Rows of a column of boxes."""

    column: Any

    def __call__(self, row: int) -> Any:
        return self.column[row].as_py()


@dataclass(frozen=True)
class _HubImages:
    """Rows of an image column of a table of the datasets library."""

    table: Any
    image: str

    def __call__(self, row: int) -> Content:
        return _content(self.table[row][self.image])


def _content(value: Any) -> Content:
    if not isinstance(value, dict):
        content: Content = value or b""
        return content
    if not value.get("bytes") and value.get("path"):
        return Path(value["path"])
    return value.get("bytes") or b""


@dataclass(frozen=True)
class _RowOf:
    place: str

    def __call__(self, row: int) -> str:
        return f"row {row} of {self.place}"
