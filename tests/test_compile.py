"""Compiled models: exact where stages act inside (uncompiled there), and refused outside."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vitmix
from models import FAMILIES, NUM_CLASSES, batch
from test_mixing import METHODS

pytest.importorskip("timm")
ACTING = ["tl-align", "horizontal", "vertical", "everything"]


def build(method: str) -> vitmix.MixingModel:
    torch.manual_seed(0)
    return vitmix.MixingModel(
        FAMILIES["vit"](),
        num_classes=NUM_CLASSES,
        generator=torch.Generator().manual_seed(0),
        **METHODS[method](),
    ).train()


@pytest.mark.parametrize("method", ["none", "cutmix", *ACTING])
@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_model_inside(method: str, whole: bool) -> None:
    images, targets = batch()
    plain, compiled = build(method), build(method)
    model: Any = compiled.model
    for module in [model] if whole else model.blocks:
        module.compile(backend="eager")
    torch.manual_seed(1)
    expected = plain(images, targets)
    for _ in range(2):
        compiled.generator = torch.Generator().manual_seed(0)
        torch.manual_seed(1)
        out = compiled(images, targets)
        torch.testing.assert_close(out.logits, expected.logits)
        assert torch.equal(out.targets, expected.targets)
        out.loss().backward()
        torch.testing.assert_close(compiled.eval()(images), plain.eval()(images))
        compiled.train()
    torch._dynamo.reset()


@pytest.mark.parametrize("method", ACTING)
def test_compiling_the_whole_is_refused(method: str) -> None:
    mixing = build(method)
    compiled: Any = torch.compile(mixing, backend="eager")
    with pytest.raises(vitmix.UnsupportedModelError, match="Compile the model inside"):
        compiled(*batch())
    torch._dynamo.reset()
    assert torch.is_grad_enabled()
    mixing(*batch()).loss().backward()
