"""The papers' figures: their arrays against slow loops, and the command that draws them."""

from __future__ import annotations

import csv
import math
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import vitmix
from models import NUM_CLASSES, batch, make_cct, make_vit
from vitmix.analysis import (
    DETECTORS,
    difficulty_quantiles,
    follow_origins,
    saliency_by_detector,
)
from vitmix.cli import main
from vitmix.functional import Mixture, sharpness, top_share
from vitmix.gradient import gradient_saliency
from vitmix.labels import LabelEvidence
from vitmix.step import StepRecord
from vitmix.train.config import TrainConfig
from vitmix.train.run import train_run

pytest.importorskip("timm")


# --- sharpness


@given(st.lists(st.floats(0.001, 10), min_size=2, max_size=12), st.floats(0.05, 1))
def test_sharpness_by_hand(values: list[float], part: float) -> None:
    saliency = torch.tensor([values], dtype=torch.float64)
    total = sum(values)
    entropy = -sum(v / total * math.log(v / total) for v in values)
    assert float(sharpness(saliency)) == pytest.approx(
        1 - entropy / math.log(len(values)), abs=1e-9
    )
    left, found = max(1.0, part * len(values)), 0.0
    for value in sorted(values, reverse=True):
        found += value / total * min(1.0, max(0.0, left))
        left -= 1
    assert float(top_share(saliency, part)) == pytest.approx(found, abs=1e-9)
    torch.testing.assert_close(sharpness(3 * saliency), sharpness(saliency))


@pytest.mark.parametrize(
    ("values", "sharp", "top"),
    [([1.0] * 20, 0.0, 0.1), ([0.0] * 19 + [2.0], 1.0, 1.0), ([0.0] * 20, 0.0, 0.1)],
)
def test_sharpness_of_extremes(values: list[float], sharp: float, top: float) -> None:
    saliency = torch.tensor([values])
    assert float(sharpness(saliency)) == pytest.approx(sharp, abs=1e-6)
    assert float(top_share(saliency)) == pytest.approx(top, abs=1e-6)


def test_sharpness_refuses() -> None:
    with pytest.raises(vitmix.InputError, match=r"got \(3,\)"):
        sharpness(torch.ones(3))
    with pytest.raises(vitmix.InputError, match="a part in"):
        top_share(torch.ones(1, 3), 0.0)


# --- detectors


@pytest.mark.parametrize("make", [make_vit, make_cct])
def test_detectors(make) -> None:  # type: ignore[no-untyped-def]
    images, labels = batch()
    torch.manual_seed(0)
    model = make().eval()
    mixing = vitmix.MixingModel(model, num_classes=NUM_CLASSES)
    found = saliency_by_detector(mixing, images, labels, block=1)
    assert list(found) == list(DETECTORS)
    for detected in found.values():
        assert detected.maps is not None
        torch.testing.assert_close(detected.maps.sum((1, 2)), torch.ones(len(images)))
        torch.testing.assert_close(sharpness(detected.maps.flatten(1)), detected.sharpness)
    gradient = gradient_saliency(model, mixing.backbone, 1, images, torch.eye(NUM_CLASSES)[labels])
    torch.testing.assert_close(found["gradient"].maps.flatten(1), gradient)
    stage = vitmix.HorizontalTokenMixup(block=1, saliency="rollout", rollout_steps=2)
    rolled = vitmix.MixingModel(model, tokens=[stage], num_classes=NUM_CLASSES)
    saliency = rolled(images, labels).trace.saliency[1]
    expected = saliency / saliency.sum(1, keepdim=True)
    torch.testing.assert_close(found["rollout"].maps.flatten(1), expected)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_no_rollout_is_told() -> None:
    import timm

    images, labels = batch()
    mixing = vitmix.MixingModel(make_cct(), num_classes=NUM_CLASSES)
    assert (
        "no block behind" in saliency_by_detector(mixing, images, labels, block=3)["rollout"].reason
    )
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, depths=(2, 2),
        embed_dim=32, num_heads=(1, 2), num_classes=NUM_CLASSES,
    )  # fmt: skip
    found = saliency_by_detector(
        vitmix.MixingModel(swin, num_classes=NUM_CLASSES), images, labels, block=0
    )
    assert "windows" in found["rollout"].reason
    assert found["attention"].maps is not None


# --- fluctuation


def test_origins_by_hand() -> None:
    """Two samples of four tokens behind a prefix token, each the other's partner."""
    sources = torch.tensor([[0, 1], [1, 0]])
    generator = torch.Generator().manual_seed(0)
    start = torch.tensor([[0.5, 1, 1, 0, 0], [0.75, 1, 1, 1, 0]])
    later = torch.rand(2, 5, generator=generator)

    def mixture(own: torch.Tensor) -> Mixture:
        return Mixture(sources, torch.stack((own, 1 - own), 2))

    pooled = mixture(later).shares[:, 0]
    evidence = LabelEvidence(
        mixture(start), 1, (2, 2), torch.zeros(2, 3, 4, 4), torch.arange(2), None,
        pooled_shares=pooled,
    )  # fmt: skip
    history = (((2, 2), mixture(start)), ((2, 2), mixture(later)))
    found = follow_origins(StepRecord(evidence, mixture(later), history), 1)
    for place, own in enumerate((start, later)):
        for sample in range(2):
            mine = [t for t in range(1, 5) if start[sample, t] == 1]
            others = [t for t in range(1, 5) if start[sample, t] == 0]
            for tokens, values in ((mine, found.own), (others, found.partner)):
                expected = sum(float(own[sample, t]) for t in tokens) / len(tokens)
                assert float(values[place, sample]) == pytest.approx(expected)
            assert found.maps[place].shape == (2, 2, 2)
    assert found.prefix is not None
    torch.testing.assert_close(found.prefix[1], later[:, 0])
    torch.testing.assert_close(found.label, later[:, 0])
    torch.testing.assert_close(found.area, torch.tensor([0.5, 0.75]))


def test_origins_end_in_the_aligned_label() -> None:
    images, labels = batch()
    mixing = vitmix.MixingModel(
        make_vit(), mix=vitmix.CutMix(align=True, draw="element"), num_classes=NUM_CLASSES,
        labels=vitmix.TokenAlignedLabels(), tokens=[vitmix.HorizontalTokenMixup(2, math.inf, 0.0)],
    )  # fmt: skip
    trace = mixing(images, labels, record=True).trace
    found = follow_origins(trace.record, 1)
    mine = trace.sources == torch.arange(len(images))[:, None]
    torch.testing.assert_close(found.label, (trace.weights * mine).sum(1))
    alone = trace.pixels.partner == torch.arange(len(images))
    torch.testing.assert_close(found.area, torch.where(alone, 1.0, trace.pixels.lam))
    assert len(found.maps) == 1 + mixing.backbone.depth


def test_difficulty_quantiles() -> None:
    found = difficulty_quantiles(torch.arange(11.0))
    assert {key: float(value) for key, value in found.items()} == {
        "difficulty_q10": 1.0, "difficulty_q25": 2.5, "difficulty_q50": 5.0,
        "difficulty_q75": 7.5, "difficulty_q90": 9.0,
    }  # fmt: skip


# --- the command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = TrainConfig(
        train_limit=64, img_size=16, batch_size=32, epochs=2, threads=1, name="r", device="cpu",
        out=str(tmp_path_factory.mktemp("figures")), method="tokenmixup-h", tau=2.3,
        image_epochs=0, log_interval=1,
    )  # fmt: skip
    return train_run(settings, verbose=False).folder


LOOK = ["--batch-size", "8", "--threads", "1", "--device", "cpu"]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("saliency", ["--block", "0", *LOOK]),
        ("saliency", LOOK),
        ("fluctuation", LOOK),
        ("mixing", []),
        ("difficulty", []),
    ],
)
def test_figures_of_a_run(
    kind: str, options: list[str], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / f"{kind}.png"
    assert main(["figure", kind, str(run), "--out", str(out), *options]) == 0
    assert capsys.readouterr().out == f"figure  {out}\n"
    with Image.open(out) as image:
        assert min(image.size) > 200


def test_tau_and_quantiles_are_logged(run: Path) -> None:
    with (run / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert {float(row["horizontal_1/tau"]) for row in rows} == {float(torch.tensor(2.3))}
    levels = [[float(row[f"horizontal_1/difficulty_q{q}"]) for q in (10, 50, 90)] for row in rows]
    assert all(values == sorted(values) for values in levels)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["salience", "RUN"], "did you mean 'saliency'"),
        (["saliency", "nowhere"], "there is no nowhere"),
        (["difficulty", "nowhere"], "metrics.csv"),
        (["mixing", "PLAIN"], "mixed no tokens"),
        (["difficulty", "PLAIN"], "logged no difficulty"),
        (["mixing", "RUN", "--block", "1"], "no --block"),
        (["saliency", "RUN", "--block", "7"], "--block from 0 to 1"),
        (["mixing", "RUN", "--out", "a.xyz"], "ends in one of"),
    ],
)
def test_bad_input(
    arguments: list[str], words: str, run: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    plain = tmp_path / "plain"
    shutil.copytree(run, plain)
    (plain / "metrics.csv").write_text("step,train/loss\n1,2.0\n")
    places = {"RUN": str(run), "PLAIN": str(plain)}
    assert main(["figure", *(places.get(word, word) for word in arguments)]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_a_draw_that_mixes_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vitmix.evaluate.figures.choose_rows", lambda *given: [])
    assert main(["figure", "fluctuation", str(run), *LOOK]) == 2
    assert "seed 0 mixes none" in capsys.readouterr().err
