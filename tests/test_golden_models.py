"""Whole models with horizontal and vertical mixing against runs of the released code.

The runs named ``repaired`` have the released code's known defects corrected (first-row mask,
position off by one, row order); ``repaired_post`` also selects vertical tokens by the attention of
the mixed tokens, which is what vitmix does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import vitmix
from golden import load_golden
from vitmix.models.cct import CCT

CCT_RUNS = [
    "htm_all_repaired",
    "htm_part_repaired",
    "vtm_official",
    "hvtm_part_repaired_post",
    "vhtm_part_repaired",
]
VIT_RUNS = ["htm_all_repaired", "htm_part_repaired", "vtm_repaired", "hvtm_part_repaired_post"]


def stages(data: Any, run: str, stop_gradient: bool = False) -> list[vitmix.TokenStage]:
    model = str(data[f"{run}/model"])
    horizontal = int(data[f"{model}/horizontal_layer"])
    vertical = int(data[f"{model}/vertical_layer"])
    found: list[vitmix.TokenStage] = []
    if horizontal >= 0:
        found.append(
            vitmix.HorizontalTokenMixup(
                block=horizontal,
                tau=float(data[f"{run}/tau"]) / 0.1,  # released difficulty is 0.1 x cross-entropy
                rho=float(data[f"{model}/rho"]),
                stop_gradient=stop_gradient,
                scorenet_weight=float(data["scorenet_lambda"]),
            )
        )
    if vertical >= 0:
        kappa = int(data[f"{model}/kappa"])
        found.append(vitmix.VerticalTokenMixup(vertical, kappa, stop_gradient=stop_gradient))
    return found


def load_cct(data: Any, mixing: vitmix.MixingModel, name: str) -> dict[str, str]:
    """Load a released state; return the name here of each released parameter."""
    prefix = f"{name}/state/"
    names: dict[str, str] = {}
    state: dict[str, torch.Tensor] = {}
    for key in data.files:
        if not key.startswith(prefix):
            continue
        released = key[len(prefix) :]
        value = torch.from_numpy(data[key])
        if "small_h_" in released:
            here = "tokens.0.scorenet." + released.split("small_h_")[1]
        elif ".query." in released:
            parts = [data[key.replace("query", part)] for part in ("query", "key", "value")]
            value = torch.from_numpy(np.concatenate(parts))
            here = "model." + released.replace("query", "qkv")
        elif ".key." in released or ".value." in released:
            continue
        else:
            here = "model." + released
        names[released] = here
        state[here] = value
    mixing.load_state_dict(state)
    return names


def load_vit(data: Any, mixing: vitmix.MixingModel, name: str) -> dict[str, str]:
    prefix = f"{name}/state/"
    renamed = {
        "transformer.embeddings.position_embeddings": "pos_embed",
        "transformer.embeddings.cls_token": "cls_token",
        "transformer.embeddings.patch_embeddings": "patch_embed.proj",
        "transformer.encoder.encoder_norm": "norm",
        "transformer.encoder.layer": "blocks",
        "attention_norm": "norm1",
        "ffn_norm": "norm2",
        "ffn": "mlp",
        "attn.out": "attn.proj",
    }
    names: dict[str, str] = {}
    state: dict[str, torch.Tensor] = {}
    for key in data.files:
        if not key.startswith(prefix) or ".key." in key or ".value." in key:
            continue
        released = key[len(prefix) :]
        here = released
        for old, new in renamed.items():
            here = here.replace(old, new)
        value = torch.from_numpy(data[key])
        if ".query." in released:
            parts = [data[key.replace("query", part)] for part in ("query", "key", "value")]
            value = torch.from_numpy(np.concatenate(parts))
            here = here.replace("query", "qkv")
        if "scorenet" in released:
            here = "tokens.0.scorenet.fc." + released.rsplit(".", 1)[1]
        else:
            here = "model." + here
        names[released] = here
        state[here] = value
    mixing.load_state_dict(state)
    return names


def build_cct(data: Any, run: str, **options: bool) -> tuple[vitmix.MixingModel, dict[str, str]]:
    model = CCT(
        img_size=32,
        embed_dim=int(data["embedding_dim"]),
        num_layers=int(data["num_layers"]),
        num_heads=int(data["num_heads"]),
        mlp_ratio=float(data["mlp_ratio"]),
        num_conv_layers=1,
        kernel_size=3,
        num_classes=int(data["num_classes"]),
        attention_dropout=0.0,
        stochastic_depth=0.0,
    )
    mixing = vitmix.MixingModel(
        model, tokens=stages(data, run, **options), num_classes=int(data["num_classes"])
    )
    return mixing, load_cct(data, mixing, str(data[f"{run}/model"]))


def build_vit(data: Any, run: str, **options: bool) -> tuple[vitmix.MixingModel, dict[str, str]]:
    timm = pytest.importorskip("timm")
    model = timm.models.VisionTransformer(
        img_size=int(data["img_size"]),
        patch_size=int(data["patch_size"]),
        embed_dim=int(data["hidden_size"]),
        depth=int(data["num_layers"]),
        num_heads=int(data["num_heads"]),
        mlp_ratio=int(data["mlp_dim"]) / int(data["hidden_size"]),
        num_classes=int(data["num_classes"]),
    )
    mixing = vitmix.MixingModel(
        model, tokens=stages(data, run, **options), num_classes=int(data["num_classes"])
    )
    return mixing, load_vit(data, mixing, str(data[f"{run}/model"]))


CASES = [("cct", run) for run in CCT_RUNS] + [("vit_htm", run) for run in VIT_RUNS]


@pytest.mark.parametrize(("file", "run"), CASES)
@pytest.mark.parametrize("stop_gradient", [False, True])
def test_run_of_released_code(file: str, run: str, stop_gradient: bool) -> None:
    data = load_golden(file)
    build = build_cct if file == "cct" else build_vit
    mixing, names = build(data, run, stop_gradient=stop_gradient)
    name = str(data[f"{run}/model"])

    with torch.no_grad():
        logits = mixing.eval()(torch.from_numpy(data["images_eval"]))
    np.testing.assert_allclose(logits, data[f"{name}/eval_logits"], atol=2e-5)

    out = mixing.train()(torch.from_numpy(data["images_train"]), torch.from_numpy(data["targets"]))
    suffix = "_original_order" if f"{run}/logits_original_order" in data else ""
    np.testing.assert_allclose(out.logits.detach(), data[f"{run}/logits{suffix}"], atol=5e-5)
    if f"{run}/y_mixed{suffix}" in data:
        np.testing.assert_allclose(out.targets, data[f"{run}/y_mixed{suffix}"], atol=1e-6)
    main_loss = out.loss() - out.aux_loss
    np.testing.assert_allclose(main_loss.item(), data[f"{run}/loss_main"], atol=1e-5)
    if f"{run}/mask" in data:
        block = int(data[f"{name}/horizontal_layer"])
        easy = data[f"{run}/easy"]
        plan = out.trace.horizontal[block]
        np.testing.assert_array_equal(plan.replace.numpy()[easy], data[f"{run}/mask"])
        assert not plan.replace.numpy()[~easy].any()
        np.testing.assert_array_equal(plan.partner.numpy()[easy], data[f"{run}/sigma"])
        np.testing.assert_allclose(out.aux_loss.item(), data[f"{run}/loss_score"], atol=1e-5)

    out.loss().backward()
    kind = "grad_norms_stopgrad" if stop_gradient else "grad_norms"
    expected = dict(zip(data[f"{name}/param_names"].tolist(), data[f"{run}/{kind}"], strict=True))
    for released, here in names.items():
        gradient = mixing.get_parameter(here).grad
        norm = 0.0 if gradient is None else float(gradient.norm())
        if ".query." in released:
            thirds = [expected[released.replace("query", p)] for p in ("query", "key", "value")]
            wanted = float(np.linalg.norm(thirds))
        else:
            wanted = float(expected[released])
        assert norm == pytest.approx(wanted, rel=2e-4, abs=1e-6), released
