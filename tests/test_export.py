"""Exported weights: other programs load them where vitmix cannot be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vitmix
from models import NUM_CLASSES, SIZE, batch, make_cct
from more_models import make_family, unsettle
from vitmix.cli import main
from vitmix.models import load_released
from vitmix.train.config import TrainConfig
from vitmix.train.run import train_run

timm = pytest.importorskip("timm")
safetensors = pytest.importorskip("safetensors.torch")

WITHOUT_VITMIX = """
import json, sys
sys.modules["vitmix"] = None  # any import of it fails
import torch
path, images, out, options = sys.argv[1:]
options = json.loads(options)
if options:
    import timm
    model = timm.create_model(checkpoint_path=path, **options)
else:
    from transformers import AutoModelForImageClassification
    model = AutoModelForImageClassification.from_pretrained(path)
with torch.no_grad():
    logits = model.eval()(torch.load(images, weights_only=True))
torch.save(getattr(logits, "logits", logits), out)
assert not any(name.startswith("vitmix.") for name in sys.modules)
"""

TIMM_NAMES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 8},
    "deit_tiny_distilled_patch16_224": {"embed_dim": 24, "depth": 3, "patch_size": 8},
    "eva02_tiny_patch14_224": {"embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 8},
}


def trained(model: nn.Module, **options: Any) -> vitmix.MixingModel:
    """A mixing model after two steps of training."""
    unsettle(model)
    mixing = vitmix.MixingModel(
        model,
        mix=vitmix.CutMix(),
        tokens=[vitmix.HorizontalTokenMixup(block=1)],
        num_classes=NUM_CLASSES,
        **options,
    ).train()
    optimiser = torch.optim.SGD(mixing.parameters(), lr=0.01)
    for step in range(2):
        mixing(*batch(4, step)).loss().backward()
        optimiser.step()
    return mixing.eval()


def load_elsewhere(path: Path, folder: Path, options: dict[str, Any]) -> torch.Tensor:
    images, _ = batch(3)
    torch.save(images, folder / "images.pt")
    arguments = [str(path), str(folder / "images.pt"), str(folder / "out.pt"), json.dumps(options)]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_VITMIX, *arguments],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: torch.Tensor = torch.load(folder / "out.pt", weights_only=True)
    return found


@pytest.mark.parametrize("name", TIMM_NAMES)
def test_timm_loads_the_file(tmp_path: Path, name: str) -> None:
    options = {"img_size": SIZE, "num_classes": NUM_CLASSES, **TIMM_NAMES[name]}
    mixing = trained(timm.create_model(name, **options))
    path = mixing.export(tmp_path / "weights.safetensors")
    assert [entry.name for entry in tmp_path.iterdir()] == ["weights.safetensors"]
    with torch.no_grad():
        expected = mixing(batch(3)[0])
    found = load_elsewhere(path, tmp_path, {"model_name": name, **options})
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["hf-vit", "hf-beit-no-bias"])
def test_transformers_loads_the_folder(tmp_path: Path, family: str) -> None:
    pytest.importorskip("transformers")
    mixing = trained(make_family(family)[0])
    path = mixing.export(tmp_path / "exported")
    with torch.no_grad():
        expected = mixing(batch(3)[0]).logits
    found = load_elsewhere(path, tmp_path, {})
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["torchvision", "hf-vit", "hand-written", "beit"])
def test_a_file_of_any_model(tmp_path: Path, family: str) -> None:
    """The file holds what `state_dict()` holds, no more."""
    model, options = make_family(family)
    mixing = trained(model, **options)
    found = safetensors.load_file(mixing.export(str(tmp_path / "weights.safetensors")))
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_cct_takes_its_own_file_back(tmp_path: Path) -> None:
    mixing, other = trained(make_cct()), make_cct().eval()
    path = mixing.export(tmp_path / "weights.safetensors")
    assert load_released(other, path).left_out == ()
    images, _ = batch(3)
    assert torch.equal(mixing(images), other(images))


@pytest.mark.parametrize(
    "name", [*TIMM_NAMES, "swin_tiny_patch4_window7_224", "pvt_v2_b0", "levit_128s"]
)
def test_backbone_without_its_classifier(tmp_path: Path, name: str) -> None:
    """timm's checked loading takes the file where there are no classes."""
    options = TIMM_NAMES.get(name, {})
    options = options and {"img_size": SIZE, **options}
    model = timm.create_model(name, num_classes=NUM_CLASSES, **options)
    unsettle(model)
    mixing = vitmix.MixingModel(model, num_classes=NUM_CLASSES)
    path = mixing.export(tmp_path / "backbone.safetensors", head=False)
    assert mixing.model is model
    found = timm.create_model(name, num_classes=0, checkpoint_path=path, **options)
    expected = model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in found.state_dict().items())
    left_out = expected.keys() - found.state_dict().keys()
    assert left_out
    assert all(key.startswith("head") for key in left_out)


def test_cct_without_its_classifier(tmp_path: Path) -> None:
    mixing = trained(make_cct())
    path = mixing.export(tmp_path / "backbone.safetensors", head=False)
    other = make_cct()
    other.reset_classifier(0)  # type: ignore[operator]
    other.eval().load_state_dict(safetensors.load_file(path))
    images, _ = batch(3)
    model: Any = mixing.model
    pooled = model.classifier.pool(model.forward_features(images))
    assert torch.equal(other(images), pooled)
    assert torch.equal(model.classifier.fc(pooled), mixing(images))


SMALL: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"embed_dim": 24, "depth": 4, "num_heads": 2, "patch_size": 8},
    "swin_tiny_patch4_window7_224": {
        "embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_parts_of_a_run(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Both kinds of feature backbones of timm load their file, and see the same."""
    config = TrainConfig(
        data="fake:3x32x8", model=name, model_kwargs=SMALL[name], max_steps=1, epochs=1,
        batch_size=4, threads=1, device="cpu", out=str(tmp_path), name="run", image_epochs=0,
    )  # fmt: skip
    run = str(train_run(config, verbose=False).folder)
    for part in ("all", "backbone", "features"):
        path = tmp_path / f"{part}.safetensors"
        assert main(["export", run, str(path), "--part", part]) == 0
    assert f"{name} (features), 3 classes, 32 pixels" in capsys.readouterr().out
    options: dict[str, Any] = {"img_size": 32, **SMALL[name]}

    def load(part: str, **more: Any) -> Any:
        path = tmp_path / f"{part}.safetensors"
        return timm.create_model(name, checkpoint_path=path, **options, **more).eval()

    images = torch.rand(2, 3, 32, 32)
    plain, backbone = load("all", num_classes=3), load("backbone", num_classes=0)
    features = load("features", features_only=True)
    with torch.no_grad():
        tokens = plain.forward_features(images)
        assert torch.equal(backbone.forward_features(images), tokens)
        levels = backbone.forward_intermediates(images, intermediates_only=True)
        last = features(images)[-1]
    if last.shape != levels[-1].shape:
        last = last.permute(0, 3, 1, 2)  # Swin's are channels last
    assert torch.equal(last, levels[-1])


def test_parts_that_are_not_there(tmp_path: Path) -> None:
    config = TrainConfig(
        data="fake:3x16x8", max_steps=1, epochs=1, batch_size=4, threads=1, device="cpu",
        out=str(tmp_path), name="run", image_epochs=0,
    )  # fmt: skip
    train_run(config, verbose=False)
    path = tmp_path / "features.safetensors"
    assert main(["export", str(tmp_path / "run"), str(path), "--part", "features"]) == 2
    assert not path.exists()
    pytest.importorskip("transformers")
    mixing = vitmix.MixingModel(make_family("hf-vit")[0], num_classes=NUM_CLASSES)
    with pytest.raises(vitmix.UnsupportedModelError, match="reset_classifier"):
        mixing.export(tmp_path / "weights.safetensors", head=False)


def test_shared_and_strided_weights(tmp_path: Path) -> None:
    """Both names of a shared weight are written, and layouts don't matter."""
    model = make_cct().to(memory_format=torch.channels_last)
    blocks: Any = model.classifier.blocks  # type: ignore[union-attr]
    blocks[1].linear1.weight = blocks[0].linear1.weight
    path = trained(model).export(tmp_path / "weights.safetensors")
    found = safetensors.load_file(path)
    assert found.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(found[name], value)


class WithState(nn.Linear):
    """Keeps more than tensors in its state, as quantised layers do."""

    def get_extra_state(self) -> str:
        return "int8"


def test_states_that_are_no_tensors_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(WithState(3, 2))
    with pytest.raises(vitmix.InputError, match=r"under 0\._extra_state"):
        vitmix.weights.write_weights(model, tmp_path / "w.safetensors")
    assert not list(tmp_path.iterdir())


def test_paths_that_do_not_fit(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    cct = vitmix.MixingModel(make_cct(), num_classes=NUM_CLASSES)
    with pytest.raises(vitmix.InputError, match=r"\.safetensors for a CCT"):
        cct.export(tmp_path / "folder")
    with pytest.raises(vitmix.InputError, match="there is no"):
        cct.export(tmp_path / "absent" / "weights.safetensors")
    (tmp_path / "file").write_text("")
    vit = vitmix.MixingModel(make_family("hf-vit")[0], num_classes=NUM_CLASSES)
    with pytest.raises(vitmix.InputError, match="is a file"):
        vit.export(tmp_path / "file")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
