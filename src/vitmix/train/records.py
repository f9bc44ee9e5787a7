"""Readers: where labelled images come from. Each gives records; nothing is decoded here."""

from __future__ import annotations

import gzip
import hashlib
import importlib.resources
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from vitmix.errors import InputError
from vitmix.train.config import suggest

if TYPE_CHECKING:
    from torch import Tensor

    from vitmix.train.decoding import Content

__all__ = [
    "TORCHVISION_SETS", "Records", "Source", "choose_splits", "first_line", "read_pictures",
    "read_source",
]  # fmt: skip

IMAGE_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
TEST_NAMES = ("test", "val", "valid", "validation")

# Name on the command line: (torchvision class, arguments of the train and of the test split).
TORCHVISION_SETS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "cifar10": ("CIFAR10", {"train": True}, {"train": False}),
    "cifar100": ("CIFAR100", {"train": True}, {"train": False}),
    "mnist": ("MNIST", {"train": True}, {"train": False}),
    "fashionmnist": ("FashionMNIST", {"train": True}, {"train": False}),
    "svhn": ("SVHN", {"split": "train"}, {"split": "test"}),
    "stl10": ("STL10", {"split": "train"}, {"split": "test"}),
    "flowers102": ("Flowers102", {"split": "train"}, {"split": "test"}),
    "oxfordiiitpet": ("OxfordIIITPet", {"split": "trainval"}, {"split": "test"}),
    "food101": ("Food101", {"split": "train"}, {"split": "test"}),
    "dtd": ("DTD", {"split": "train"}, {"split": "test"}),
    "gtsrb": ("GTSRB", {"split": "train"}, {"split": "test"}),
    "eurosat": ("EuroSAT", {}, {}),
}


@dataclass(frozen=True)
class Records:
    """Labelled images that are not decoded yet."""

    labels: Tensor  # (N,) int64
    content: Callable[[int], Content]
    describe: Callable[[int], str]
    chosen: Tensor | None = None  # (N,) rows of what they were selected from
    box: Callable[[int], Any] | None = None  # x0, y0, x1, y1 of the object, the last ones inside

    @property
    def rows(self) -> Tensor:
        """``(N,)``: which row of its source each image was."""
        return torch.arange(len(self)) if self.chosen is None else self.chosen

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: Tensor | Sequence[int]) -> Records:
        """The given rows, in the given order."""
        index = torch.as_tensor(rows)
        chosen = index.tolist()
        return Records(
            self.labels[index],
            _Chosen(self.content, chosen),
            _Chosen(self.describe, chosen),
            self.rows[index],
            None if self.box is None else _Chosen(self.box, chosen),
        )


@dataclass(frozen=True)
class _Chosen:
    """A function of a row, seen through a selection (picklable, for data-loading processes)."""

    function: Callable[[int], Any]
    rows: list[int]

    def __call__(self, row: int) -> Any:
        return self.function(self.rows[row])


@dataclass(frozen=True)
class Source:
    """What a reader found. ``test`` is None where the data set has no split of its own."""

    name: str
    classes: tuple[str, ...]
    train: Records
    test: Records | None
    mirror: bool = True  # False where a mirrored image means something else, as for digits

    @property
    def fingerprint(self) -> str:
        """Changes with the classes, the labels, and any of 64 training images spread evenly."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        digest.update(self.train.labels.to(torch.int64).numpy().tobytes())
        count = len(self.train)
        for row in range(0, count, -(-count // 64)):
            content = self.train.content(row)
            if isinstance(content, Path):
                content = content.read_bytes()
            digest.update(content if isinstance(content, bytes) else content.tobytes())
        return digest.hexdigest()


def read_source(
    data: str,
    *,
    root: str,
    download: bool = False,
    label_column: str | None = None,
    test_split: str | None = None,
) -> Source:
    """Find the data set of this name, or read the folder at this path.

    Args:
        data: ``digits``, ``fake``, a torchvision name, a folder, or ``hf:`` and what the datasets
            library loads.
        root: where torchvision keeps its data sets.
        download: let torchvision fetch one.
        label_column: column of the labels, where there are columns.
        test_split: split to test on, where there are several.

    Raises:
        InputError: nothing there, no images, one class, or labels out of range.
    """
    if data.startswith("hf:"):
        from vitmix.train.tables import read_hub

        return read_hub(data.removeprefix("hf:"), label_column, test_split)
    path = Path(data).expanduser()
    name = data.removeprefix("torchvision:").lower()
    if path.is_dir() and name != "digits":
        for folder in (path, path / "data"):
            files = sorted(folder.glob("*.parquet")) if folder.is_dir() else []
            if files:
                from vitmix.train.tables import read_parquet

                return read_parquet(path.name, files, label_column, test_split)
        return _read_folder(path, test_split)
    if test_split is not None:
        raise InputError(
            f"expected --test-split with a folder, Parquet files or hf:..., got it with {data}, "
            "whose test images are fixed; leave it out"
        )
    if name == "digits":
        return _read_digits()
    if data.split(":")[0] == "fake":
        return _make_fake(data)
    if name in TORCHVISION_SETS:
        return _read_torchvision(name, Path(root), download)
    if path.is_file():
        raise InputError(f"expected --data to be a folder, got the file {path}; give its folder")
    known = ("digits", "fake", *TORCHVISION_SETS)
    raise InputError(
        f"expected --data to be an existing folder, hf:NAME or one of {', '.join(known)}; "
        f"there is no {data!r}{suggest(name, known)}"
    )


def read_pictures(path: Path) -> Source | None:
    """A folder of pictures without class folders, each a class of its own; None for another."""
    if not path.is_dir() or any(_is_image(file) for file in path.glob("*/**/*")):
        return None
    files = sorted(file for file in path.iterdir() if _is_image(file))
    if not files:
        return None
    records = Records(torch.arange(len(files)), files.__getitem__, _PathOf(files))
    return Source(path.name, tuple(file.stem for file in files), records, None)


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES


def choose_splits(
    names: Iterable[str], test_split: str | None, place: str
) -> tuple[list[str], str | None]:
    """Which of these splits to train on, and which one to test on.

    Raises:
        InputError: no split of that name, or none left to train on.

    >>> choose_splits(["test", "train", "validation"], None, "here")
    (['train'], 'test')
    >>> choose_splits(["train", "validation"], None, "here")
    (['train'], 'validation')
    """
    names = sorted(names)
    if test_split is not None and test_split not in names:
        raise InputError(
            f"expected --test-split to be one of {', '.join(names)} in {place}, "
            f"got {test_split!r}{suggest(test_split, names)}"
        )
    test = test_split or next((name for name in TEST_NAMES if name in names), None)
    others = [name for name in names if name != test and name not in TEST_NAMES]
    train = ["train"] if "train" in others else others
    if not train:
        raise InputError(
            f"expected a split named train in {place}, got only {', '.join(names)}; "
            "rename the one to train on"
        )
    return train, test


def _read_digits() -> Source:
    """Scikit-learn's 1,797 handwritten digits, from its file: no import of the whole package."""
    try:
        packed = importlib.resources.files("sklearn.datasets.data").joinpath("digits.csv.gz")
        table = np.loadtxt(io.BytesIO(gzip.decompress(packed.read_bytes())), delimiter=",")
    except (ImportError, FileNotFoundError):
        from sklearn.datasets import load_digits

        bunch = load_digits()
        table = np.concatenate([bunch.data, bunch.target[:, None]], axis=1)
    pixels = np.round(table[:, :64].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)

    def open_digit(row: int) -> Image.Image:
        return Image.fromarray(pixels[row]).resize((32, 32), Image.Resampling.BICUBIC)

    labels = torch.from_numpy(table[:, 64].astype(np.int64))
    records = Records(labels, open_digit, lambda row: f"digit {row}")
    names = tuple(str(digit) for digit in range(10))
    return Source("digits", names, records, None, mirror=False)


def _make_fake(data: str) -> Source:
    """Random images for dry runs: ``fake:CLASSESxSIDExIMAGES``; a quarter as many to test on."""
    shape = re.fullmatch(r"fake(?::(\d+)x(\d+)(?:x(\d+))?)?", data)
    classes, side, count = ((int(n) if n else 0) for n in shape.groups()) if shape else (1, 0, 0)
    classes, side, count = classes or 10, side or 32, count or 1024
    if shape is None or min(classes, count) < 2:
        raise InputError(
            "expected fake data as fake:CLASSESxSIDExIMAGES with at least 2 classes and images, "
            f"for example fake:100x32x640, got {data!r}"
        )

    def split(first: int, count: int) -> Records:
        return Records(torch.arange(count) % classes, _Noise(first, side), _NumberOf("fake image"))

    names = tuple(f"class {label}" for label in range(classes))
    return Source("fake", names, split(0, count), split(count, max(1, count // 4)))


@dataclass(frozen=True)
class _Noise:
    """Random pixels, the same for the same row."""

    first: int
    side: int

    def __call__(self, row: int) -> Image.Image:
        rng = np.random.default_rng(self.first + row)
        return Image.fromarray(rng.integers(256, size=(self.side, self.side, 3), dtype=np.uint8))


@dataclass(frozen=True)
class _NumberOf:
    what: str

    def __call__(self, row: int) -> str:
        return f"{self.what} {row}"


def _read_torchvision(name: str, root: Path, download: bool) -> Source:
    import torchvision.datasets

    class_name, train_arguments, test_arguments = TORCHVISION_SETS[name]
    factory = getattr(torchvision.datasets, class_name)

    def split(arguments: dict[str, Any]) -> Any:
        try:
            return factory(str(root), download=download, **arguments)
        except OSError as error:
            raise InputError(
                f"expected to fetch {class_name} into {root}, failed: {first_line(error)}; "
                "check the network and the folder"
            ) from error
        except RuntimeError as error:
            raise InputError(
                f"expected {class_name} under {root}, found none; "
                "pass --download to fetch it, or --data-root FOLDER where it is"
            ) from error

    train = split(train_arguments)
    test = split(test_arguments) if test_arguments else None
    train_records = _torchvision_records(train)
    names = getattr(train, "classes", None)
    if names is None:
        names = range(int(train_records.labels.max()) + 1)
    classes = tuple(str(entry) for entry in names)
    test_records = None if test is None else _torchvision_records(test)
    mirror = name not in ("mnist", "svhn", "gtsrb")
    return Source(name, classes, train_records, test_records, mirror)


def _torchvision_records(dataset: Any) -> Records:
    for attribute in ("targets", "labels", "_labels"):
        labels = getattr(dataset, attribute, None)
        if labels is not None:
            break
    else:  # GTSRB keeps pairs only
        labels = [label for _, label in dataset._samples]
    tensor = torch.as_tensor(np.asarray(labels), dtype=torch.int64)
    return Records(
        tensor, lambda row: dataset[row][0], lambda row: f"{type(dataset).__name__} image {row}"
    )


def _read_folder(path: Path, test_split: str | None) -> Source:
    split = {entry.name.lower(): entry for entry in path.iterdir() if entry.is_dir()}
    if "train" not in split:
        if test_split is not None:
            raise InputError(
                f"expected folders train and {test_split} in {path} for --test-split, "
                "found no train; leave the option out to hold some images out"
            )
        classes, train = _class_folders(path, None)
        return Source(path.name, classes, train, None)
    _, test_name = choose_splits(split, test_split, str(path))
    classes, train = _class_folders(split["train"], None)
    test = None if test_name is None else _class_folders(split[test_name], classes)[1]
    return Source(path.name, classes, train, test)


def _class_folders(path: Path, classes: tuple[str, ...] | None) -> tuple[tuple[str, ...], Records]:
    """Images of a folder whose sub-folders are the classes."""
    found: dict[str, list[Path]] = {}
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir()):
        found[folder.name] = sorted(file for file in folder.rglob("*") if _is_image(file))
    found = {name: files for name, files in found.items() if files}
    if not found:
        loose = sum(_is_image(file) for file in path.iterdir())
        came = f"{loose} images without a class folder" if loose else "no images"
        raise InputError(
            f"expected one folder of images a class in {path}, found {came}; "
            "put the images of each class into a folder of its name"
        )
    names = classes or tuple(found)
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise InputError(
            f"expected the class folders of the training images in {path}, "
            f"got another one: {unknown[0]!r}"
        )
    files = [file for name in names for file in found.get(name, [])]
    labels = [index for index, name in enumerate(names) for _ in found.get(name, [])]
    return names, Records(torch.tensor(labels), files.__getitem__, _PathOf(files))


@dataclass(frozen=True)
class _PathOf:
    files: list[Path]

    def __call__(self, row: int) -> str:
        return str(self.files[row])


def first_line(error: Exception) -> str:
    """What is shown of another library's error."""
    return (str(error).splitlines() or [type(error).__name__])[0]
