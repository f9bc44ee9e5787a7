"""Labels that follow attention are those of the area where every token attends to itself alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vitmix
import vitmix.flow
from models import FAMILIES, NUM_CLASSES, batch
from more_models import MORE_FAMILIES, make_family
from staged_models import STAGED, images_for

pytest.importorskip("timm")
pytest.importorskip("transformers")
pytest.importorskip("torchvision")

# Poolings that weight all tokens alike, or read a class token.
EVEN = ("class_token", "distilled", "average", "average_all", "class_and_average")


def make(family: str) -> tuple[vitmix.MixingModel, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    options: dict[str, Any] = {}
    if family in FAMILIES:
        model, (images, targets) = FAMILIES[family](), batch()
    elif family in MORE_FAMILIES:
        (model, options), (images, targets) = make_family(family), batch()
    else:
        model, (images, targets) = STAGED[family].make(), images_for(family)
    mixing = vitmix.MixingModel(
        model,
        mix=vitmix.CutMix(draw="element"),
        labels=vitmix.TokenAlignedLabels(),
        num_classes=NUM_CLASSES,
        generator=torch.Generator().manual_seed(0),
        **options,
    )
    return mixing.train(), images, targets


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES, *STAGED])
def test_identity_attention_gives_the_area(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mixing, images, targets = make(family)
    backbone = mixing.backbone
    first = backbone.grid((images.shape[2], images.shape[3]))
    reaches = [
        backbone.reach(index, backbone.block_grid(index, first)) for index in range(backbone.depth)
    ]
    if backbone.pooling not in EVEN or any(reach.keys or reach.queries for reach in reaches):
        pytest.skip("tokens that are pooled with weights, or keys that are no tokens")

    def stay(query: Any, key: Any, value: Any, shares: torch.Tensor, **options: Any) -> Any:
        output, _ = vitmix.functional.attend_with_shares(query, key, value, shares, **options)
        return output, shares

    monkeypatch.setattr(vitmix.flow, "attend_with_shares", stay)
    monkeypatch.setattr(vitmix.flow, "attended_shares", lambda attention, shares: shares)
    out = mixing(images, targets)
    plan = out.trace.pixels
    soft = vitmix.functional.smooth_targets(targets, NUM_CLASSES)
    area = vitmix.functional.mix_targets(soft, plan.partner, plan.lam)
    merged = any(first[i] % block.stride for block in backbone.blocks for i in (0, 1))
    torch.testing.assert_close(out.targets, area, atol=0.1 if merged else 1e-5, rtol=0)
