"""Aligned and attention labels of all plain families against brute force."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vitmix
from contract import horizontal
from models import NUM_CLASSES, batch
from more_models import MORE_FAMILIES, POSITION_BIASED, make_family, unsettle
from recorders import CallRecorder
from test_alignment_models import PIXELS, Recorder, brute_force

pytest.importorskip("timm")
pytest.importorskip("transformers")
pytest.importorskip("torchvision")


@pytest.mark.parametrize("family", MORE_FAMILIES)
@pytest.mark.parametrize(("pixels", "with_tokens"), [("box", False), ("box", True), ("none", True)])
def test_aligned_labels_equal_dense_labels(
    family: str, pixels: str, with_tokens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, options = make_family(family)
    unsettle(model)
    tokens: list[vitmix.TokenStage] = []
    if with_tokens:
        tokens = [horizontal(rho=0.001)]
        if family not in POSITION_BIASED:
            tokens.append(vitmix.VerticalTokenMixup(block=2, kappa=3))
    mixing = vitmix.MixingModel(
        model,
        mix=PIXELS[pixels](),
        labels=vitmix.TokenAlignedLabels(),
        tokens=tokens,
        num_classes=NUM_CLASSES,
        label_smoothing=0.1,
        **options,
    ).train()
    images, targets = batch()
    recorder = record(family, mixing, monkeypatch)
    out = mixing(images, targets)
    recorder.close()
    soft = vitmix.functional.smooth_targets(targets, NUM_CLASSES, 0.1)
    expected = brute_force(mixing, out, recorder, soft)
    torch.testing.assert_close(out.targets, expected, atol=1e-5, rtol=0)
    if pixels != "none":
        area = vitmix.functional.mix_targets(soft, out.trace.pixels.partner, out.trace.pixels.lam)
        assert (out.targets - area).abs().max() > 1e-3


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_attention_labels_equal_explicit_attention(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, options = make_family(family)
    unsettle(model)
    mixing = vitmix.MixingModel(
        model,
        mix=vitmix.TokenMix(),
        labels=vitmix.AttentionLabels(),
        num_classes=NUM_CLASSES,
        **options,
    ).train()
    recorder = record(family, mixing, monkeypatch)
    out = mixing(*batch())
    recorder.close()
    prefix = mixing.backbone.num_prefix_tokens
    last = recorder.attention[mixing.backbone.depth - 1].mean(1)
    row = (
        last[:, 0, prefix:]
        if mixing.backbone.reads_class_token
        else last[:, prefix:, prefix:].mean(1)
    )
    row = row / row.sum(1, keepdim=True)
    own = (row * out.trace.pixels.own.flatten(1)).sum(1)
    torch.testing.assert_close(out.trace.weights[:, 0], own, atol=1e-6, rtol=0)


def record(family: str, mixing: vitmix.MixingModel, patch: pytest.MonkeyPatch) -> Any:
    """The softmax method of a tensor cannot be replaced: that attention from its projections."""
    return Recorder(mixing) if family == "hand-written" else CallRecorder(mixing, patch)
