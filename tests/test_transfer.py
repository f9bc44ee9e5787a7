"""Training that starts from the weights of another run: fine-tuning and linear probes."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from test_resume import assert_same_run, stop_after
from vitmix.cli import main
from vitmix.errors import InputError
from vitmix.evaluate.study import read_study
from vitmix.models import create_model
from vitmix.train.checkpoint import load_trained, read_checkpoint
from vitmix.train.config import TrainConfig
from vitmix.train.optimiser import parameter_groups
from vitmix.train.provenance import fingerprint
from vitmix.train.run import Interrupted, train_run
from vitmix.train.stages import build_mixing
from vitmix.train.transfer import Start, freeze_backbone, load_start, read_start, with_model
from vitmix.weights import backbone_of

VIT = {"embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 8}


def small(out: Path, **changes: Any) -> TrainConfig:
    """Two steps on 16 x 16 digits, or on random images."""
    settings: dict[str, Any] = {
        "train_limit": 64, "img_size": 16, "batch_size": 32, "epochs": 1, "threads": 1,
        "out": str(out), "device": "cpu", "crop_padding": 1, "image_epochs": 0,
    }  # fmt: skip
    return TrainConfig(**(settings | changes))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_trained(folder).model.state_dict()


@pytest.fixture(scope="module")
def cct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on digits that has averaged weights."""
    out = tmp_path_factory.mktemp("cct")
    return train_run(
        small(out, name="run", model_ema=True, method="tokenmixup", mean=[0.4] * 3, std=[0.3] * 3),
        verbose=False,
    ).folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vit")
    config = small(out, name="run", model="vit_tiny_patch16_224", model_kwargs=VIT)
    return train_run(config, verbose=False).folder


# --- what is taken


@pytest.mark.parametrize("source", ["run", "run/best.ckpt", "file.safetensors", "file.pt"])
def test_sources(cct: Path, tmp_path: Path, source: str) -> None:
    """A run, its checkpoint and its exported file are the same start; all give averaged weights."""
    path = {
        "run": cct, "run/best.ckpt": cct / "best.ckpt",
        "file.safetensors": tmp_path / "w.safetensors",
        "file.pt": tmp_path / "w.pt",
    }[source]  # fmt: skip
    expected = weights(cct)
    raw = read_checkpoint(cct / "last.ckpt")["state_dict"]
    assert not torch.equal(
        raw["mixing.model.classifier.fc.weight"], expected["classifier.fc.weight"]
    )
    if source == "file.safetensors":
        assert main(["export", str(cct), str(path)]) == 0
    if source == "file.pt":
        torch.save({"model": expected}, path)
    start = read_start(path)
    assert start.state.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in start.state.items())
    if source == "file.pt":
        assert start.origin == {}
    else:
        assert start.origin == read_start(cct).origin
        assert start.origin["model"] == "cct_2_3x2_32"
        assert start.origin["mean"] == pytest.approx([0.4] * 3)
        assert len(start.origin["classes"]) == 10


FAMILIES: dict[str, tuple[str, int, int, dict[str, Any], str]] = {
    # name, side before and now, arguments, a tensor that is resampled
    "cct": ("cct_2_3x2_32", 16, 32, {}, "classifier.positional_emb"),
    "cct-sine": ("cct_2_3x2_32_sine", 16, 32, {}, "classifier.positional_emb"),
    "vit": ("vit_tiny_patch16_224", 16, 32, VIT, "pos_embed"),
    "deit": ("deit_tiny_distilled_patch16_224", 16, 32, VIT | {"num_heads": 3}, "pos_embed"),
    "beit": (
        "beit_base_patch16_224", 16, 32, VIT | {"embed_dim": 24},
        "blocks.0.attn.relative_position_bias_table",
    ),
    "swin": (
        "swin_tiny_patch4_window7_224", 32, 64,
        {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)},
        "layers.1.blocks.0.attn.relative_position_bias_table",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_other_classes_and_image_size(family: str) -> None:
    """The classifier stays as it was made, positions are resampled, the rest is taken as it is."""
    name, before, now, options, position = FAMILIES[family]
    torch.manual_seed(1)
    old = create_model(name, num_classes=10, img_size=before, **options)
    for value in old.parameters():
        nn.init.normal_(value) if value.requires_grad else None
    model = create_model(name, num_classes=7, img_size=now, **options)
    made = {key: value.clone() for key, value in model.state_dict().items()}
    report = load_start(model, Start(Path("w.pt"), old.state_dict(), {}), [""] * 7)
    head = {key for key in made if key not in backbone_of(model).state_dict()}
    assert set(report["new"]) == head
    assert any(entry.startswith(position + " ") for entry in report["resampled"])
    changed = {entry.split()[0] for entry in report["resampled"]}
    for key, value in model.state_dict().items():
        if key in head:
            assert torch.equal(value, made[key])
        elif key in changed:
            assert value.shape == made[key].shape != old.state_dict()[key].shape
            assert torch.equal(value, made[key]) == (family == "cct-sine")
        else:
            assert torch.equal(value, old.state_dict()[key])
    assert model.eval()(torch.rand(2, 3, now, now)).shape == (2, 7)


@pytest.mark.parametrize(
    ("told", "classes", "taken"),
    [(None, "abc", True), (None, "abcd", False), ("abc", "abc", True), ("abc", "abd", False)],
)
def test_the_classifier_is_taken_for_the_same_classes(
    told: str | None, classes: str, taken: bool
) -> None:
    old = create_model("cct_2_3x2_32", num_classes=3, img_size=16)
    model = create_model("cct_2_3x2_32", num_classes=len(classes), img_size=16)
    origin = {} if told is None else {"classes": list(told)}
    report = load_start(model, Start(Path("w.pt"), old.state_dict(), origin), list(classes))
    assert report["new"] == ([] if taken else ["classifier.fc.weight", "classifier.fc.bias"])
    assert report["taken"] == len(old.state_dict()) - len(report["new"])
    assert report["weights"] == fingerprint(old.state_dict().values())
    if taken:
        assert torch.equal(model.classifier.fc.weight, old.classifier.fc.weight)  # type: ignore[union-attr]


def test_a_backbone_without_a_classifier_is_enough() -> None:
    old = create_model("vit_tiny_patch16_224", num_classes=0, img_size=16, **VIT)
    model = create_model("vit_tiny_patch16_224", num_classes=3, img_size=16, **VIT)
    report = load_start(model, Start(Path("w.pt"), old.state_dict(), {}), "abc")
    assert report["new"] == ["head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 2}, r"with unknown blocks\.2\.norm1\.weight.* and 7 more"),
        ({"depth": 4}, r"without blocks\.3\.norm1\.weight"),
        ({"embed_dim": 48}, r"with cls_token 1x1x24 for 1x1x48"),
        ({"init_values": 0.1}, r"without blocks\.0\.ls1\.gamma"),
    ],
)
def test_weights_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    old = create_model("vit_tiny_patch16_224", num_classes=3, img_size=16, **VIT)
    model = create_model("vit_tiny_patch16_224", num_classes=3, img_size=16, **(VIT | changes))
    made = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        load_start(model, Start(Path("w.pt"), old.state_dict(), {}), "abc")
    assert all(torch.equal(value, made[key]) for key, value in model.state_dict().items())


def test_sizes_that_timm_does_not_resample() -> None:
    old = create_model("cait_xxs24_224", num_classes=3, img_size=32, depth=1)
    model = create_model("cait_xxs24_224", num_classes=3, img_size=64, depth=1)
    origin = {"model": "cait_xxs24_224", "img_size": 32}
    with pytest.raises(InputError, match=r"32 pixels with pos_embed 1x4x192 for 1x16x192; give"):
        load_start(model, Start(Path("w.pt"), old.state_dict(), origin), "abc")


def test_weights_as_training_programs_wrap_them(tmp_path: Path) -> None:
    old = create_model("vit_tiny_patch16_224", num_classes=3, img_size=16, **VIT)
    state = {f"module.{key}": value for key, value in old.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "checkpoint.pth.tar")
    start = read_start(tmp_path / "checkpoint.pth.tar")
    model = create_model("vit_tiny_patch16_224", num_classes=3, img_size=16, **VIT)
    assert load_start(model, start, "abc")["new"] == []


# --- settings


def test_the_model_is_that_of_the_weights(cct: Path, vit: Path, tmp_path: Path) -> None:
    start = {"init": str(vit)}
    known = {"model": "vit_tiny_patch16_224", "model_kwargs": VIT}
    assert with_model({"lr": 1.0}) == {"lr": 1.0}
    assert with_model({"init": str(cct)}) == {
        "init": str(cct), "model": "cct_2_3x2_32", "model_kwargs": None,
    }  # fmt: skip
    assert with_model(start) == start | known
    assert with_model(start | {"model": known["model"]}) == start | known
    for chosen in ({"model": "cct_2_3x2_32"}, known | {"model_kwargs": {"depth": 2}}):
        assert with_model(start | chosen) == start | chosen
    assert with_model(start | {"model_kwargs": {}}) == start | known | {"model_kwargs": {}}
    file = tmp_path / "study.yaml"
    file.write_text(f"settings: {{init: {vit}, data: digits}}\ncells: {{a: {{}}, b: {{lr: 0.1}}}}")
    cells = read_study(str(file)).cells
    assert [cell.config.model_kwargs for cell in cells] == [VIT, VIT]
    torch.save({"weight": torch.zeros(1)}, tmp_path / "bare.pt")
    with pytest.raises(InputError, match="expected --model beside --init"):
        with_model({"init": str(tmp_path / "bare.pt")})


BAD = [
    (["--init", "nowhere"], "there is no nowhere"),
    (["--init", "{run}", "--pretrained"], "either --init or --pretrained"),
    (
        ["--init", "{run}", "--model", "cct_4_3x2_32"],
        "weights of cct_2_3x2_32 for 16 pixels without classifier",
    ),
    (["--linear-probe"], "--init or --pretrained, with --linear-probe"),
    (["--init", "{run}", "--linear-probe", "--layer-decay", "0.7"], "no --layer-decay with"),
    (["--init", "{run}", "--linear-probe", "--method", "tokenmixup"], "without token stages"),
    (["--init", "{features}"], "got those of a feature extractor"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_line_and_status_2(
    cct: Path, vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    features = tmp_path / "features.safetensors"
    if "{features}" in arguments:
        assert main(["export", str(vit), str(features), "--part", "features"]) == 0
    words = [word.format(run=cct, features=features) for word in arguments]
    common = ["--data", "fake:3x16x16", "--device", "cpu", "--out", str(tmp_path / "runs")]
    assert main(["train", *common, *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "runs").exists()


# --- runs


@pytest.mark.filterwarnings("ignore")
def test_fine_tuning_from_the_command_line(
    cct: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The console and results.json say what was taken; the images are normalised as before."""
    assert main([
        "train", "--init", str(cct), "--data", "fake:3x32x32", "--epochs", "1", "--threads", "1",
        "--batch-size", "16", "--device", "cpu", "--out", str(tmp_path), "--name", "tuned",
        "--method", "cutmix",
    ]) == 0  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("init "))
    taken = len(weights(cct)) - 2
    assert lines[at].endswith(f"last.ckpt: {taken} tensors taken")
    assert lines[at + 1].split() == ["new:", "classifier.fc.weight,", "classifier.fc.bias"]
    assert lines[at + 2].endswith("classifier.positional_emb 1x16x128 to 1x64x128")
    results = json.loads((tmp_path / "tuned" / "results.json").read_text())
    assert results["config"]["init"] == str(cct)
    found = results["init"]
    assert found["path"] == str(cct / "last.ckpt")
    assert found["weights"] == fingerprint(weights(cct).values())
    assert (found["model"], found["data"]) == ("cct_2_3x2_32", "digits")
    assert found["commit"] == read_checkpoint(cct / "last.ckpt")["vitmix"]["commit"]
    tuned = load_trained(tmp_path / "tuned")
    assert tuned.mean == pytest.approx((0.4,) * 3)
    assert tuned.std == pytest.approx((0.3,) * 3)
    assert main(["evaluate", str(tmp_path / "tuned")]) == 0


def test_the_users_normalisation_comes_first(cct: Path, tmp_path: Path) -> None:
    config = small(tmp_path, init=str(cct), mean=[0.1] * 3, max_steps=1)
    found = load_trained(train_run(config, verbose=False).folder)
    assert found.mean == pytest.approx((0.1,) * 3)
    assert found.std == pytest.approx((0.3,) * 3)


def test_weights_that_do_not_tell_are_normalised_as_timm_does(vit: Path, tmp_path: Path) -> None:
    torch.save(weights(vit), tmp_path / "w.pt")
    config = small(
        tmp_path, init=str(tmp_path / "w.pt"), model="vit_tiny_patch16_224", model_kwargs=VIT,
        max_steps=1,
    )  # fmt: skip
    assert load_trained(train_run(config, verbose=False).folder).mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("model", ["cct", "vit", "levit"])
def test_a_probe_leaves_the_backbone_as_it_is(
    model: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Bit for bit, norm statistics and averaged weights included; the classifier learns."""
    if model == "levit":  # has batch norms
        config = small(
            tmp_path, name="run", img_size=64, data="fake:3x64x16", model="levit_128s",
            batch_size=8, train_limit=None, max_steps=1,
        )  # fmt: skip
        start = train_run(config, verbose=False).folder
        changes = {"img_size": 64, "data": "fake:4x64x16", "batch_size": 8, "epochs": 2}
    else:
        start, changes = request.getfixturevalue(model), {"method": "tl-align"}
    trained = load_trained(start)
    before = trained.model.state_dict()
    run = train_run(
        small(
            tmp_path, name="probe", init=str(start), linear_probe=True, model_ema=True,
            model=trained.config.model, model_kwargs=trained.config.model_kwargs, **changes,
        ),
        verbose=False,
    )  # fmt: skip
    saved = read_checkpoint(run.folder / "last.ckpt")
    kept = backbone_of(trained.model).state_dict().keys()
    learning = [
        name for name, value in run.task.mixing.model.named_parameters() if value.requires_grad
    ]
    assert learning
    assert not set(learning) & kept
    for states in (
        {key.removeprefix("mixing.model."): v for key, v in saved["state_dict"].items()},
        saved["vitmix"]["averaged"],
    ):
        assert all(torch.equal(states[name], before[name]) for name in kept)
        assert any(
            states[name].shape != before[name].shape or not torch.equal(states[name], before[name])
            for name in learning
        )
    held = sum(len(group["params"]) for group in saved["optimizer_states"][0]["param_groups"])
    assert held == len(learning) == len(saved["optimizer_states"][0]["state"])


def test_a_probe_drops_nothing_out() -> None:
    """Dropout and drop path of the backbone are off in a training step."""
    model = create_model(
        "vit_tiny_patch16_224", num_classes=3, img_size=16, drop_path_rate=0.5, **VIT
    )
    mixing = build_mixing(model, TrainConfig(), num_classes=3, img_size=16).train()
    freeze_backbone(model)
    images, labels = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    first, second = (mixing(images, labels).logits for _ in range(2))
    assert torch.equal(first, second)
    groups = parameter_groups(mixing, TrainConfig())
    assert [len(group["params"]) for group in groups] == [1, 1]


def test_layers_learn_at_their_own_rate_from_weights(vit: Path, tmp_path: Path) -> None:
    config = small(
        tmp_path, init=str(vit), model="vit_tiny_patch16_224", model_kwargs=VIT, layer_decay=0.5,
        max_steps=1,
    )  # fmt: skip
    run = train_run(config, verbose=False)
    rates = [group["lr"] for group in run.task.trainer.optimizers[0].param_groups]
    assert max(rates) > 4 * min(rates)


@pytest.mark.parametrize("probe", [False, True])
def test_a_stopped_run_goes_on_without_what_it_began_with(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probe: bool
) -> None:
    start = tmp_path / "start"
    shutil.copytree(vit, start)

    def config(name: str) -> TrainConfig:
        return small(
            tmp_path, name=name, init=str(start), model="vit_tiny_patch16_224", epochs=2,
            model_kwargs=VIT | {"drop_path_rate": 0.2}, linear_probe=probe, method="cutmix",
            checkpoint_steps=1, data="fake:4x16x64", model_ema=True,
        )  # fmt: skip

    train_run(config("alone"), verbose=False)
    with monkeypatch.context() as patch:
        stop_after(patch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Interrupted):
            train_run(config("run"), verbose=False)
    shutil.rmtree(start)
    run = train_run(config("run"), resume=tmp_path / "run", verbose=False)
    assert_same_run(tmp_path / "alone", tmp_path / "run")
    assert run.results["init"]["path"] == str(start / "last.ckpt")
