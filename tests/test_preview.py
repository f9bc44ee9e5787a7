"""Pictures of what a step mixes: arrays say what happened; looking changes nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vitmix
from models import NUM_CLASSES, batch, make_cct, make_vit
from vitmix.cli import main
from vitmix.plots.examples import examples_figure
from vitmix.plots.style import DARK, LIGHT, pixels_of_figure, themed
from vitmix.samples import choose_rows

pytest.importorskip("timm")

Stages = dict[str, Any]


def horizontal(**options: Any) -> vitmix.HorizontalTokenMixup:
    return vitmix.HorizontalTokenMixup(**{"block": 1, "tau": math.inf, "rho": 0.0, **options})


METHODS: dict[str, Callable[[], Stages]] = {
    "none": dict,
    "mixup": lambda: {"mix": vitmix.Mixup()},
    "cutmix": lambda: {"mix": vitmix.CutMix()},
    "transmix": lambda: {"mix": vitmix.CutMix(), "labels": vitmix.AttentionLabels()},
    "manifold": lambda: {"tokens": [vitmix.ManifoldMixup(block=2)]},
    "horizontal": lambda: {"tokens": [horizontal()]},
    "tokenmixup": lambda: {"tokens": [horizontal(), vitmix.VerticalTokenMixup(2, kappa=3)]},
    "cutmix+horizontal": lambda: {"mix": vitmix.CutMix(), "tokens": [horizontal()]},
    "by-count": lambda: {"mix": vitmix.CutMix(), "tokens": [horizontal(relabel="area")]},
    "transmix+horizontal": lambda: {
        "mix": vitmix.CutMix(), "labels": vitmix.AttentionLabels(), "tokens": [horizontal()],
    },
    "all": lambda: {
        "mix": vitmix.TokenMix(min_block_tokens=2), "labels": vitmix.TokenAlignedLabels(),
        "tokens": [horizontal(), vitmix.VerticalTokenMixup(2, kappa=3)],
    },
    "blended-first": lambda: {"tokens": [vitmix.ManifoldMixup(block=1), horizontal()]},
    "blended-last": lambda: {"tokens": [horizontal(), vitmix.ManifoldMixup(block=1)]},
    "twice": lambda: {"tokens": [horizontal(), horizontal(block=3), vitmix.ManifoldMixup(block=2)]},
}  # fmt: skip


def make(method: str, model: Callable[[], Any] = make_vit, **options: Any) -> vitmix.MixingModel:
    torch.manual_seed(0)
    stages = METHODS[method]()
    return vitmix.MixingModel(model(), num_classes=NUM_CLASSES, **stages, **options)


def make_swin() -> Any:
    import timm

    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, depths=(2, 2), embed_dim=32,
        num_heads=(1, 2), num_classes=NUM_CLASSES,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("method", "model"),
    [(method, model) for method in METHODS for model in (make_vit, make_cct)]
    + [(method, make_swin) for method in ("cutmix+horizontal", "transmix+horizontal", "twice")],
)
def test_bars_are_the_targets_of_the_step(method: str, model: Callable[[], Any]) -> None:
    images, _ = batch(NUM_CLASSES)
    labels = torch.arange(NUM_CLASSES)  # a class each: whose label is whose can be told
    mixing = make(method, model)
    shown = mixing.preview(images, labels, samples=range(NUM_CLASSES), seed=3)
    mixing.eval().training = True
    mixing.generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        out = mixing(images, labels)
    for sample in shown.samples:
        target = torch.zeros(NUM_CLASSES)
        for name, weight in zip(sample.names, sample.labels[sample.rule], strict=True):
            target[int(name.removeprefix("class "))] += weight
        torch.testing.assert_close(target, out.targets[sample.row], atol=1e-5, rtol=0)
        assert sample.names[0] == f"class {sample.row}"
        for weights in sample.labels.values():
            assert float(weights.sum()) == pytest.approx(1, abs=1e-5)
        torch.testing.assert_close(sample.shares.sum(2), torch.ones(sample.shares.shape[:2]))


@pytest.mark.parametrize("side", [32, 38])
def test_pictures_are_made_of_their_sources(side: int) -> None:
    """Where shares say that a pixel is a source's, it is that image's pixel.

    At 38 pixels the model sees no more than 4 patches of 8 a side.
    """
    images = torch.rand(NUM_CLASSES, 3, side, side, generator=torch.Generator().manual_seed(0))
    mixing = make("all", lambda: make_vit(img_size=side))
    shown = mixing.preview(images, torch.arange(NUM_CLASSES), samples=NUM_CLASSES)
    assert shown.samples[0].mixed.shape == (32, 32, 3)
    everything = {sample.names[0]: sample.original for sample in shown.samples}
    assert any(len(sample.names) > 2 for sample in shown.samples)
    for sample in shown.samples:
        sources = torch.stack([everything[name] for name in sample.names], 2)
        mixed = (sample.shares[..., None] * sources).sum(2)
        torch.testing.assert_close(sample.mixed, mixed)
        (step,) = [step for step in sample.steps if step.block == 1]
        assert step.saliency is not None
        assert step.partner_saliency is not None
        assert step.replaced is not None
        torch.testing.assert_close(step.replaced, step.partner_saliency > step.saliency)
        assert [(s.target, s.block, int(s.chosen.sum())) for s in sample.selections] == [
            (2, 0, 3), (2, 1, 3),
        ]  # fmt: skip


def test_selected_tokens_are_the_most_salient() -> None:
    images, labels = batch()
    mixing = make("tokenmixup")
    out = mixing(images, labels)
    torch.testing.assert_close(
        out.trace.selected[2][1], _after(out.trace, mixing, images).topk(3).indices
    )


def _after(trace: vitmix.MixTrace, mixing: vitmix.MixingModel, images: torch.Tensor) -> Any:
    """Saliency of the mixed tokens at block 1, by a stage that only looks."""
    plan = trace.horizontal[1]
    looking = vitmix.MixingModel(
        copy.deepcopy(mixing.model), num_classes=NUM_CLASSES, tokens=[horizontal(tau=-1.0)]
    )
    block = looking.backbone.blocks[1].module

    def mix(module: Any, args: Any) -> Any:
        targets = torch.zeros(len(images), 1)
        return (vitmix.functional.apply_horizontal(args[0], targets, plan, num_prefix_tokens=1)[0],)

    block.register_forward_pre_hook(mix)
    return looking(images, torch.zeros(len(images), dtype=torch.long)).trace.saliency[1]


def test_looking_changes_nothing() -> None:
    images, labels = batch()
    mixing = make("horizontal", lambda: make_vit(drop_path_rate=0.5))
    mixing.tokens[0].tau_of_share = vitmix.HorizontalTokenMixup(tau="auto:0.5").tau_of_share
    mixing.tokens[0].tau = "auto:0.5"
    mixing.generator = torch.Generator().manual_seed(1)
    mixing.model.eval()
    before = copy.deepcopy(mixing.state_dict()), mixing.generator.get_state(), torch.get_rng_state()
    modes = [module.training for module in mixing.modules()]
    first = mixing.preview(images, labels)
    again = mixing.preview(images, labels)
    for one, other in zip(first.samples, again.samples, strict=True):
        assert torch.equal(one.mixed, other.mixed)
    after = mixing.state_dict(), mixing.generator.get_state(), torch.get_rng_state()
    assert all(
        torch.equal(value, after[0][key]) or value.isnan() for key, value in before[0].items()
    )
    assert torch.equal(before[1], after[1])
    assert torch.equal(before[2], after[2])
    assert modes == [module.training for module in mixing.modules()]
    assert all(parameter.grad is None for parameter in mixing.parameters())
    assert not mixing.backbone.blocks[1].module._forward_hooks


def test_record_leaves_the_step_as_it_is() -> None:
    images, labels = batch()
    mixing = make("cutmix+horizontal")
    results = []
    for record in (False, True):
        mixing.generator = torch.Generator().manual_seed(1)
        results.append(mixing(images, labels, record=record))
    torch.testing.assert_close(results[0].logits, results[1].logits)
    torch.testing.assert_close(results[0].targets, results[1].targets)
    assert results[0].trace.record is None
    record = results[1].trace.record
    assert len(record.history) == 1 + mixing.backbone.depth
    torch.testing.assert_close(record.history[0][1].shares, record.evidence.mixture.shares)


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ({}, "mixes no samples"),
        ({"tokens": [vitmix.VerticalTokenMixup(1)]}, "mixes no samples"),
        ({"mix": vitmix.CutMix(prob=0.0)}, "left unmixed"),
        ({"tokens": [vitmix.HorizontalTokenMixup(1, tau=1e-3)]}, "tau is 0.001"),
        ({"tokens": [vitmix.HorizontalTokenMixup(1, tau=math.inf, rho=1.0)]}, "salient by rho"),
    ],
)
def test_a_picture_says_why_nothing_was_mixed(stages: Stages, words: str) -> None:
    images, labels = batch()
    mixing = vitmix.MixingModel(make_vit(), num_classes=NUM_CLASSES, **stages)
    shown = mixing.preview(images, labels, samples=2)
    assert words in shown.note
    assert len(shown.samples) == 2
    assert all(torch.equal(sample.mixed, sample.original) for sample in shown.samples)
    assert shown.figure().get_axes()


def test_other_models_have_pictures_of_their_pixels() -> None:
    from torch import nn

    model = nn.Sequential(nn.Conv2d(3, 7, 4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    mixing = vitmix.MixingModel(model, mix=vitmix.CutMix(), num_classes=NUM_CLASSES)
    shown = mixing.preview(*batch())
    assert shown.samples[0].labels.keys() == {"area"}


@pytest.mark.parametrize(
    ("method", "theme"), [("none", DARK), ("mixup", LIGHT), ("all", DARK), ("twice", LIGHT)]
)
def test_every_method_is_drawn(method: str, theme: Any, tmp_path: Path) -> None:
    images, labels = batch()
    shown = make(method).preview(images, labels, samples=2, title=method)
    figure = shown.figure(theme)
    picture = pixels_of_figure(figure, 50)
    assert picture.shape[0] > 100
    assert picture.std() > 5
    with themed(theme):
        small = pixels_of_figure(examples_figure(shown.samples, theme, method), 50)
    assert small.shape[0] < picture.shape[0]


def test_saving(tmp_path: Path) -> None:
    shown = make("cutmix").preview(*batch(), samples=1)
    with Image.open(shown.save(tmp_path / "a.png")) as image:
        assert min(image.size) > 200
    assert shown._repr_png_()[:4] == b"\x89PNG"
    with pytest.raises(vitmix.InputError, match=r"ends in one of .*png"):
        shown.save(tmp_path / "a.xyz")
    with pytest.raises(vitmix.InputError, match="cannot write"):
        shown.save(tmp_path / "nowhere" / "a.png")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"classes": ["a"]}, "7 names in `classes`, got 1"),
        ({"samples": [9]}, "from 0 to 5, got"),
        ({"samples": 0}, "at least 1, got 0 and 1"),
        ({"samples": -1}, "at least 1, got -1 and 1"),
        ({"samples": []}, "at least 1"),
        ({"mean": [0.5] * 3}, "got mean alone"),
        ({"std": [0.5] * 3}, "got std alone"),
        ({"draws": 0}, "at least 1, got 3 and 0"),
    ],
)
def test_bad_arguments(options: dict[str, Any], words: str) -> None:
    with pytest.raises(vitmix.InputError, match=words):
        make("cutmix").preview(*batch(), **options)


def test_rows_that_tell_most_come_first() -> None:
    images, labels = batch()
    out = make("cutmix")(images, labels)
    partner = out.trace.pixels.partner
    for row in choose_rows(out.trace, labels, 2):
        assert int(partner[row]) != row


# --- the command


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name in ("ant", "bee", "cat", "dog"):
        pixels = rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


SMALL = ["--model", "cct_2_3x2_32", "--img-size", "16", "--samples", "2", "--device", "cpu",
         "--threads", "1"]  # fmt: skip


@pytest.mark.parametrize("method", ["tokenmixup", "tl-align", "tokenmix", "none"])
def test_preview_of_loose_pictures(
    method: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.png"
    assert (
        main(["preview", *SMALL, "--data", str(photos), "--method", method, "--out", str(out)]) == 0
    )
    said = capsys.readouterr().out
    assert said.endswith(f"preview {out}\n")
    expected = {
        "tokenmixup": "Nothing is trained yet", "tokenmix": "stands in for the teacher",
        "none": "mixes no samples",
    }  # fmt: skip
    assert expected.get(method, "preview") in said
    assert out.stat().st_size > 5000


def test_preview_of_a_run(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run's model, data and method, with its ScoreNet; or another method on top."""
    from vitmix.evaluate.preview import model_with_pictures
    from vitmix.train.checkpoint import read_checkpoint

    train = ["train", "--train-limit", "64", "--img-size", "16", "--batch-size", "32", "--epochs",
             "1", "--threads", "1", "--device", "cpu", "--method", "tokenmixup-h", "--tau",
             "auto:0.5", "--out", str(tmp_path), "--name", "run"]  # fmt: skip
    assert main(train) == 0
    run = str(tmp_path / "run")
    for extra in ([], ["--method", "cutmix"], ["--data", str(photos)]):
        out = tmp_path / "a.png"
        arguments = ["preview", "--checkpoint", run, "--out", str(out), *extra]
        assert main(arguments) == 0, capsys.readouterr().err
        out.unlink()
    assert "labels are the model's predictions" in capsys.readouterr().out
    state = read_checkpoint(tmp_path / "run" / "last.ckpt")["state_dict"]
    own = model_with_pictures({}, run).mixing.state_dict()
    assert all(torch.equal(own[key.removeprefix("mixing.")], value) for key, value in state.items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "nowhere"], "there is no 'nowhere'"),
        (["--samples", "0"], "--samples to be at least 1"),
        (["--method", "cutmux"], "did you mean 'cutmix'"),
        (["--checkpoint", "nowhere"], "there is no nowhere"),
        (["--method", "cutmix", "--out", "nowhere/a.png"], "cannot write nowhere/a.png"),
        (["--method", "cutmix", "--tau", "1"], "a method that uses --tau"),
        (["--model", "resnet50", "--method", "tl-align"], "looked for"),
    ],
)
def test_bad_input_of_the_command(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [] if "--model" in arguments else SMALL[:4]
    assert main(["preview", *small, "--threads", "1", *arguments]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "tau", "rho"),
    [
        ({"method": "tokenmixup"}, math.inf, "auto:0.3"),
        ({"method": "tokenmixup", "tau": 3.0}, 3.0, "auto:0.3"),
        ({"tokens": {"name": "horizontal", "rho": 0.5}}, math.inf, 0.5),
        ({"recipe": "cct7-cifar100-tokenmixup"}, math.inf, "auto:0.3"),
        ({"recipe": "cct7-cifar100-tokenmixup", "rho": 0.25}, math.inf, 0.25),
    ],
)
def test_new_models_mix_unless_told_otherwise(
    options: dict[str, Any], tau: float, rho: float | str
) -> None:
    from vitmix.evaluate.preview import BATCH, model_with_pictures
    from vitmix.train.recipes import settings_under

    small = {"data": "fake", "img_size": 16, "device": "cpu"}
    found = model_with_pictures({**settings_under(options), **options, **small}, None)
    (stage,) = [s for s in found.mixing.tokens if isinstance(s, vitmix.HorizontalTokenMixup)]
    assert (stage.tau, stage.rho) == (tau, rho)
    assert len(found.pictures.images) == BATCH


def test_folders_with_and_without_classes(photos: Path, tmp_path: Path) -> None:
    from vitmix.train.records import read_pictures

    source = read_pictures(photos)
    assert source is not None
    assert source.classes == ("ant", "bee", "cat", "dog")
    assert read_pictures(photos / "ant.png") is None
    (tmp_path / "class").mkdir()
    (photos / "ant.png").rename(tmp_path / "class" / "ant.png")
    assert read_pictures(tmp_path) is None
    (tmp_path / "class" / "ant.png").rename(photos / "ant.png")
