"""Gradient checkpointing gives the gradients of a step that keeps its activations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import vitmix
from contract import METHODS, hooks
from models import NUM_CLASSES, batch, make_vit

pytest.importorskip("timm")


def build(method: str, checkpointed: bool, **options: Any) -> vitmix.MixingModel:
    torch.manual_seed(0)
    model: Any = make_vit(drop_path_rate=0.3, proj_drop_rate=0.1, **options)
    model.set_grad_checkpointing(checkpointed)
    return vitmix.MixingModel(
        model,
        num_classes=NUM_CLASSES,
        generator=torch.Generator().manual_seed(0),
        **METHODS[method](),
    ).train()


def gradients(mixing: vitmix.MixingModel) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in mixing.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", METHODS)
def test_gradients_equal_those_without(method: str) -> None:
    images, targets = batch()
    found = []
    for checkpointed in (False, True):
        mixing = build(method, checkpointed)
        torch.manual_seed(1)
        out = mixing(images, targets)
        out.loss().backward()
        assert hooks(mixing.model) == 0
        found.append((out, gradients(mixing)))
    (plain, expected), (again, observed) = found
    assert torch.equal(plain.logits, again.logits)
    torch.testing.assert_close(plain.targets, again.targets, atol=1e-6, rtol=0)
    assert expected.keys() == observed.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(observed[name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["horizontal", "vertical", "tl-align", "horizontal-rollout"])
def test_two_steps_before_their_backward(method: str) -> None:
    """Each second pass finds the plans of its own first pass."""
    batches = [batch(6, 1), batch(6, 2)]
    expected = build(method, False)
    observed = build(method, True)
    for mixing in (expected, observed):
        torch.manual_seed(1)
        outs = [mixing(*each) for each in batches]
        for out in outs:
            out.loss().backward()
        assert hooks(mixing.model) == 0
    for name, gradient in gradients(expected).items():
        torch.testing.assert_close(gradients(observed)[name], gradient, atol=1e-6, rtol=1e-5)


def test_segments_of_several_blocks() -> None:
    from timm.models import checkpoint_seq

    class InPairs(torch.nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint_seq(list(self.children()), x, every=2)

    images, targets = batch()
    found = []
    for paired in (False, True):
        mixing = build("horizontal", False)
        if paired:
            model: Any = mixing.model
            model.blocks = InPairs(*model.blocks)
            object.__setattr__(mixing.backbone, "recomputes", lambda: True)
        torch.manual_seed(1)
        mixing(images, targets).loss().backward()
        found.append(gradients(mixing))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-5)


def test_a_frozen_embedding() -> None:
    images, targets = batch()
    found = []
    for checkpointed in (False, True):
        mixing = build("horizontal", checkpointed)
        model: Any = mixing.model
        for parameter in (*model.patch_embed.parameters(), model.cls_token, model.pos_embed):
            parameter.requires_grad_(False)
        torch.manual_seed(1)
        mixing(images, targets).loss().backward()
        assert hooks(mixing.model) == 0
        found.append(gradients(mixing))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-5)


def test_a_step_that_is_thrown_away_leaves_nothing() -> None:
    images, targets = batch()
    mixing = build("horizontal", True)
    mixing(images, targets)  # its graph is gone at once
    out = mixing(images, targets)
    out.loss().backward()
    assert hooks(mixing.model) == 0
    kept = mixing(images, targets)
    assert hooks(mixing.model) > 0
    mixing.detach()
    assert hooks(mixing.model) == 0
    assert math.isfinite(float(kept.loss().detach()))


def test_the_reentrant_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.checkpoint import checkpoint

    mixing = build("horizontal", True)
    model: Any = mixing.model

    def reentrant(blocks: Any, x: torch.Tensor) -> torch.Tensor:
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=True)
        return x

    monkeypatch.setattr("timm.models.vision_transformer.checkpoint_seq", reentrant)
    with pytest.raises(vitmix.UnsupportedModelError, match="use_reentrant=False"):
        mixing(*batch())
    assert hooks(model) == 0
