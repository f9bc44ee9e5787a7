"""Stored activation maps: made, continued, read, moved with images, and used in training."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vitmix
from models import NUM_CLASSES, batch, make_cct
from vitmix.cli import main
from vitmix.maps import as_uint8
from vitmix.train.augment import BatchAugment
from vitmix.train.config import TrainConfig
from vitmix.train.data import load_data
from vitmix.train.loading import make_augment, make_loader
from vitmix.train.policies import Policy, make_policy

IMAGES = torch.rand(23, 3, 8, 8, generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(23) % 4


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def red(images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """A teacher that sees what is red: whatever moves the image moves its map."""
    return images[:, 0]


class Batches:
    """Batches of five from a row on; counts images, and stops after some if asked to."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.images, self.stop_after = 0, stop_after

    def __call__(self, start: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for part in zip(IMAGES[start:].split(5), CLASSES[start:].split(5), strict=True):
            if self.stop_after is not None and self.images >= self.stop_after:
                raise KeyboardInterrupt
            self.images += len(part[0])
            yield part


# --- storing


def test_maps_are_those_of_the_teacher(tmp_path: Path) -> None:
    done: list[int] = []
    maps = vitmix.store_maps(
        tmp_path / "maps", red, Batches(), 23, facts={"by": "red"}, progress=done.append
    )
    assert (len(maps), maps.grid, maps.facts, done[-1]) == (23, (8, 8), {"by": "red"}, 23)
    rows = torch.tensor([7, 0, 22])
    assert maps[rows].dtype == torch.uint8
    expected = IMAGES[rows, 0] / IMAGES[rows, 0].amax((1, 2), keepdim=True)
    torch.testing.assert_close(maps[rows] / 255, expected, atol=0.5 / 255 + 1e-6, rtol=0)
    assert torch.equal(maps[7], maps[rows][0])
    assert (maps.folder / "maps.npy").stat().st_size < 23 * 64 + 200
    for again in (copy.deepcopy(maps), pickle.loads(pickle.dumps(maps))):
        assert torch.equal(again[rows], maps[rows])


def test_rows_that_are_none_are_refused(tmp_path: Path) -> None:
    maps = vitmix.store_maps(tmp_path, red, Batches(), 23)
    for rows in (-1, 23, True, torch.tensor([0.5]), torch.tensor([True] * 23)):
        with pytest.raises(vitmix.InputError, match="from 0 to 22, got"):
            maps[rows]
    assert len(list(maps)) == 23
    assert maps[torch.tensor([], dtype=torch.long)].shape == (0, 8, 8)


def test_an_empty_map_stays_empty() -> None:
    maps = torch.stack((torch.zeros(4, 4), torch.eye(4) * 1e-6))
    assert as_uint8(maps).amax((1, 2)).tolist() == [0, 255]


@pytest.mark.parametrize("stop", [5, 20])
def test_interrupted_storing_goes_on(tmp_path: Path, stop: int) -> None:
    first, second, third = Batches(stop), Batches(), Batches()
    with pytest.raises(KeyboardInterrupt):
        vitmix.store_maps(tmp_path, red, first, 23)
    with pytest.raises(vitmix.InputError, match=f"all 23 images .* got {stop}"):
        vitmix.TeacherMaps(tmp_path)
    maps = vitmix.store_maps(tmp_path, red, second, 23)
    assert (first.images, second.images) == (stop, 23 - stop)
    whole = vitmix.store_maps(tmp_path / "whole", red, Batches(), 23)
    rows = torch.arange(23)
    assert torch.equal(maps[rows], whole[rows])
    vitmix.store_maps(tmp_path, red, third, 23)
    assert third.images == 0  # nothing is left to do


def foreign(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")


def other_facts(folder: Path) -> None:
    vitmix.store_maps(folder, red, Batches(), 23, facts={"teacher": "blue"})


def other_meta(folder: Path) -> None:
    folder.mkdir()
    (folder / "meta.json").write_text("{}")


def a_file(folder: Path) -> None:
    folder.write_text("precious")


def shorter_array(folder: Path) -> None:
    other_facts(folder)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "grid": [4, 4], "facts": {}, "done": 3}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (foreign, "holds thesis.txt"),
        (other_facts, "its teacher is blue, not None"),
        (other_meta, "it is something else"),
        (a_file, "got the file"),
        (shorter_array, r"expected uint8 maps \(23, 4, 4\)"),
    ],
)
def test_folders_of_something_else_are_left_alone(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "maps")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(vitmix.InputError, match=message):
        vitmix.store_maps(tmp_path / "maps", red, Batches(), 23)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_batches_must_fit(tmp_path: Path) -> None:
    with pytest.raises(vitmix.InputError, match="expected batches of 30 images, got 23"):
        vitmix.store_maps(tmp_path / "a", red, Batches(), 30)
    with pytest.raises(vitmix.InputError, match="expected 21 maps"):
        vitmix.store_maps(tmp_path / "b", red, Batches(), 21)
    with pytest.raises(vitmix.InputError, match="found no meta"):
        vitmix.TeacherMaps(tmp_path)


# --- labels


def steps(
    labels: vitmix.TeacherLabels, images: torch.Tensor, classes: torch.Tensor, maps: Any
) -> Any:
    mixing = vitmix.MixingModel(
        make_cct(), mix=vitmix.TokenMix(), labels=labels, num_classes=NUM_CLASSES, generator=rng(3)
    ).train()
    return [mixing(images, classes, maps=maps).targets for _ in range(4)]


@pytest.mark.parametrize("normalise", [True, False])
def test_stored_maps_agree_with_the_online_teacher(tmp_path: Path, normalise: bool) -> None:
    teacher = vitmix.ActivationMaps(make_cct())
    images, classes = batch(8)
    maps = vitmix.store_maps(
        tmp_path, teacher, lambda start: [(images[start:], classes[start:])], len(images)
    )
    online = steps(vitmix.TeacherLabels(teacher, normalise), images, classes, None)
    rows = torch.arange(len(images))
    for labels, given in (
        (vitmix.TeacherLabels(maps=maps, normalise=normalise), rows),
        (vitmix.TeacherLabels(maps=str(tmp_path), normalise=normalise), maps[rows]),
    ):
        stored = steps(labels, images, classes, given)
        for mine, theirs in zip(stored, online, strict=True):
            torch.testing.assert_close(mine, theirs, atol=0.01, rtol=0)
    assert any(not torch.equal(mine, online[0]) for mine in online[1:])


def test_steps_say_what_they_miss(tmp_path: Path) -> None:
    maps = vitmix.store_maps(tmp_path, red, Batches(), 23)
    images, classes = batch(4)
    cases: list[tuple[Any, Any, str]] = [
        (vitmix.TeacherLabels(maps=maps), None, "in each step .* got none"),
        (vitmix.TeacherLabels(red), torch.arange(4), "TeacherLabels has no use for"),
        (vitmix.TeacherLabels(maps=maps), torch.arange(3), r"expected `maps` \(4, h, w\)"),
        (vitmix.TeacherLabels(maps=maps), torch.rand(4), r"rows \(4,\) of whole numbers"),
        (vitmix.TeacherLabels(maps=maps), torch.ones(4) > 0, r"rows \(4,\) of whole numbers"),
        (vitmix.TeacherLabels(maps=maps), torch.tensor(1), r"rows \(4,\) of whole numbers"),
        (vitmix.TeacherLabels(maps=maps), torch.tensor([0, 1, 2, -1]), "from 0 to 22, got"),
        (vitmix.TeacherLabels(maps=maps), torch.tensor([0, 1, 2, 23]), "from 0 to 22, got"),
        (vitmix.TeacherLabels(maps=maps), torch.rand(4, 1, 8, 8), r"got \(4, 1, 8, 8\)"),
    ]
    for labels, given, message in cases:
        with pytest.raises(vitmix.InputError, match=message):
            steps(labels, images, classes, given)


def test_either_a_teacher_or_maps(tmp_path: Path) -> None:
    maps = vitmix.store_maps(tmp_path, red, Batches(), 23)
    for arguments, message in (
        ({}, "got neither"), ({"teacher": red, "maps": maps}, "got both"),
        ({"maps": 3}, "got int as stored maps"), ({"teacher": "resnet18"}, "got str as teacher"),
        ({"maps": tmp_path / "nowhere"}, "found no meta.json"),
    ):  # fmt: skip
        with pytest.raises(vitmix.InputError, match=message):
            vitmix.TeacherLabels(**arguments)  # type: ignore[arg-type]


# --- moved with the images


def smooth(count: int, side: int) -> torch.Tensor:
    """Pictures with gentle slopes, so that resampling changes little."""
    coarse = torch.rand(count, 3, 3, 3, generator=rng(1))
    return (torch.nn.functional.interpolate(coarse, side, mode="bilinear") * 255).to(torch.uint8)


@pytest.mark.parametrize(
    "options",
    [
        {"crop_padding": 4}, {"hflip": 0.5}, {"scale": (0.3, 0.9)},
        {"policy": Policy("rand", 1, 9.0, fill=(0.0, 0.0, 0.0))},
        {"crop_padding": 3, "hflip": 0.5, "reprob": 0.5},
    ],
)  # fmt: skip
def test_maps_are_moved_with_their_images(options: dict[str, Any]) -> None:
    """What the red teacher sees of a moved image is its stored map, moved."""
    images = smooth(64, 16)
    maps = images[:, 0]
    moved_only = {key: value for key, value in options.items() if key != "reprob"}
    augment = BatchAugment((0.0,) * 3, (1 / 255,) * 3, rng(5), **options)
    augmented, moved = augment.with_maps(images, maps)
    assert moved is not None
    alone = BatchAugment((0.0,) * 3, (1 / 255,) * 3, rng(5), **options)(images)
    assert torch.equal(augmented, alone)  # maps change no draw
    seen = BatchAugment((0.0,) * 3, (1 / 255,) * 3, rng(5), **moved_only)(images)[:, 0]
    same = (seen - moved.float()).abs().amax((1, 2)) <= 2
    still = (moved == maps).flatten(1).all(1)  # only its colours were changed
    assert (same | still).all() if "policy" in options else same.all()
    assert (~still).sum() > 16


def test_a_coarse_map_covers_its_quarter_of_the_image() -> None:
    maps = torch.tensor([[[255, 0], [0, 0]]], dtype=torch.uint8)
    augment = BatchAugment((0.0,) * 3, (1.0,) * 3, rng(), hflip=1.0)
    _, moved = augment.with_maps(torch.zeros(1, 3, 12, 12, dtype=torch.uint8), maps)
    assert moved is not None
    assert moved.shape == (1, 12, 12)
    assert moved[0, :4, 8:].float().mean() > 200
    assert moved[0, 6:, :6].float().mean() < 20


# --- training


def red_folder(root: Path, side: int, count: int = 12, ratio: float = 1.0) -> str:
    """Class folders of pictures with a red slope each."""
    for label, name in enumerate(("a", "b")):
        (root / name).mkdir(parents=True)
        for index, image in enumerate(smooth(count, side)):
            pixels = torch.cat((image[:1], image[1:] * 0 + label * 99)).permute(1, 2, 0).numpy()
            picture = Image.fromarray(pixels).resize((round(side * ratio), side))
            picture.save(root / name / f"{index}.png")
    return str(root)


def red_maps(config: TrainConfig, out: Path, monkeypatch: pytest.MonkeyPatch) -> vitmix.TeacherMaps:
    """``vitmix teach`` with the red teacher, of images with values from 0 to 1."""
    from vitmix.train import teaching
    from vitmix.train.teachers import Teacher

    side = config.img_size or 16
    found = Teacher("red", torch.nn.Identity(), side, (0.0,) * 3, (1.0,) * 3)
    monkeypatch.setattr(teaching, "find_teacher", lambda *args, **kwargs: found)
    monkeypatch.setattr(teaching, "ActivationMaps", lambda model: red)
    return teaching.teach(config, str(out), model="red")


@pytest.mark.parametrize(
    ("side", "ratio", "size", "workers"),
    [(16, 1.0, None, 0), (20, 1.5, 16, 0), (120, 1.25, 112, 0), (120, 1.25, 112, 1)],
    ids=["in memory", "cut, in memory", "decoded", "decoded by a process"],
)
def test_training_batches_bring_their_maps(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    side: int,
    ratio: float,
    size: int | None,
    workers: int,
) -> None:
    """In every path, through every crop and flip, the map is the image's red channel."""
    folder = red_folder(tmp_path / "data", side, ratio=ratio)
    config = TrainConfig(data=folder, img_size=size, workers=workers, batch_size=4, threads=1)
    red_maps(config, tmp_path / "maps", monkeypatch)
    config = TrainConfig(
        data=folder, img_size=size, workers=workers, batch_size=4, val_share=0.2, train_limit=16,
        teacher_maps=str(tmp_path / "maps"),
    )  # fmt: skip
    data = load_data(config)
    augment = make_augment(data, config, rng(), train=True)
    augment.mean, augment.std = (0.0,) * 3, (1 / 255,) * 3
    seen = 0
    for images, labels, maps in make_loader(data, config, train=True):
        assert labels.shape == (4,)
        pixels, moved = augment.with_maps(images, maps)
        assert moved is not None
        top = pixels[:, 0].amax((1, 2), keepdim=True)
        scaled = moved.float() * top / moved.float().amax((1, 2), keepdim=True)
        assert (pixels[:, 0] - scaled).abs().mean() < 8  # nearest places, bicubic colours
        flipped = scaled.flip(-1)
        assert (pixels[:, 0] - flipped).abs().mean() > 10
        seen += len(images)
    assert seen == 16
    assert len(next(iter(make_loader(data, config, train=False)))) == 2


def test_maps_of_other_data_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = red_folder(tmp_path / "data", 16)
    red_maps(TrainConfig(data=folder, workers=0), tmp_path / "maps", monkeypatch)
    arguments: dict[str, Any] = {"teacher_maps": str(tmp_path / "maps")}
    with pytest.raises(vitmix.InputError, match="maps of the training images of 'digits'"):
        load_data(TrainConfig(data="digits", **arguments))
    with pytest.raises(vitmix.InputError, match=r"of the whole of each image .* --img-size 112"):
        load_data(TrainConfig(data=folder, img_size=112, **arguments))
    (Path(folder) / "a" / "0.png").unlink()
    with pytest.raises(vitmix.InputError, match="or of other images"):
        load_data(TrainConfig(data=folder, **arguments))


SMALL = ["--threads", "1", "--device", "cpu", "--img-size", "16"]


def test_teach_then_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = [*SMALL, "--train-limit", "64", "--batch-size", "32", "--epochs", "1", "--crop-padding",
             "1", "--out", str(tmp_path / "runs")]  # fmt: skip
    assert main(["train", *small, "--name", "plain"]) == 0
    maps = ["--out", str(tmp_path / "maps"), "--workers", "0"]
    teacher = ["--checkpoint", str(tmp_path / "runs" / "plain")]
    capsys.readouterr()
    assert main(["teach", *SMALL, *teacher, *maps]) == 0
    assert capsys.readouterr().out == f"1797 maps of 4x4 in {tmp_path / 'maps'}\n"
    mixed = ["--method", "tokenmix", "--teacher-maps", str(tmp_path / "maps")]
    assert main(["train", *small, "--name", "mixed", *mixed]) == 0
    assert not (tmp_path / "runs" / "mixed" / "teacher").exists()
    assert (tmp_path / "runs" / "mixed" / "examples.png").exists()
    capsys.readouterr()
    for wrong, message in (
        (["teach", *SMALL, *maps], "got neither"),
        (
            ["teach", *SMALL, *teacher, *maps, "--data", "fake:10x16x40"],
            "a teacher of the 10 classes",
        ),
        (["teach", *SMALL, "--model", "resnet18", *maps], "knows 1000 other classes"),
        (["teach", *SMALL, "--model", "cct_2_3x2_32", *maps], "comes without weights"),
        (["train", *small, *mixed, "--teacher", "a.ckpt"], "--teacher or --teacher-maps, got both"),
        (["train", *small, "--teacher-maps", str(tmp_path / "maps")], "a method that uses"),
        (
            ["train", *small, *mixed[:2], "--teacher-maps", "nowhere"],
            "found no meta.json in nowhere",
        ),
    ):
        assert main([*wrong, "--name", "wrong"] if wrong[0] == "train" else wrong) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert message in err
    assert not (tmp_path / "runs" / "wrong").exists()


def test_weights_of_a_named_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vitmix.models import create_model
    from vitmix.weights import write_weights

    for classes in (10, 7):
        torch.manual_seed(0)
        network = create_model("cct_2_3x2_32", num_classes=classes, img_size=16)
        write_weights(network, tmp_path / f"{classes}.safetensors")
    common = ["teach", *SMALL, "--model", "cct_2_3x2_32", "--out", str(tmp_path / "maps"),
              "--workers", "0", "--checkpoint"]  # fmt: skip
    assert main([*common, str(tmp_path / "7.safetensors")]) == 2
    assert "tensors differ" in capsys.readouterr().err
    assert main([*common, str(tmp_path / "10.safetensors")]) == 0
    assert vitmix.TeacherMaps(tmp_path / "maps").facts["teacher"].startswith("cct_2_3x2_32 ")


def test_a_teacher_of_the_hub_is_what_its_own_file_says(tmp_path: Path) -> None:
    """Classes and normalisation are not those of the architecture's weights in timm."""
    from timm.models import save_for_hf

    from vitmix.models import create_model
    from vitmix.train.data import pretrained_statistics
    from vitmix.train.teachers import find_teacher

    options = {"embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 8, "img_size": 16}
    network: Any = create_model("vit_tiny_patch16_224", num_classes=3, **options)
    facts = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "input_size": (3, 16, 16)}
    save_for_hf(network, tmp_path, model_args=options, data_config=facts)
    name = f"local-dir:{tmp_path}"
    with pytest.raises(vitmix.InputError, match="knows 3 other classes"):
        find_teacher(tuple("abcd"), "letters", model=name)
    teacher = find_teacher(tuple("abc"), "letters", model=name)
    assert torch.equal(teacher.model.state_dict()["head.weight"], network.head.weight)
    assert (teacher.side, teacher.mean, teacher.std) == (16, facts["mean"], facts["std"])
    known = pretrained_statistics(TrainConfig(model=name, pretrained=True))
    assert known == (facts["mean"], facts["std"])


def test_a_named_teacher_sees_images_as_in_its_own_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A student's images have its own mean and deviation; where they agree, nothing is done."""
    from vitmix.train import run, teachers
    from vitmix.train.augment import normalise

    own, other = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), ((0.48, 0.45, 0.4), (0.23, 0.22, 0.225))
    pixels = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    classes = torch.tensor([0, 3, 1, 2])
    plain = make_cct().eval()

    def found(*args: Any, **options: Any) -> teachers.Teacher:
        return teachers.Teacher("some", copy.deepcopy(plain), 32, *own)

    monkeypatch.setattr(teachers, "find_teacher", found)
    data = load_data(TrainConfig(data="fake:8x32x40"))
    config = TrainConfig(teacher="some")
    maps = vitmix.ActivationMaps(plain)(normalise(pixels, *own), classes)
    for mean, std in (own, other):
        given = dataclasses.replace(data, mean=mean, std=std)
        teacher = pickle.loads(pickle.dumps(run._make_teacher(config, given)))
        assert teacher.state_dict().keys() == plain.state_dict().keys()
        assert bool(teacher._forward_pre_hooks) == (mean != own[0])
        images = normalise(pixels, mean, std)
        seen = vitmix.ActivationMaps(teacher)(images, classes)
        torch.testing.assert_close(seen, maps, atol=1e-5, rtol=1e-4)
        if mean == own[0]:
            assert torch.equal(seen, maps)
        else:
            assert not torch.allclose(vitmix.ActivationMaps(plain)(images, classes), maps)


def test_jitter_leaves_maps_alone() -> None:
    images = smooth(5, 8)
    both = torch.cat((images, images[:, :1]), 1)
    jitter = make_policy("none", 0.4)
    assert jitter is not None
    assert torch.equal(jitter(both, rng())[:, 3], both[:, 3])


def test_the_example_teaches_and_trains(tmp_path: Path) -> None:
    import runpy

    from torchvision.datasets import ImageFolder

    from vitmix.models import create_model

    example = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "teacher_maps.py"))
    images = ImageFolder(red_folder(tmp_path / "data", 24, count=4, ratio=1.5))
    teacher, student = (create_model("cct_2_3x2_32", num_classes=2, img_size=16) for _ in "ab")
    maps = example["teach"](teacher, images, 16, str(tmp_path / "maps"))
    assert (len(maps), maps.grid) == (8, (4, 4))
    losses: list[float] = []
    options = {"side": 16, "num_classes": 2, "batch_size": 4, "report": losses.append}
    example["train"](student, images, maps, **options)
    assert len(losses) == 2
    viewed = example["Viewed"](images, example["as_input"](16), maps)
    for row in range(8):
        image, _, mask = viewed[row]
        assert (image.shape, mask.shape) == ((3, 16, 16), (16, 16))
        largest = maps[row].flatten().argmax()  # of the map and of its mask, in the same quarter
        assert mask.view(4, 4, 4, 4).amax((1, 3)).flatten()[largest] == mask.max()
