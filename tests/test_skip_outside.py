"""Blocks that are no more than an attention branch: what goes in is added outside of them."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch

import vitmix
from home_made import FromPairs
from models import NUM_CLASSES, SIZE, batch
from test_mixing import METHODS, hooks, horizontal

pytest.importorskip("timm")
pytest.importorskip("vit_pytorch")


def whole(layer: Any) -> vitmix.Block:
    return vitmix.Block(layer, layer.attend.norm, layer.attend.attention)


def branch(layer: Any) -> vitmix.Block:
    part = layer.attend
    return vitmix.Block(part, part.norm, part.attention, skip_outside=True)


def build(block: Any, method: str, checkpointed: bool = False) -> vitmix.MixingModel:
    torch.manual_seed(0)
    model = FromPairs(SIZE, 8, 32, 4, NUM_CLASSES)
    model.checkpointing = checkpointed
    return vitmix.MixingModel(
        model,
        num_classes=NUM_CLASSES,
        generator=torch.Generator().manual_seed(0),
        backbone=vitmix.describe(
            model,
            blocks=[block(layer) for layer in model.layers],
            grid=(SIZE // 8, SIZE // 8),
            embed_dim=32,
            recomputes=partial(getattr, model, "checkpointing"),
        ),
        **METHODS[method](),
    ).train()


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "horizontal-rollout"])
def test_a_branch_gives_what_the_whole_block_gives(method: str, checkpointed: bool) -> None:
    images, targets = batch()
    expected, observed = build(whole, method), build(branch, method, checkpointed)
    outs = []
    for mixing in (expected, observed):
        outs.append(mixing(images, targets))
        outs[-1].loss().backward()
        assert hooks(mixing.model) == 0
    torch.testing.assert_close(outs[1].logits, outs[0].logits)
    torch.testing.assert_close(outs[1].targets, outs[0].targets)
    for (name, found), parameter in zip(
        observed.named_parameters(), expected.parameters(), strict=True
    ):
        torch.testing.assert_close(found.grad, parameter.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_a_frozen_branch_in_a_checkpoint_that_is_trained() -> None:
    """A second pass comes although no block has a graph."""
    found = []
    for checkpointed in (False, True):
        mixing = build(branch, "manifold", checkpointed)
        model: Any = mixing.model
        model.requires_grad_(False)
        model.layers[-1].mlp.requires_grad_(True)
        mixing.tokens[0].block = (len(model.layers) - 1,)
        mixing(*batch()).loss().backward()
        assert hooks(model) == 0
        found.append([parameter.grad for parameter in model.layers[-1].mlp.parameters()])
    for expected, observed in zip(*found, strict=True):
        torch.testing.assert_close(observed, expected, atol=1e-6, rtol=1e-5)


def test_logits_of_a_manual_pass() -> None:
    from vit_pytorch import ViT

    torch.manual_seed(0)
    model: Any = ViT(
        image_size=SIZE,
        patch_size=8,
        num_classes=NUM_CLASSES,
        dim=32,
        depth=4,
        heads=2,
        mlp_dim=64,
    )
    tokens = [horizontal(tau=math.inf), vitmix.ManifoldMixup(block=2)]
    mixing = vitmix.MixingModel(model, tokens=tokens, num_classes=NUM_CLASSES).train()
    images, targets = batch()
    out = mixing(images, targets)
    x = model.to_patch_embedding(images)
    x = torch.cat((model.cls_token.expand(len(x), -1, -1), x), 1) + model.pos_embedding
    for index, (attention, mlp) in enumerate(model.transformer.layers):
        if index == 1:
            plan = out.trace.horizontal[1]
            assert plan.replace.any()
            replace = torch.nn.functional.pad(plan.replace, (1, 0))[..., None]
            x = torch.where(replace, x[plan.partner], x)
        if index == 2:
            blend = out.trace.blended[2]
            weight = blend.own_weight[:, None, None]
            x = weight * x + (1 - weight) * x[blend.partner]
        x = attention(x) + x
        x = mlp(x) + x
    logits = model.mlp_head(model.transformer.norm(x)[:, 0])
    torch.testing.assert_close(out.logits, logits)


def test_rollout_is_refused() -> None:
    with pytest.raises(vitmix.UnsupportedModelError, match="looked for whole blocks"):
        build(branch, "horizontal-rollout")
