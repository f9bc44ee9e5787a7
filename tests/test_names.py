"""Registered timm names on the meta device: described, or refused with a reason."""

from __future__ import annotations

import pytest
import torch

import vitmix

timm = pytest.importorskip("timm")

SUPPORTED = [
    "beit3_base_patch16_224",
    "beit_base_patch16_224",
    "deit3_small_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "eva02_tiny_patch14_224",
    "eva_giant_patch14_224",
    "flexivit_small",
    "naflexvit_base_patch16_gap",
    "vit_base_patch16_siglip_224",
    "vit_pe_core_tiny_patch16_384",
    "vit_relpos_small_patch16_224",
    "vit_small_patch16_dinov3",
    "vit_small_patch16_rope_mixed_224",
    "vit_small_r26_s32_224",
    "vit_srelpos_small_patch16_224",
    "vit_tiny_patch16_224",
    "vitamin_small_224",
]
REFUSED = {
    "cait_xxs24_224": "talking heads",
    "convit_tiny": "gated positional",
    "mobilenetv3_small_050": "MobileNetV3",
    "pit_ti_224": "stages",
    "resnet18": "ResNet",
    "samvit_base_patch16": "windows",
    "swin_tiny_patch4_window7_224": "windows",
    "vit_small_patch16_18x2_224": "ParallelThingsBlock",
    "xcit_nano_12_p16_224": "between channels",
}


def make(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        model: torch.nn.Module = timm.create_model(name)
    return model


@pytest.mark.parametrize("name", SUPPORTED)
def test_supported_names(name: str) -> None:
    model = make(name)
    backbone = vitmix.describe(model)
    assert backbone.alignment_reason is None
    assert backbone.depth > 0
    assert all(size > 0 for size in backbone.grid(model.default_cfg["input_size"][1:]))  # type: ignore[index, union-attr]
    backbone.require_part_of(model)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_names(name: str) -> None:
    with pytest.raises(vitmix.UnsupportedModelError, match=REFUSED[name]):
        vitmix.describe(make(name))
