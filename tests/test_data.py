"""Reading, splitting, checking, augmenting and loading images."""

from __future__ import annotations

import io
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from vitmix.errors import InputError
from vitmix.train.augment import (
    BatchAugment,
    normalise,
    random_crop,
    random_erase,
    random_flip,
    random_resized_crop,
)
from vitmix.train.config import TrainConfig
from vitmix.train.data import load_data
from vitmix.train.decoding import DECODE_ERRORS, centred, image_size, pixels_of
from vitmix.train.loading import (
    Loader,
    check_crops,
    loading_processes,
    make_augment,
    make_loader,
)
from vitmix.train.operations import MOVES, OPERATIONS, POINTWISE, look_up, warp
from vitmix.train.policies import SPACES, ColorJitter, Policy, make_policy


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(value: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new("RGB", size, (value, 255 - value, value // 2))


def class_folders(root: Path, counts: dict[str, int], size: tuple[int, int] = (8, 8)) -> Path:
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            picture(40 * label + index, size).save(root / name / f"{index}.png")
    return root


def parquet(path: Path, labels: list[object], names: list[str] | None, **more: list[int]) -> None:
    images = []
    for row in range(len(labels)):
        buffer = io.BytesIO()
        picture(row * 10).save(buffer, format="PNG")
        images.append({"bytes": buffer.getvalue(), "path": f"{row}.png"})
    table = pa.table({"img": images, "label": labels, **more})
    features: dict[str, object] = {"img": {"_type": "Image"}}
    if names is not None:
        features["label"] = {"_type": "ClassLabel", "names": names}
        features |= {key: {"_type": "ClassLabel", "names": ["x", "y"]} for key in more}
    metadata = json.dumps({"info": {"features": features}})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata({"huggingface": metadata}), path)


# --- reading


def test_digits_match_scikit_learn_and_split_by_class() -> None:
    from sklearn.datasets import load_digits

    data = load_data(TrainConfig())
    assert (len(data.train), len(data.test)) == (1438, 359)
    assert data.classes == tuple("0123456789")
    assert data.train.images is not None
    assert data.train.images.shape == (1438, 3, 32, 32)
    assert not data.mirror
    truth = np.bincount(load_digits().target)
    mine = torch.bincount(torch.cat([data.train.labels, data.test.labels])).numpy()
    np.testing.assert_array_equal(mine, truth)
    held_out = torch.bincount(data.test.labels).numpy()
    np.testing.assert_array_equal(held_out, np.round(truth * 0.2))


def test_digits_split_is_the_same_for_every_seed_and_does_not_overlap() -> None:
    first, second = load_data(TrainConfig(seed=0)), load_data(TrainConfig(seed=5))
    assert first.test.images is not None
    assert second.test.images is not None
    assert torch.equal(first.test.images, second.test.images)
    assert first.train.images is not None
    train = {image.numpy().tobytes() for image in first.train.images}
    test = {image.numpy().tobytes() for image in first.test.images}
    assert len(train & test) == 0


def test_limit_keeps_the_classes_balanced() -> None:
    data = load_data(TrainConfig(train_limit=50))
    assert torch.bincount(data.train.labels).tolist() == [5] * 10


def test_statistics_are_those_of_the_training_images() -> None:
    data = load_data(TrainConfig(train_limit=100))
    assert data.train.images is not None
    pixels = data.train.images.double() / 255
    np.testing.assert_allclose(data.mean, pixels.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(data.std, pixels.std((0, 2, 3)), rtol=1e-3)


def test_folder_without_a_test_folder_is_split(tmp_path: Path) -> None:
    class_folders(tmp_path / "pets", {"cat": 10, "dog": 5})
    data = load_data(TrainConfig(data=str(tmp_path / "pets")))
    assert data.classes == ("cat", "dog")
    assert torch.bincount(data.train.labels).tolist() == [8, 4]
    assert torch.bincount(data.test.labels).tolist() == [2, 1]
    assert data.mirror


@pytest.mark.parametrize("name", ["test", "val", "validation"])
def test_folder_with_its_own_split(tmp_path: Path, name: str) -> None:
    class_folders(tmp_path / "train", {"cat": 3, "dog": 3})
    class_folders(tmp_path / name, {"dog": 2})
    data = load_data(TrainConfig(data=str(tmp_path)))
    assert len(data.train) == 6
    assert data.test.labels.tolist() == [1, 1]  # numbered as in training


def test_images_arrive_with_their_own_labels(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 4, "b": 4})
    data = load_data(TrainConfig(data=str(tmp_path)))
    for split in (data.train, data.test):
        assert split.images is not None
        for image, label in zip(split.images, split.labels, strict=True):
            assert (image[0, 0, 0] >= 40).item() == bool(label)


def test_parquet_reads_names_bytes_and_row_order(tmp_path: Path) -> None:
    parquet(tmp_path / "train-0.parquet", [1, 0, 1, 0], ["ant", "bee"])
    parquet(tmp_path / "test-0.parquet", [0, 1], ["ant", "bee"])
    data = load_data(TrainConfig(data=str(tmp_path)))
    assert data.classes == ("ant", "bee")
    assert data.train.labels.tolist() == [1, 0, 1, 0]
    assert data.train.images is not None
    assert data.train.images[:, 0, 0, 0].tolist() == [0, 10, 20, 30]
    assert len(data.test) == 2


@pytest.mark.parametrize("split", [True, False])
def test_the_first_rows_of_sorted_images_have_all_classes(tmp_path: Path, split: bool) -> None:
    labels = [k // 8 for k in range(40)]
    parquet(tmp_path / "train.parquet", list(labels), None)
    if split:
        parquet(tmp_path / "test.parquet", list(labels), None)
    data = load_data(TrainConfig(data=str(tmp_path), train_limit=10))
    assert data.train.labels.bincount().tolist() == [2] * 5


def test_parquet_label_column_by_choice(tmp_path: Path) -> None:
    parquet(tmp_path / "train.parquet", [0, 1, 2, 0], ["a", "b", "c"], coarse=[1, 0, 0, 1])
    parquet(tmp_path / "test.parquet", [0, 1], ["a", "b", "c"], coarse=[1, 0])
    default = load_data(TrainConfig(data=str(tmp_path)))
    coarse = load_data(TrainConfig(data=str(tmp_path), label_column="coarse"))
    assert default.classes == ("a", "b", "c")
    assert coarse.classes == ("x", "y")
    assert coarse.train.labels.tolist() == [1, 0, 0, 1]


def test_parquet_without_metadata_takes_values_as_names(tmp_path: Path) -> None:
    parquet(tmp_path / "train.parquet", ["dog", "cat", "dog", "cat"], None)
    parquet(tmp_path / "val.parquet", ["cat", "dog"], None)
    data = load_data(TrainConfig(data=str(tmp_path)))
    assert data.classes == ("cat", "dog")
    assert data.train.labels.tolist() == [1, 0, 1, 0]
    assert data.test.labels.tolist() == [0, 1]


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Local files only, and nothing written into the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def hub_set(labels: list[int], first: int = 0) -> Any:
    import datasets

    features = datasets.Features(
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["ant", "bee"])}
    )
    images = [picture(first + 10 * row) for row in range(len(labels))]
    return datasets.Dataset.from_dict({"picture": images, "kind": labels}, features=features)


def saved(root: Path) -> str:
    import datasets

    parts = {
        "train": hub_set([1, 0, 1, 0]),
        "validation": hub_set([0], 90),
        "test": hub_set([0, 1]),
    }
    datasets.DatasetDict(parts).save_to_disk(root / "set")
    return str(root / "set")


def parquet_files(root: Path) -> str:
    for name, part in (("train", hub_set([1, 0, 1, 0])), ("test", hub_set([0, 1]))):
        (root / "set").mkdir(exist_ok=True)
        part.to_parquet(root / "set" / f"{name}-00000-of-00001.parquet")
    return str(root / "set")


def image_folder(root: Path) -> str:
    for name, rows in (("train", 2), ("test", 1)):
        class_folders(root / "set" / name, {"ant": rows, "bee": rows})
    return str(root / "set")


def one_file(root: Path) -> str:
    hub_set([0, 1] * 5).to_parquet(root / "all.parquet")
    return str(root / "all.parquet")


@pytest.mark.parametrize(
    ("make", "train", "test"),
    [
        (saved, [1, 0, 1, 0], [0, 1]), (parquet_files, [1, 0, 1, 0], [0, 1]),
        (image_folder, [0, 1, 0, 1], [0, 1]), (one_file, [0, 1] * 4, [0, 1]),
    ],
)  # fmt: skip
def test_datasets_library_reads(  # type: ignore[no-untyped-def]
    tmp_path: Path, hub_cache: None, make, train: list[int], test: list[int]
) -> None:
    data = load_data(TrainConfig(data=f"hf:{make(tmp_path)}"))
    assert data.classes == ("ant", "bee")
    assert sorted(data.train.labels.tolist()) == sorted(train)
    assert sorted(data.test.labels.tolist()) == test
    assert data.train.images is not None
    if make is saved:
        assert data.train.images[:, 0, 0, 0].tolist() == [0, 10, 20, 30]


def test_hub_names_that_do_not_load(
    tmp_path: Path, hub_cache: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("nobody/nothing", "nobody/nothing:small", str(tmp_path)):
        with pytest.raises(InputError, match="datasets library loads as"):
            load_data(TrainConfig(data=f"hf:{name}"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'vitmix\[hf\]'"):
        load_data(TrainConfig(data="hf:cifar10"))


def named_folders(root: Path) -> str:
    class_folders(root / "set" / "train", {"a": 10, "b": 10})
    class_folders(root / "set" / "test", {"a": 2, "b": 1})
    class_folders(root / "set" / "val", {"a": 1, "b": 1})
    return str(root / "set")


def named_parquet(root: Path) -> str:
    for name, labels in (("train", [0, 1] * 10), ("test", [0, 1, 0]), ("val", [0, 1])):
        parquet(root / "set" / f"{name}.parquet", list(labels), ["a", "b"])
    return str(root / "set")


def named_hub(root: Path) -> str:
    import datasets

    parts = {"train": hub_set([0, 1] * 10), "test": hub_set([0, 1, 0]), "val": hub_set([0, 1])}
    datasets.DatasetDict(parts).save_to_disk(root / "set")
    return f"hf:{root / 'set'}"


@pytest.mark.parametrize("make", [named_folders, named_parquet, named_hub])
def test_what_to_test_on_is_an_option(tmp_path: Path, hub_cache: None, make) -> None:  # type: ignore[no-untyped-def]
    place = make(tmp_path)
    counts = {}
    for options in ({}, {"test_split": "val"}, {"val_share": 0.1}):
        data = load_data(TrainConfig(data=place, **options))  # type: ignore[arg-type]
        counts[next(iter(options), "")] = (len(data.train), len(data.test))
    assert counts == {"": (20, 3), "test_split": (20, 2), "val_share": (18, 2)}
    with pytest.raises(InputError, match=r"--test-split to be one of .*; did you mean 'test'"):
        load_data(TrainConfig(data=place, test_split="tset"))


def test_held_out_images_are_not_trained_on(tmp_path: Path) -> None:
    data = load_data(TrainConfig(data=named_parquet(tmp_path), val_share=0.2))
    assert data.train.images is not None
    assert data.test.images is not None
    kept = {image.numpy().tobytes() for image in data.train.images}
    held = {image.numpy().tobytes() for image in data.test.images}
    assert len(kept | held) == 20
    assert not kept & held


def test_fixed_test_images_cannot_be_chosen() -> None:
    for data in ("digits", "fake", "cifar10"):
        with pytest.raises(InputError, match=f"got it with {data}"):
            load_data(TrainConfig(data=data, test_split="val"))


def test_resizing_brings_all_images_to_one_size(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {"a": 2, "b": 2}, size=(12, 20))
    class_folders(tmp_path / "test", {"a": 1, "b": 1}, size=(9, 7))
    data = load_data(TrainConfig(data=str(tmp_path), img_size=8))
    assert data.train.images is not None
    assert data.train.images.shape == (4, 3, 8, 8)
    assert data.test.images is not None
    assert data.test.images.shape == (2, 3, 8, 8)


# --- bad data


def corrupt_folder(root: Path, size: tuple[int, int] = (8, 8)) -> Path:
    class_folders(root, {"a": 6, "b": 6}, size)
    broken = root / "a" / "3.png"
    broken.write_bytes(broken.read_bytes()[:40])
    return broken


def empty_file(root: Path) -> Path:
    class_folders(root, {"a": 6, "b": 6})
    (root / "b" / "0.png").write_bytes(b"")
    return root / "b" / "0.png"


@pytest.mark.parametrize("make", [corrupt_folder, empty_file])
def test_corrupt_image_is_named_or_skipped(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    broken = make(tmp_path)
    with pytest.raises(InputError, match=rf"cannot decode {broken}.*--skip-corrupt"):
        load_data(TrainConfig(data=str(tmp_path)))
    data = load_data(TrainConfig(data=str(tmp_path), skip_corrupt=True))
    assert data.skipped == 1
    assert len(data.train) + len(data.test) == 11


def one_class(root: Path) -> None:
    class_folders(root, {"only": 4})


def nothing(root: Path) -> None:
    (root / "notes.txt").write_text("no images")


def loose(root: Path) -> None:
    picture(3).save(root / "one.png")


def two_sizes(root: Path) -> None:
    class_folders(root / "train", {"a": 2, "b": 2})
    class_folders(root / "test", {"a": 2, "b": 2}, size=(10, 10))


def not_square(root: Path) -> None:
    class_folders(root, {"a": 4, "b": 4}, size=(8, 6))


def unknown_test_class(root: Path) -> None:
    class_folders(root / "train", {"a": 2, "b": 2})
    class_folders(root / "test", {"c": 2})


def labels_too_large(root: Path) -> None:
    parquet(root / "train.parquet", [0, 1, 7], ["a", "b"])


def labels_missing(root: Path) -> None:
    parquet(root / "train.parquet", [0, 1, None], ["a", "b"])


def no_image_column(root: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), root / "train.parquet")


def not_parquet(root: Path) -> None:
    (root / "train.parquet").write_bytes(b"hello")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (one_class, "at least two classes .* got 1 \\(only\\)"),
        (nothing, "found no images"),
        (loose, "found 1 images without a class folder"),
        (two_sizes, "one size .* 8x8 and 10x10 .*pass --img-size 8"),
        (not_square, "square images .* pass --img-size 6"),
        (unknown_test_class, "got another one: 'c'"),
        (labels_too_large, "labels from 0 to 1 .* got 7 in row 2"),
        (labels_missing, "labels from 0 to 1 .* got None in row 2"),
        (no_image_column, "image column .* got columns text, label"),
        (not_parquet, "expected Parquet in .*train.parquet"),
    ],
)
def test_bad_folders_say_what_is_wrong(tmp_path: Path, make, message: str) -> None:  # type: ignore[no-untyped-def]
    make(tmp_path)
    with pytest.raises(InputError, match=message):
        load_data(TrainConfig(data=str(tmp_path)))


def test_torchvision_set_that_is_not_there(tmp_path: Path) -> None:
    for name in ("cifar10", "torchvision:CIFAR10"):
        with pytest.raises(InputError, match=r"expected CIFAR10 under .*--download"):
            load_data(TrainConfig(data=name, data_root=str(tmp_path)))


def test_torchvision_sets_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets

    class Fake:
        classes = ("cat", "dog")

        def __init__(self, root: str, train: bool, download: bool) -> None:
            assert (root, download) == (str(tmp_path), True)
            self.targets = [0, 1, 1, 0] if train else [1, 0]

        def __getitem__(self, row: int) -> tuple[Image.Image, int]:
            return picture(row), self.targets[row]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    config = TrainConfig(data="torchvision:CIFAR10", data_root=str(tmp_path), download=True)
    data = load_data(config)
    assert data.classes == ("cat", "dog")
    assert data.train.labels.tolist() == [0, 1, 1, 0]
    assert data.test.labels.tolist() == [1, 0]


def test_a_crop_that_images_do_not_get_is_refused(tmp_path: Path) -> None:
    small = load_data(TrainConfig(data="fake:2x32x8"))
    check_crops(small, TrainConfig(crop_padding=2))
    check_crops(small, TrainConfig(scale=[0.5, 1.0], ratio=[0.8, 1.2]))
    with pytest.raises(InputError, match="expected --scale with --ratio"):
        check_crops(small, TrainConfig(ratio=[0.8, 1.2]))
    large = load_data(TrainConfig(data=str(class_folders(tmp_path, {"a": 4, "b": 4}, (128, 128)))))
    check_crops(large, TrainConfig(ratio=[0.8, 1.2]))
    with pytest.raises(InputError, match="too many or too large to keep in memory"):
        check_crops(large, TrainConfig(crop_padding=2))


# --- augmentation


def test_crop_is_a_window_of_the_padded_image() -> None:
    images = torch.randint(1, 255, (6, 3, 5, 7), dtype=torch.uint8)
    cropped = random_crop(images, 2, rng())
    for image, crop in zip(images, cropped, strict=True):
        padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
        windows = [padded[:, y : y + 5, x : x + 7] for y in range(5) for x in range(5)]
        assert any(torch.equal(crop, window) for window in windows)
    assert random_crop(images, 0, rng()) is images


def test_crop_reaches_every_place_and_differs_between_images() -> None:
    image = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3).expand(2000, 1, 3, 3)
    corners = random_crop(image, 1, rng())[:, 0, 1, 1]
    counts = torch.bincount(corners.long(), minlength=10)[1:]
    assert (counts > 2000 / 9 * 0.75).all()


RAMP = torch.arange(32.0).expand(1, 3, 32, 32).mul(8).to(torch.uint8)  # columns 0, 8, 16, ...


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
def test_resized_crop_has_its_area_and_shape(interpolation: str) -> None:
    images = torch.cat((RAMP, RAMP.transpose(2, 3))).repeat(200, 1, 1, 1)
    out = random_resized_crop(images, (0.25, 0.5), (0.5, 2.0), interpolation, rng())
    assert out.dtype == torch.uint8
    # The brightness that a window spans tells its width (even rows) and height (odd rows).
    # Borders are left out: there the interpolation is flat.
    width = (out[0::2, 0, 16, 24].float() - out[0::2, 0, 16, 8].float()) / 128
    height = (out[1::2, 0, 24, 16].float() - out[1::2, 0, 8, 16].float()) / 128
    for side in (width, height):
        assert 0.3 < side.min() < 0.45
        assert 0.8 < side.max() <= 1.05
        assert (side.mean() - 0.6).abs() < 0.03
    same = random_resized_crop(images, (0.25, 0.5), (0.5, 2.0), interpolation, rng())
    assert torch.equal(out, same)


def test_whole_image_is_a_resized_crop() -> None:
    noise = torch.randint(256, (4, 3, 16, 16), generator=rng(), dtype=torch.uint8)
    assert torch.equal(random_resized_crop(noise, (1, 1), (1, 1), "bilinear", rng()), noise)
    # No window of this shape fits; the whole image is taken.
    assert torch.equal(random_resized_crop(noise, (1, 1), (9, 9), "bilinear", rng()), noise)


def test_resized_crop_is_an_option_for_images_in_memory() -> None:
    config = TrainConfig(img_size=16, scale=[0.5, 1.0], hflip=0.0)
    data = load_data(config)
    augment = make_augment(data, config, rng(), train=True)
    assert (augment.scale, augment.crop_padding) == ((0.5, 1.0), 0)
    assert make_augment(data, config, rng(), train=False).scale is None


def test_color_jitter_has_its_strength_and_its_own_draws() -> None:
    gray = torch.full((500, 3, 4, 4), 100, dtype=torch.uint8)
    means = ColorJitter(0.4)(gray, rng()).float().mean((1, 2, 3))  # only brightness shows
    assert 60 <= means.min() < 63
    assert 137 < means.max() <= 140
    assert (means.mean() - 100).abs() < 2
    noise = torch.randint(256, (8, 3, 8, 8), generator=rng(), dtype=torch.uint8)
    assert torch.equal(ColorJitter(1e-6)(noise, rng()), noise)
    with pytest.raises(InputError, match="either --aa"):
        make_policy("trivial", 0.4)


def test_flip_has_its_probability() -> None:
    images = torch.arange(4, dtype=torch.uint8).view(1, 1, 1, 4).expand(4000, 1, 1, 4)
    flipped = random_flip(images, 0.3, rng())[:, 0, 0, 0] == 3
    assert abs(flipped.float().mean() - 0.3) < 0.03


def test_erasing_has_its_probability_and_area() -> None:
    images = torch.zeros(3000, 1, 16, 16)
    erased = random_erase(images, 0.25, rng())[:, 0] != 0
    hit = erased.flatten(1).any(1)
    assert abs(hit.float().mean() - 0.25) < 0.03
    area = erased[hit].float().mean((1, 2))
    assert area.max() < 0.45
    assert abs(area.mean() - (0.02 + 1 / 3) / 2) < 0.02


def test_normalise_inverts() -> None:
    images = torch.randint(0, 255, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    values = normalise(images, mean, std)
    back = values * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    torch.testing.assert_close(back * 255, images.float())


def photograph(size: tuple[int, int] = (20, 24)) -> torch.Tensor:
    """A smooth picture with all colours, ``(1, 3, H, W)`` uint8."""
    coarse = torch.rand(1, 3, 4, 4, generator=rng(2)) * 255
    return torch.nn.functional.interpolate(coarse, size, mode="bilinear").to(torch.uint8)


# Our names, timm's, and an amount in the units of both.
COLOURS = [
    ("autocontrast", "AutoContrast", None), ("equalize", "Equalize", None),
    ("invert", "Invert", None), ("posterize", "Posterize", 1), ("posterize", "Posterize", 3),
    ("solarize", "Solarize", 100), ("solarize_add", "SolarizeAdd", 90), ("color", "Color", 0.2),
    ("color", "Color", 1.8), ("contrast", "Contrast", 0.4), ("contrast", "Contrast", 1.7),
    ("brightness", "Brightness", 0.3), ("brightness", "Brightness", 1.6),
    ("sharpness", "Sharpness", 0.1), ("sharpness", "Sharpness", 1.9),
]  # fmt: skip
MOVED = [
    ("shear_x", "ShearX", 0.27), ("shear_y", "ShearY", -0.2), ("translate_x", "TranslateXRel", 0.3),
    ("translate_y", "TranslateYRel", -0.25), ("rotate", "Rotate", 25.0),
]  # fmt: skip


def timm_result(name: str, amount: float | None, image: torch.Tensor) -> torch.Tensor:
    from timm.data.auto_augment import NAME_TO_OP

    picture = Image.fromarray(image[0].permute(1, 2, 0).numpy())
    arguments = () if amount is None else (amount,)
    options = {"resample": Image.Resampling.BILINEAR, "fillcolor": (10, 20, 30)}
    made = np.asarray(NAME_TO_OP[name](picture, *arguments, **options))
    return torch.from_numpy(made.copy()).permute(2, 0, 1)[None]


@pytest.mark.parametrize(("name", "theirs", "amount"), COLOURS)
def test_colour_operations_are_those_of_timm(name: str, theirs: str, amount: float | None) -> None:
    image = photograph()
    given = torch.full((1, 1, 1, 1), float(amount or 0))
    if name in POINTWISE:
        mine = look_up(image, POINTWISE[name](torch.arange(256.0), given.view(1, 1)))
    else:
        mine = OPERATIONS[name](image, given)
    assert mine.dtype == torch.uint8
    assert (mine.int() - timm_result(theirs, amount, image).int()).abs().max() <= 1


@pytest.mark.parametrize(("name", "theirs", "amount"), MOVED)
def test_moves_are_those_of_timm(name: str, theirs: str, amount: float) -> None:
    image = photograph()
    matrix = MOVES[name](torch.tensor([amount]), image.shape[2] / image.shape[3])
    mine = warp(image, matrix, torch.tensor([10.0, 20.0, 30.0]))
    difference = (mine.int() - timm_result(theirs, amount, image).int()).abs().float()
    assert difference.median() <= 1  # all but the pixels at the border, which we blend
    assert (difference.amax(1) > 3).float().mean() < 0.15


def test_strengths_are_those_of_timm() -> None:
    from timm.data import auto_augment

    names = {
        "shear_x": "ShearX", "translate_y": "TranslateYRel", "rotate": "Rotate",
        "solarize_add": "SolarizeAdd", "posterize": "Posterize", "solarize": "Solarize",
        "color": "Color", "sharpness": "Sharpness",
    }  # fmt: skip
    for space, ending in (("rand", ""), ("rand-increasing", "Increasing")):
        for name, theirs in names.items():
            level_fn = auto_augment.LEVEL_TO_ARG.get(theirs + ending)
            level_fn = level_fn or auto_augment.LEVEL_TO_ARG[theirs]
            for level in (0.0, 4.7, 9.0, 10.0):
                amounts = [
                    float(SPACES[space][name](torch.tensor(level / 10), torch.tensor(sign)))
                    for sign in (-1.0, 1.0)
                ]
                (theirs_amount,) = level_fn(level, {})
                near = [abs(amount - theirs_amount) < 1e-5 for amount in amounts]
                assert any(near), (space, name, level)
    assert len(SPACES["rand-increasing"]) == len(auto_augment._RAND_INCREASING_TRANSFORMS)


@pytest.mark.parametrize("space", SPACES)
def test_operations_of_a_kind_follow_each_other(space: str) -> None:
    names = list(SPACES[space])
    known = [*MOVES, *(n for n in names if n in POINTWISE), *(n for n in names if n in OPERATIONS)]
    assert [name for name in names if name != "identity"] == known


@pytest.mark.parametrize("policy", [Policy(), Policy("rand", 2, 9.0, 0.5)])
def test_policy_draws_for_every_image(policy: Policy) -> None:
    image = torch.randint(0, 255, (1, 3, 8, 8), dtype=torch.uint8, generator=rng())
    out = policy(image.expand(64, -1, -1, -1), rng())
    assert len({row.numpy().tobytes() for row in out}) > 16
    assert torch.equal(out, policy(image.expand(64, -1, -1, -1), rng()))


@pytest.mark.parametrize("space", SPACES)
def test_policy_gives_each_image_what_it_gives_it_alone(space: str) -> None:
    """Sorting and grouping leave every image in its place."""
    images = torch.randint(0, 255, (40, 3, 8, 8), dtype=torch.uint8, generator=rng())
    together = Policy(space, 1, 8.0)(images, rng(4))
    for row in (0, 17, 39):
        lonely = torch.zeros_like(images)
        lonely[row] = images[row]
        assert torch.equal(Policy(space, 1, 8.0)(lonely, rng(4))[row], together[row])


def test_chance_leaves_images_alone() -> None:
    images = torch.randint(0, 255, (2000, 3, 4, 4), dtype=torch.uint8, generator=rng())
    out = Policy("rand", 1, 9.0, chance=0.3)(images, rng())
    changed = (out != images).flatten(1).any(1).float().mean()
    assert 0.25 < changed < 0.31


def test_further_channels_are_moved_with_the_image() -> None:
    """A map that is the image's red channel stays so under moves, and is untouched by colour."""
    images = photograph((16, 16)).repeat(200, 1, 1, 1)
    both = torch.cat((images, images[:, :1]), 1)
    out = Policy("rand", 1, 9.0, fill=(0.0, 0.0, 0.0))(both, rng())
    same = (out[:, 3] == out[:, 0]).flatten(1).all(1)
    still = (out[:, 3] == images[:, 0]).flatten(1).all(1)
    assert (same | still).all()
    assert (same & ~still).sum() > 30  # five of fifteen operations move


def test_policy_names() -> None:
    assert make_policy("none") is None
    policy = make_policy("rand-m7-n3-mstd0.5-inc1", mean=(1.0, 0.5, 0.0))
    assert policy == Policy("rand-increasing", 3, 7.0, 0.5, 0.5, (255, 128, 0))
    assert make_policy("rand-p1") == Policy("rand", 2, 10.0)
    for wrong in ("rand-x", "rand-m11", "random", "rand-m9-n0", "rand-p2"):
        with pytest.raises(InputError, match="--aa"):
            make_policy(wrong)


def test_digits_are_not_mirrored_by_default() -> None:
    config = TrainConfig(train_limit=20)
    data = load_data(config)
    assert make_augment(data, config, rng(), train=True).hflip == 0
    config.hflip = 0.5
    assert make_augment(data, config, rng(), train=True).hflip == 0.5


def test_test_images_are_only_normalised() -> None:
    config = TrainConfig(train_limit=20, reprob=1.0, aa="trivial")
    data = load_data(config)
    prepare = make_augment(data, config, rng(), train=False)
    assert data.test.images is not None
    assert torch.equal(
        prepare(data.test.images[:5]), normalise(data.test.images[:5], data.mean, data.std)
    )


# --- loading


def test_loader_shuffles_by_seed_and_epoch_and_covers_everything() -> None:
    config = TrainConfig(train_limit=100, batch_size=32)
    data = load_data(config)

    def labels(seed: int, epoch: int) -> torch.Tensor:
        loader = make_loader(data, replace(config, seed=seed), train=True)
        loader.sampler.set_epoch(epoch)
        batches = [y for _, y in loader]
        assert [len(y) for y in batches] == [32, 32, 32]  # whole batches only
        return torch.cat(batches)

    first = labels(1, 0)
    assert torch.equal(first, labels(1, 0))
    assert not torch.equal(first, labels(1, 1))
    assert not torch.equal(first, labels(2, 0))
    assert sorted(row for row, _ in make_loader(data, config, train=True).sampler) == [*range(100)]
    total = sum(len(y) for _, y in make_loader(data, config, train=False))
    assert total == len(data.test)


@pytest.mark.parametrize("workers", [None, 0, 2])
@pytest.mark.parametrize("done", [0, 1, 3, 4])
def test_a_loader_goes_on_where_another_was_left(
    tmp_path: Path, workers: int | None, done: int
) -> None:
    """In memory, and decoded in this process or in others, whatever else is drawn meanwhile."""
    config = TrainConfig(train_limit=18, batch_size=4)
    if workers is not None:
        class_folders(tmp_path, {"a": 12, "b": 12})
        for path in tmp_path.rglob("*.png"):
            Image.effect_noise((130, 110), 90).save(path)
        config = replace(
            config, data=str(tmp_path), img_size=112, workers=workers, aa="rand-m9-mstd1", hflip=0.5
        )
    data = load_data(config)
    assert (data.train.images is None) == (workers is not None)

    def start(epoch: int) -> Loader:
        torch.rand(done + 1)
        loader = make_loader(data, config, train=True)
        loader.sampler.set_epoch(epoch)
        return loader

    loader = start(5)
    before = torch.get_rng_state()
    batches = iter(loader)
    epoch = [next(batches) for _ in range(done)]
    state = loader.state_dict()
    epoch += list(batches)
    assert torch.equal(torch.get_rng_state(), before)
    other = start(5)
    other.load_state_dict(state)
    rest = list(other)
    assert len(rest) == 4 - done % 4
    for (images, labels), (expected, expected_labels) in zip(rest[::-1], epoch[::-1], strict=False):
        assert torch.equal(images, expected)
        assert torch.equal(labels, expected_labels)
    other.sampler.set_epoch(6)  # the next epoch is whole
    whole = start(6)
    for (images, _), (expected, _) in zip(other, whole, strict=True):
        assert torch.equal(images, expected)
    assert not torch.equal(epoch[0][0], images)


def test_repeats_show_images_several_times_in_a_row() -> None:
    data = load_data(TrainConfig(data="fake:2x8x12"))
    config = TrainConfig(data="fake:2x8x12", batch_size=12, aug_repeats=3)
    images, _ = next(iter(make_loader(data, config, train=True)))
    assert len(images) == 12
    for first in range(0, 12, 3):
        assert torch.equal(images[first], images[first + 2])
    assert len(images.flatten(1).unique(dim=0)) == 4
    images, _ = next(iter(make_loader(data, config, train=False)))
    assert len(images.flatten(1).unique(dim=0)) == len(data.test)


def test_large_images_are_decoded_when_needed(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 5, "b": 5}, size=(130, 110))
    config = TrainConfig(
        data=str(tmp_path), img_size=112, workers=0, batch_size=4, aa="rand-m9", reprob=0.5
    )
    data = load_data(config)
    assert data.train.images is None
    for train in (True, False):
        images, labels = next(iter(make_loader(data, config, train=train)))
        assert images.shape[1:] == (3, 112, 112)
        assert images.dtype == torch.uint8
        assert len(images) == len(labels)
        assert make_augment(data, config, rng(), train=train)(images).dtype == torch.float32


@pytest.mark.parametrize("side", [32, 128])  # in memory, decoded when needed
def test_test_images_are_cut_out_of_the_middle(side: int) -> None:
    whole = TrainConfig(data=f"fake:2x{side}x8", workers=0)
    middle = TrainConfig(data=f"fake:2x{side}x8", workers=0, img_size=side // 2, crop_pct=0.5)
    images, cut = (
        next(iter(make_loader(load_data(c), c, train=False)))[0] for c in (whole, middle)
    )
    start = side // 4
    assert torch.equal(cut, images[:, :, start : start + side // 2, start : start + side // 2])


def test_test_images_are_resized_as_asked() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(9, 9, 3), dtype=np.uint8))
    for interpolation in ("bicubic", "bilinear"):
        expected = image.resize((6, 6), Image.Resampling[interpolation.upper()])
        got = centred(pixels_of(image), 6, interpolation=interpolation)  # type: ignore[arg-type]
        difference = got.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected).astype(int)
        assert np.abs(difference).max() <= 1


ENCODINGS = [
    ("JPEG", "RGB", 2), ("JPEG", "L", 2), ("JPEG", "CMYK", 4), ("PNG", "RGB", 0), ("PNG", "P", 0),
    ("PNG", "RGBA", 0), ("PNG", "1", 0), ("WEBP", "RGB", 0), ("GIF", "P", 0), ("BMP", "RGB", 0),
    ("TIFF", "RGB", 0), ("PPM", "RGB", 0),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "mode", "tolerance"), ENCODINGS)
@pytest.mark.parametrize("source", ["bytes", "file", "picture"])
def test_every_format_gives_the_pixels_that_pillow_gives(
    kind: str, mode: str, tolerance: int, source: str, tmp_path: Path
) -> None:
    image = Image.fromarray(photograph()[0].permute(1, 2, 0).numpy()).convert(mode)
    options = {"lossless": True} if kind == "WEBP" else {}
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    (tmp_path / "picture").write_bytes(buffer.getvalue())
    reread = Image.open(io.BytesIO(buffer.getvalue()))
    content = {"bytes": buffer.getvalue(), "file": tmp_path / "picture", "picture": reread}[source]
    expected = np.asarray(reread.convert("RGB")).astype(int)
    assert image_size(content) == (24, 20)
    got = pixels_of(content).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(got - expected).max() <= tolerance


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
@pytest.mark.parametrize("kept", [0, 10, 0.7])
def test_broken_files_are_not_images(kind: str, kept: float) -> None:
    buffer = io.BytesIO()
    Image.fromarray(photograph((64, 64))[0].permute(1, 2, 0).numpy()).save(buffer, kind)
    data = buffer.getvalue()
    length = int(len(data) * kept) if isinstance(kept, float) else kept
    with pytest.raises(DECODE_ERRORS):
        pixels_of(data[:length])


def test_pretrained_weights_keep_their_mean_and_std() -> None:
    """Those of timm's entry for the model; what the user gives comes first."""
    config = TrainConfig(train_limit=32, model="vit_tiny_patch16_224", pretrained=True)
    data = load_data(config)
    assert (data.mean, data.std) == ((0.5,) * 3, (0.5,) * 3)
    assert load_data(replace(config, mean=[0.1, 0.2, 0.3])).mean == (0.1, 0.2, 0.3)
    assert load_data(replace(config, pretrained=False)).mean != data.mean


@pytest.mark.parametrize(("wanted", "cores", "found"), [(4, 2, 2), (2, 8, 2), (0, 8, 0)])
def test_no_more_loading_processes_than_cores(
    wanted: int, cores: int, found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert loading_processes(TrainConfig(workers=wanted)) == found


def test_mean_and_std_by_choice() -> None:
    data = load_data(TrainConfig(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6]))
    assert (data.mean, data.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.mark.parametrize(
    ("name", "classes", "side", "train", "test"),
    [("fake", 10, 32, 1024, 256), ("fake:3x16", 3, 16, 1024, 256), ("fake:5x8x10", 5, 8, 10, 2)],
)
def test_fake_images_have_their_shape(
    name: str, classes: int, side: int, train: int, test: int
) -> None:
    data = load_data(TrainConfig(data=name))
    assert (len(data.classes), data.img_size) == (classes, side)
    assert (len(data.train), len(data.test)) == (train, test)
    assert data.train.images is not None
    assert len(data.train.images.flatten(1).unique(dim=0)) == train


@pytest.mark.parametrize("name", ["fake:", "fake:3", "fake:1x32", "fake:2x32x1", "fake:axb"])
def test_fake_images_of_no_shape(name: str) -> None:
    with pytest.raises(InputError, match="fake:CLASSESxSIDExIMAGES"):
        load_data(TrainConfig(data=name))


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_large_image_is_named_or_skipped(
    tmp_path: Path, workers: int, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = corrupt_folder(tmp_path, (120, 120))
    config = TrainConfig(data=str(tmp_path), img_size=112, workers=workers, test_share=0.1)
    data = load_data(config)

    def read_all() -> int:
        loaders = [make_loader(data, config, train=train) for train in (True, False)]
        return sum(len(labels) for loader in loaders for _, labels in loader)

    with pytest.raises(InputError, match=rf"^expected an image, cannot decode {broken}; [^\n]*$"):
        read_all()
    config.skip_corrupt = True
    assert read_all() == 11
    assert str(broken) in capfd.readouterr().err


def test_batch_augment_is_reproducible() -> None:
    images = torch.randint(0, 255, (4, 3, 8, 8), dtype=torch.uint8)

    def run(seed: int) -> torch.Tensor:
        return BatchAugment((0.5,) * 3, (0.2,) * 3, rng(seed), 2, 0.5, Policy(), 0.5)(images)

    assert torch.equal(run(3), run(3))
    assert not torch.equal(run(3), run(4))
