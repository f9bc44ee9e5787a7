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
from vitmix.models import CCT, load_released

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


def released_state(data: Any, model: str) -> dict[str, torch.Tensor]:
    prefix = f"{model}/state/"
    return {
        key[len(prefix) :]: torch.from_numpy(data[key])
        for key in data.files
        if key.startswith(prefix)
    }


def load(data: Any, run: str, mixing: vitmix.MixingModel) -> dict[str, str]:
    """Load a released state; return the name here of each released parameter."""
    state = released_state(data, str(data[f"{run}/model"]))
    loaded = load_released(mixing, state)
    assert loaded.names.keys() == state.keys()
    assert not loaded.left_out
    assert not loaded.untouched
    return loaded.names


def make_cct(data: Any, **options: Any) -> torch.nn.Module:
    return CCT(
        **{
            "img_size": 32,
            "embed_dim": int(data["embedding_dim"]),
            "num_layers": int(data["num_layers"]),
            "num_heads": int(data["num_heads"]),
            "mlp_ratio": float(data["mlp_ratio"]),
            "num_classes": int(data["num_classes"]),
            "attention_dropout": 0.0,
            "stochastic_depth": 0.0,
            **options,
        }
    )


def make_vit(data: Any, **options: Any) -> torch.nn.Module:
    timm = pytest.importorskip("timm")
    arguments = {
        "img_size": int(data["img_size"]),
        "patch_size": int(data["patch_size"]),
        "embed_dim": int(data["hidden_size"]),
        "depth": int(data["num_layers"]),
        "num_heads": int(data["num_heads"]),
        "mlp_ratio": int(data["mlp_dim"]) / int(data["hidden_size"]),
        "num_classes": int(data["num_classes"]),
        **options,
    }
    return timm.models.VisionTransformer(**arguments)


MAKE = {"cct": make_cct, "vit_htm": make_vit}


def build(
    file: str, data: Any, run: str, **options: bool
) -> tuple[vitmix.MixingModel, dict[str, str]]:
    mixing = vitmix.MixingModel(
        MAKE[file](data), tokens=stages(data, run, **options), num_classes=int(data["num_classes"])
    )
    return mixing, load(data, run, mixing)


CASES = [("cct", run) for run in CCT_RUNS] + [("vit_htm", run) for run in VIT_RUNS]


@pytest.mark.parametrize(("file", "run"), CASES)
@pytest.mark.parametrize("stop_gradient", [False, True])
def test_run_of_released_code(file: str, run: str, stop_gradient: bool) -> None:
    data = load_golden(file)
    mixing, names = build(file, data, run, stop_gradient=stop_gradient)
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
        if ".key." in released or ".value." in released:  # looked at together with the query
            continue
        gradient = mixing.get_parameter(here).grad
        norm = 0.0 if gradient is None else float(gradient.norm())
        if ".query." in released:
            thirds = [expected[released.replace("query", p)] for p in ("query", "key", "value")]
            wanted = float(np.linalg.norm(thirds))
        else:
            wanted = float(expected[released])
        assert norm == pytest.approx(wanted, rel=2e-4, abs=1e-6), released
