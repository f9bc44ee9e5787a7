"""Measures of a trained model, against slow ones and against what is known beforehand."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_calibration_error

import vitmix
from models import NUM_CLASSES, make_cct
from vitmix.cli import main
from vitmix.evaluate import measures
from vitmix.evaluate.checkpoint import evaluate_model, open_run
from vitmix.evaluate.measured import MEASURES, chosen_measures
from vitmix.evaluate.measures import Subject, inside_box, occluded, reliability
from vitmix.evaluate.study_results import measures_in, taken_on

SEEDS = st.integers(0, 2**32 - 1)


def subject(model: nn.Module, images: Tensor, labels: Tensor, classes: int, size: int = 4) -> Any:
    """A model on images in memory; normalised to [-1, 1]."""
    return Subject(
        model.eval(),
        lambda: zip(images.split(size), labels.split(size), strict=True),
        lambda pixels: pixels.float() / 127.5 - 1,
        classes,
    )


class Brightness(nn.Module):
    """Class 1 where the image is brighter than medium."""

    def forward(self, images: Tensor) -> Tensor:
        mean = images.mean((1, 2, 3))
        return torch.stack((torch.zeros_like(mean), 20 * mean), 1)


# --- tensors


@given(seed=SEEDS, count=st.integers(1, 40), bins=st.integers(1, 20))
def test_reliability_is_that_of_a_loop(seed: int, count: int, bins: int) -> None:
    torch.manual_seed(seed)
    confidence, right = torch.rand(count), torch.rand(count) < 0.5
    found = reliability(confidence, right, bins)
    assert sum(each["images"] for each in found) == count
    place = 0
    for index in range(bins):
        low, high = index / bins, (index + 1) / bins
        inside = [k for k in range(count) if low < float(confidence[k]) <= high]
        if inside:
            each, place = found[place], place + 1
            assert each["images"] == len(inside)
            assert each["accuracy"] == pytest.approx(np.mean([bool(right[k]) for k in inside]))


@given(
    seed=SEEDS, grid=st.tuples(st.integers(1, 5), st.integers(1, 5)), more=st.integers(0, 7),
    share=st.floats(0, 1),
)  # fmt: skip
def test_occlusion_is_that_of_a_loop(
    seed: int, grid: tuple[int, int], more: int, share: float
) -> None:
    torch.manual_seed(seed)
    rows, columns = grid
    images = torch.randn(2, 3, rows + more, columns + 2 * more)
    scores = torch.randperm(2 * rows * columns).view(2, rows, columns).float()
    observed = occluded(images, scores, share)
    expected = images.clone()
    height, width = images.shape[2:]
    for sample in range(2):
        ordered = sorted(scores[sample].flatten().tolist(), reverse=True)
        dropped = set(ordered[: round(share * rows * columns)])
        for y in range(height):
            for x in range(width):
                if float(scores[sample, y * rows // height, x * columns // width]) in dropped:
                    expected[sample, :, y, x] = 0
    assert torch.equal(observed, expected)


@given(seed=SEEDS, grid=st.tuples(st.integers(1, 4), st.integers(1, 4)), scale=st.integers(1, 5))
def test_localisation_is_that_of_a_loop(seed: int, grid: tuple[int, int], scale: int) -> None:
    torch.manual_seed(seed)
    saliency = torch.rand(3, *grid) + 0.01
    height, width = grid[0] * scale, grid[1] * scale
    boxes = torch.rand(3, height, width) < 0.4
    boxes[:, 0, 0] = True
    found = inside_box(saliency, boxes)
    for sample in range(3):
        pixels = {
            (y, x): float(saliency[sample, y // scale, x // scale])
            for y in range(height)
            for x in range(width)
        }
        inside = {place for place in pixels if boxes[(sample, *place)]}
        share = sum(pixels[place] for place in inside) / sum(pixels.values())
        assert float(found["share"][sample]) == pytest.approx(share, rel=1e-4)
        assert float(found["area"][sample]) == pytest.approx(len(inside) / len(pixels))
        peak = divmod(int(saliency[sample].argmax()), grid[1])
        middle = tuple(place * scale + scale // 2 for place in peak)
        assert bool(found["pointing"][sample]) == (middle in inside)
        for threshold, overlap in zip(
            measures.THRESHOLDS, found["overlap"][sample].tolist(), strict=True
        ):
            level = np.float32(threshold) * np.float32(max(pixels.values()))
            reached = {place for place, value in pixels.items() if np.float32(value) >= level}
            assert overlap == pytest.approx(len(inside & reached) / len(inside | reached))


# --- measures


def test_calibration_of_known_probabilities() -> None:
    """Sure of 3/4 of its images by 0.8 and right in all, sure of the others and always wrong."""

    class Known(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.tensor([math.log(4.0), 0.0]).expand(len(images), 2)

    labels = torch.tensor([0, 0, 0, 1] * 3)
    images = torch.zeros(12, 3, 4, 4, dtype=torch.uint8)
    found = measures.calibration(subject(Known(), images, labels, 2))
    assert found["ece"] == found["mce"] == pytest.approx(0.05, abs=1e-6)
    assert found["brier"] == pytest.approx(0.75 * 2 * 0.2**2 + 0.25 * 2 * 0.8**2)
    assert found["bins"] == [
        {"images": 12, "confidence": pytest.approx(0.8), "accuracy": pytest.approx(0.75)}
    ]


@given(seed=SEEDS)
def test_the_diagram_and_the_error_agree(seed: int) -> None:
    torch.manual_seed(seed)
    images = torch.randint(0, 256, (20, 3, 4, 4), dtype=torch.uint8)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    found = measures.calibration(subject(model, images, torch.randint(5, (20,)), 5))
    error = sum(b["images"] / 20 * abs(b["accuracy"] - b["confidence"]) for b in found["bins"])
    assert found["ece"] == pytest.approx(error, abs=1e-6)


def test_the_calibration_error_is_that_of_torchmetrics() -> None:
    """Whose sixteenth bin, of those that are wholly sure, is no bin here."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (200, 3, 4, 4), dtype=torch.uint8)
    labels = torch.randint(5, (200,))
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    probabilities = model(images / 127.5 - 1).softmax(1)
    found = measures.calibration(subject(model, images, labels, 5, size=200))
    for key, norm in (("ece", "l1"), ("mce", "max")):
        theirs = multiclass_calibration_error(probabilities, labels, 5, n_bins=15, norm=norm)  # type: ignore[arg-type]
        assert found[key] == pytest.approx(float(theirs), abs=1e-6)

    class Sure(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            certain = images.new_tensor([200.0, 0.0]).expand(len(images) // 2, 2)
            return torch.cat((certain, images.new_tensor([3.0, 0.0]).expand(len(certain), 2)))

    found = measures.calibration(subject(Sure(), images[:8], torch.tensor([0, 0, 0, 1] * 2), 2, 8))
    assert len(found["bins"]) == 1
    assert found["ece"] == found["mce"] == pytest.approx(abs((1 + 0.952574) / 2 - 0.75), abs=1e-5)


def test_gradients_after_accuracies() -> None:
    """As where the model is moved to another device, which makes new parameters."""

    class Moved(nn.Linear):
        def to(self, *args: Any, **kwargs: Any) -> Any:
            self.weight.data = self.weight.data.clone()
            return self

    model = Moved(48, 2)
    images, labels = torch.zeros(4, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    evaluate_model(model, [(images, labels)], lambda raw: raw.float().flatten(1), 2)  # type: ignore[arg-type]
    assert not model.weight.is_inference()
    who = Subject(model, lambda: [(images, labels)], lambda raw: raw.float().flatten(1), 2)
    assert measures.fgsm(who)["images"] == 4


def test_a_step_as_large_as_the_margin_turns_the_class() -> None:
    images = torch.tensor([126, 124, 129, 131], dtype=torch.uint8)
    images = images.view(4, 1, 1, 1).expand(4, 3, 5, 5)
    labels = torch.tensor([0, 0, 1, 1])
    found = measures.fgsm(subject(Brightness(), images, labels, 2), (0.0, 2.0, 4.0))
    assert found["accuracy"] == [1.0, 0.5, 0.0]


def test_salient_patches_are_dropped_first() -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    model = make_cct()
    labels = model.eval()(images.float() / 127.5 - 1).argmax(1)
    who = subject(model, images, labels, NUM_CLASSES)
    found = measures.occlusion(who, (0.0, 0.5, 1.0))
    assert list(found["accuracy"]) == ["random", "salient", "non-salient"]
    assert all(values[0] == 1.0 for values in found["accuracy"].values())
    ends = {values[2] for values in found["accuracy"].values()}
    assert len(ends) == 1  # nothing is left in any order
    assert found["images"] == 6
    again = measures.occlusion(who, (0.0, 0.5, 1.0))
    assert again == found
    assert not any(module._forward_hooks for module in model.modules())


def test_occlusion_needs_attention() -> None:
    who = subject(Brightness(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2), 2)
    with pytest.raises(vitmix.UnsupportedModelError):
        measures.occlusion(who)


def test_corruptions_at_every_severity() -> None:
    pytest.importorskip("imagecorruptions")
    images = torch.tensor([40, 60], dtype=torch.uint8).view(2, 1, 1, 1).repeat(1, 3, 32, 32)
    who = subject(Brightness(), images, torch.tensor([0, 0]), 2)
    state = np.random.get_state()[1].copy()  # type: ignore[union-attr, index] # noqa: NPY002
    found = measures.corruptions(who, ["brightness", "gaussian_noise"], (1, 5))
    assert (np.random.get_state()[1] == state).all()  # type: ignore[index] # noqa: NPY002
    assert found["accuracy"]["brightness"] == [1.0, 0.0]  # brighter by 0.1 and by 0.5
    assert found["mean"] == pytest.approx(np.mean(list(found["accuracy"].values())))
    seen: list[Tensor] = []
    prepare = who.prepare
    who = replace(who, prepare=lambda raw: prepare(seen.append(raw.clone()) or raw))
    for _ in range(2):
        measures.corruptions(who, ["impulse_noise", "shot_noise", "glass_blur"], (5,))
    assert all(torch.equal(seen[k], seen[k + 3]) for k in range(3))  # the same noise every time
    assert not torch.equal(seen[0][0] - 40, seen[0][1] - 60)  # another one for each image
    with pytest.raises(vitmix.InputError, match="at least 32 x 32"):
        measures.corruptions(subject(Brightness(), images[..., :16], torch.tensor([0, 0]), 2))


# --- the command


def boxed_parquet(path: Path, rows: int, width: int = 32) -> None:
    rng = np.random.default_rng(rows)
    images, boxes = [], []
    for _ in range(rows):
        buffer = io.BytesIO()
        pixels = rng.integers(0, 256, (32, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, format="PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
        left, top = rng.integers(0, 16, 2).tolist()
        boxes.append([left, top, left + 15, top + 15])
    pq.write_table(
        pa.table({"image": images, "label": [k % 2 for k in range(rows)], "box": boxes}), path
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("measured")
    boxed_parquet(root / "train.parquet", 16)
    boxed_parquet(root / "test.parquet", 10)
    arguments = ["--model", "cct_2_3x2_32", "--epochs", "1", "--batch-size", "8"]
    assert (
        main(["train", "--data", str(root), "--out", str(root), "--name", "run", *arguments]) == 0
    )
    return root / "run"


def test_all_measures_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("imagecorruptions")
    capsys.readouterr()
    assert main(["evaluate", str(run), "--measures", "all", "--limit", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("top-1 ")
    assert [line.split()[0] for line in lines[1:-1]] == list(MEASURES)
    found = json.loads((run / "evaluation.json").read_text())
    assert found["localisation"]["images"] == 2
    assert found["localisation"]["area"] == pytest.approx(0.25)
    assert found["images"] == 10  # accuracies are of all
    assert len(found["corruptions"]["accuracy"]) == 15
    assert (run / "evaluation.png").stat().st_size > 10_000


def test_some_measures_elsewhere(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", str(run), "--measures", "fgsm,calibration", "--out", str(tmp_path)]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"fgsm", "calibration", "top1"} < set(found)
    assert found == json.loads((tmp_path / "evaluation.json").read_text())
    assert found["fgsm"]["accuracy"][0] == pytest.approx(found["top1"] / 100)


def test_batches_are_as_large_as_asked_for(run: Path) -> None:
    sizes = [len(labels) for _, labels in open_run(str(run), batch_size=4).batches()]
    assert sizes == [4, 4, 2]
    assert [len(labels) for _, labels in open_run(str(run)).batches()] == [10]


def test_other_data_is_tested_on_as_it_comes(run: Path, tmp_path: Path) -> None:
    """What said where the run's own labels and test images were says nothing about others."""
    boxed_parquet(tmp_path / "train.parquet", 6)
    boxed_parquet(tmp_path / "test.parquet", 4)
    more = ["--label-column", "label", "--val-share", "0.5", "--epochs", "1", "--batch-size", "4"]
    more += ["--model", "cct_2_3x2_32", "--out", str(tmp_path), "--name", "held-out"]
    assert main(["train", "--data", str(run.parent), *more]) == 0
    held_out = open_run(str(tmp_path / "held-out"))
    assert len(held_out.data.test) == 8
    assert len(open_run(str(tmp_path / "held-out"), data=str(tmp_path)).data.test) == 4


def test_measures_of_another_split_or_with_boxes_cut_off(tmp_path: Path) -> None:
    """The first are not the run's own; the second were taken on all images."""
    for split in ("train", "test", "val"):
        boxed_parquet(tmp_path / f"{split}.parquet", 8, 72)  # the middle 32 columns are seen
    settings = ["--model", "cct_2_3x2_32", "--epochs", "1", "--batch-size", "8"]
    settings += ["--img-size", "32", "--out", str(tmp_path), "--name", "run"]
    assert main(["train", "--data", str(tmp_path), *settings]) == 0
    run = tmp_path / "run"
    command = ["evaluate", str(run), "--measures", "localisation"]
    assert main(command) == 0
    found = measures_in(run)["localisation"]
    assert found["images"] < 8
    assert taken_on(found) == 8
    assert main([*command, "--test-split", "val"]) == 0
    assert measures_in(run) == {}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--measures", "ocklusion"], "did you mean 'occlusion'"),
        (["--measures", ","], "expected --measures as all or some"),
        (["--measures", "fgsm", "--limit", "0"], "expected --limit to be at least 1"),
        (["--limit", "3"], "with --measures"),
        (["--measures", "fgsm", "--out", "nowhere/at/all"], "expected a folder"),
    ],
)
def test_bad_options(
    run: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(run), *more]) == 2
    assert message in capsys.readouterr().err


def test_boxes_are_missed_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", "fake:2x32x8", "--model", "cct_2_3x2_32", "--batch-size", "4"]
    run = str(tmp_path / "run")
    more = ["--epochs", "1", "--out", str(tmp_path), "--name", "run"]
    assert main(["train", *options, *more]) == 0
    assert main(["evaluate", run, "--measures", "all"]) == 2
    assert "a column box or bbox" in capsys.readouterr().err
    assert not (tmp_path / "run" / "evaluation.json").exists()


def test_names_of_measures() -> None:
    assert chosen_measures("all") == list(MEASURES)
    assert chosen_measures("fgsm, occlusion") == ["fgsm", "occlusion"]
