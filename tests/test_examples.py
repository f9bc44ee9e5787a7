"""The examples run as they are written, for a few steps."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitmix.cli import main

EXAMPLES = Path(__file__).parent.parent / "examples"
LOOPS = ["plain_pytorch", "home_made", "lightning_module", "huggingface_trainer", "timm_script"]


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.filterwarnings("ignore")
def test_loops_train(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip({"huggingface_trainer": "accelerate"}.get(name, "lightning"))
    monkeypatch.chdir(tmp_path)
    assert 0.0 <= load(name, monkeypatch)["main"](1, 3) <= 1.0


@pytest.mark.filterwarnings("ignore")
def test_segmentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that it makes itself, and with the backbone of a run, images and masks given."""
    monkeypatch.chdir(tmp_path)
    example = load("segmentation", monkeypatch)
    assert all(0.0 <= found <= 1.0 for found in example["main"](2, 2))
    with pytest.raises(SystemExit, match="export RUN FILE --part backbone"):
        example["main"](2, 2, weights=Path("backbone.safetensors"))
    for folder in ("images", "masks"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for number in range(10):
        picture = np.full((20, 20, 3), 40 + 150 * (number % 2), np.uint8)
        Image.fromarray(picture).save(tmp_path / "data" / "images" / f"{number}.png")
        mask = np.where(np.eye(20) > 0, 255, number % 2).astype(np.uint8)
        Image.fromarray(mask).save(tmp_path / "data" / "masks" / f"{number}.png")
    options = ["--data", "fake:3x16x16", "--model", "vit_tiny_patch16_224", "--epochs", "1"]
    options += ["--model-kwargs", "{depth: 2, embed_dim: 24, num_heads: 2, patch_size: 8}"]
    assert main(["train", *options, "--device", "cpu", "--name", "run"]) == 0
    assert main(["export", "runs/run", "run.safetensors", "--part", "backbone"]) == 0
    found = example["main"](100, 0, weights=Path("run.safetensors"), data=tmp_path / "data")
    assert found[0] > 0.9
