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
from vitmix.models import load_released

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
