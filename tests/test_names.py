"""Registered timm names on the meta device: described, or refused with a reason."""

from __future__ import annotations

import pytest
import torch

import vitmix

timm = pytest.importorskip("timm")

SUPPORTED = [
    "beit3_base_patch16_224",
    "caformer_s18",
    "cait_xxs24_224",
    "coatnet_pico_rw_224",
    "cpubone_nano",
    "csatv2",
    "davit_tiny",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "efficientvit_m0",
    "fastvit_sa12",
    "gcvit_xxtiny",
    "halonet26t",
    "hiera_tiny_224",
    "hieradet_small",
    "iformer_t",
    "levit_128s",
    "lowformer_b0",
    "maxvit_pico_rw_256",
    "mobilenetv4_hybrid_medium_075",
    "mvitv2_tiny",
    "nest_tiny",
    "nextvit_small",
    "pit_ti_224",
    "pvt_v2_b0",
    "samvit_base_patch16",
    "shvit_s1",
    "swin_tiny_patch4_window7_224",
    "tiny_vit_5m_224",
    "twins_svt_small",
    "visformer_tiny",
    "vit_small_patch16_18x2_224",
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
    "coat_tiny": "factorised attention",
    "convit_tiny": "gated positional",
    "crossvit_tiny_240": "two sequences",
    "edgenext_xx_small": "between channels",
    "efficientvim_m1": "hidden state",
    "fastvit_t8": "found no attention",
    "lambda_resnet26t": "lambda layers",
    "maxvit_tiny_pm_256": "one within windows beside one",
    "mobilenetv3_small_050": "found no attention",
    "mobilevit_xxs": "folded into the batch",
    "qwen3_vit_306m_enc": "without a classifier",
    "resnet18": "ResNet",
    "tnt_s_legacy_patch16_224": "inner transformer",
    "vit_dwee_patch16_reg1_gap_256": "difference of two",
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
