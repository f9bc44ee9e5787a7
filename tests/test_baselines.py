"""What vitmix is measured against computes the same: only then is the comparison fair."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import vitmix
from vitmix.benchmarks.baselines import (
    ExplicitAttention,
    PlainMixing,
    broadcast_gain,
    broadcast_horizontal,
    map_saliency,
    tokens_gradient,
)
from vitmix.benchmarks.horizontal import blob_saliency
from vitmix.functional import apply_horizontal, horizontal_plan, saliency_gain
from vitmix.functional.targets import smooth_targets
from vitmix.gradient import gradient_saliency
from vitmix.models import create_model

CLASSES, BLOCK, RHO = 5, 2, 0.0005


def make(name: str) -> torch.nn.Module:
    """A small model without dropout."""
    torch.manual_seed(0)
    if name == "cct":
        options = {"attention_dropout": 0.0, "stochastic_depth": 0.0}
        return create_model("cct_4_3x2_32", CLASSES, 32, **options)
    return create_model("vit_tiny_patch16_224", CLASSES, 64, embed_dim=32, depth=4, num_heads=2)


def batch(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    side = 32 if name == "cct" else 64
    return torch.randn(6, 3, side, side), torch.arange(6) % CLASSES


def box() -> vitmix.CutMix:
    return vitmix.CutMix(align=True)


def horizontal() -> vitmix.HorizontalTokenMixup:
    return vitmix.HorizontalTokenMixup(BLOCK, tau=float("inf"), rho=RHO)


def vertical() -> vitmix.VerticalTokenMixup:
    return vitmix.VerticalTokenMixup(BLOCK, kappa=3)


METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "cutmix": (lambda: {"mix": box()}, {"mix": box()}),
    "transmix": (
        lambda: {"mix": box(), "labels": vitmix.AttentionLabels()},
        {"mix": box(), "labels": "attention"},
    ),
    "tl-align": (
        lambda: {"mix": box(), "labels": vitmix.TokenAlignedLabels()},
        {"mix": box(), "labels": "aligned"},
    ),
    "horizontal": (lambda: {"tokens": [horizontal()]}, {"horizontal": BLOCK, "rho": RHO}),
    "vertical": (lambda: {"tokens": [vertical()]}, {"vertical": BLOCK, "kappa": 3}),
    "everything": (
        lambda: {
            "mix": box(),
            "labels": vitmix.TokenAlignedLabels(),
            "tokens": [horizontal(), vertical()],
        },
        {"mix": box(), "labels": "aligned", "horizontal": BLOCK, "rho": RHO,
         "vertical": BLOCK, "kappa": 3},
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["cct", "vit"])
def test_baseline_steps_are_those_of_vitmix(name: str, method: str) -> None:
    stages, plain_stages = METHODS[method]
    model = make(name).train()
    plain = PlainMixing(copy.deepcopy(model), CLASSES, **plain_stages)
    mixing = vitmix.MixingModel(model, num_classes=CLASSES, **stages())
    for stage in mixing.tokens:
        scorenet: Any = getattr(stage, "scorenet", None)
        if scorenet is not None and plain.scorenet is not None:
            plain.scorenet.load_state_dict(scorenet.state_dict())
    images, targets = batch(name)
    torch.manual_seed(1)
    out = mixing(images, targets)
    torch.manual_seed(1)
    logits, mixed, auxiliary = plain(images, targets)
    torch.testing.assert_close(logits, out.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(mixed, out.targets, atol=1e-5, rtol=0)
    torch.testing.assert_close(auxiliary, out.aux_loss, atol=1e-5, rtol=0)
    if method != "vertical":
        assert not torch.equal(mixed, smooth_targets(targets, CLASSES))
    out.loss().backward()
    plain.step_loss(images, targets).backward()
    assert all(parameter.grad is not None for parameter in plain.parameters())


def test_baselines_need_a_model_that_they_know() -> None:
    with pytest.raises(vitmix.InputError, match="a CCT for baselines, got timm Swin"):
        PlainMixing(create_model("swin_tiny_patch4_window7_224", CLASSES, 224), CLASSES)


@pytest.mark.parametrize("rho", [0.0, 0.5, 2.0])
def test_broadcast_horizontal_is_that_of_vitmix(rho: float) -> None:
    saliency = blob_saliency(24, 49)
    rho /= 49
    tokens, labels = torch.randn(24, 51, 8), torch.eye(24)
    easy = torch.ones(24, dtype=torch.bool)
    gain = broadcast_gain(saliency, saliency, rho)
    torch.testing.assert_close(saliency_gain(saliency, saliency, rho), gain, atol=1e-6, rtol=0)
    mixed, mixed_labels, partner, kept = broadcast_horizontal(tokens, labels, saliency, rho, 2)
    plan = horizontal_plan(saliency, easy, rho, candidates=partner)
    assert torch.equal(plan.replace, kept == 0)
    expected = apply_horizontal(tokens, labels, plan, num_prefix_tokens=2)
    torch.testing.assert_close((mixed, mixed_labels), expected)
    ours = horizontal_plan(saliency, easy, rho).partner
    rows = torch.arange(24)
    torch.testing.assert_close(gain[rows, ours].sum(), gain[rows, partner].sum())


@pytest.mark.parametrize("name", ["cct", "vit"])
def test_baseline_saliencies_are_those_of_vitmix(name: str) -> None:
    model = make(name).train()
    backbone = vitmix.describe(model)
    block, prefix = backbone.blocks[BLOCK], backbone.num_prefix_tokens
    images, targets = batch(name)
    soft = smooth_targets(targets, CLASSES)
    torch.testing.assert_close(
        tokens_gradient(model, block.module, images, targets, prefix),
        gradient_saliency(model, backbone, BLOCK, images, soft),
        atol=1e-6, rtol=0,
    )  # fmt: skip
    assert all(parameter.grad is None for parameter in model.parameters())
    explicit = ExplicitAttention(block.attention, lambda attention: None)
    tokens = torch.randn(2, prefix + 16, backbone.embed_dim)
    attention = explicit.attention(tokens)
    torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))
    torch.testing.assert_close(
        map_saliency(attention, prefix),
        vitmix.functional.attention_saliency(attention, num_prefix_tokens=prefix),
    )
    torch.testing.assert_close(explicit(tokens), block.attention(tokens), atol=1e-6, rtol=0)
