"""Checkpoints of the released codes: into models and mixing models, or refused by name."""

from __future__ import annotations

import argparse
import fractions
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vitmix
from golden import load_golden
from test_golden_models import MAKE, make_cct, released_state
from vitmix.models import load_released

pytest.importorskip("timm")
safetensors = pytest.importorskip("safetensors.torch")

MODELS = [
    *(("cct", model) for model in ("plain", "htm", "vtm", "hvtm", "vhtm")),
    *(("vit_htm", model) for model in ("plain", "htm", "vtm", "hvtm")),
]
SCORENET_BLOCK = 1  # of "htm" in both


def state_of(file: str, model: str = "htm") -> dict[str, torch.Tensor]:
    return released_state(load_golden(file), model)


def wrap(file: str, *tokens: vitmix.TokenStage, **options: Any) -> vitmix.MixingModel:
    data = load_golden(file)
    classes = options.get("num_classes", int(data["num_classes"]))
    return vitmix.MixingModel(MAKE[file](data, **options), tokens=tokens, num_classes=classes)


def logits(file: str, model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.from_numpy(load_golden(file)["images_eval"]))
    return found


def assert_released(file: str, model: nn.Module) -> None:
    expected = torch.from_numpy(load_golden(file)["plain/eval_logits"])
    torch.testing.assert_close(logits(file, model), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("file", "name"), MODELS)
def test_into_a_bare_model(file: str, name: str) -> None:
    """The logits are those recorded, and ScoreNet is reported as left out."""
    state = state_of(file, name)
    model = MAKE[file](load_golden(file))
    loaded = load_released(model, state)
    assert_released(file, model)
    scorenet = {key for key in state if "small_h" in key or "scorenet" in key}
    assert set(loaded.left_out) == scorenet
    assert loaded.names.keys() == state.keys() - scorenet
    assert set(loaded.names.values()) == model.state_dict().keys()
    assert loaded.untouched == ()


@pytest.mark.parametrize("file", MAKE)
def test_scorenet_goes_into_the_stage_at_its_block(file: str) -> None:
    """And into that one only; a block may be counted from the end."""
    state = state_of(file)
    here = vitmix.HorizontalTokenMixup(block=SCORENET_BLOCK)
    other = vitmix.HorizontalTokenMixup(block=2)
    mixing = wrap(file, other, vitmix.VerticalTokenMixup(block=2), here)
    loaded = load_released(mixing, state)
    assert loaded.left_out == ()
    assert loaded.untouched
    assert all(name.startswith("tokens.0.scorenet.") for name in loaded.untouched)
    assert here.scorenet is not None
    for released, name in loaded.names.items():
        if "small_h" in released or "scorenet" in released:
            assert torch.equal(mixing.get_parameter(name), state[released])
            assert name.startswith("tokens.2.scorenet.")
    assert_released(file, mixing)


@pytest.mark.parametrize("file", MAKE)
def test_without_scorenet_in_the_checkpoint(file: str) -> None:
    mixing = wrap(file, vitmix.HorizontalTokenMixup(block=1))
    loaded = load_released(mixing, state_of(file, "plain"))
    assert {name.split(".")[2] for name in loaded.untouched} == {"scorenet"}
    assert_released(file, mixing)


@pytest.mark.parametrize("file", MAKE)
def test_without_horizontal_mixing_in_the_model(file: str) -> None:
    mixing = wrap(file, vitmix.VerticalTokenMixup(block=2))
    loaded = load_released(mixing, state_of(file))
    assert len(loaded.left_out) == (4 if file == "cct" else 2)
    assert loaded.untouched == ()
    assert_released(file, mixing)


# --- files and wrappers

State = dict[str, Any]
WRAPPERS: dict[str, tuple[Callable[[State], State], str]] = {
    "bare": (lambda state: state, ""),
    "state-dict": (lambda state: {"state_dict": state, "epoch": 3, "metric": 0.5}, "state_dict"),
    "model": (lambda state: {"model": state, "optimizer": {"lr": 0.1}}, "model"),
    "parallel": (lambda state: {f"module.{key}": value for key, value in state.items()}, ""),
    "compiled": (lambda state: {f"_orig_mod.{key}": value for key, value in state.items()}, ""),
    "compiled-parallel": (
        lambda state: {"model": {f"module._orig_mod.{k}": value for k, value in state.items()}},
        "model",
    ),
    "averaged": (
        lambda state: {
            "n_averaged": torch.tensor(3),
            **{f"module.{key}": value for key, value in state.items()},
        },
        "",
    ),
    "timm": (
        lambda state: {
            "arch": "cct",
            "args": argparse.Namespace(lr=0.1, opt="adamw"),
            "state_dict": {key: value + 1 for key, value in state.items()},
            "state_dict_ema": state,
        },
        "state_dict_ema",
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", ["dictionary", "torch", "torch-old"])
def test_wrappers(tmp_path: Path, wrapper: str, kind: str) -> None:
    make, part = WRAPPERS[wrapper]
    source: Any = make(state_of("cct"))
    if kind != "dictionary":
        path = tmp_path / "weights.pth"
        torch.save(source, path, _use_new_zipfile_serialization=kind == "torch")
        source = path
    model = make_cct(load_golden("cct"))
    assert load_released(model, source).part == part
    assert_released("cct", model)


def test_weights_that_are_not_averaged() -> None:
    model = make_cct(load_golden("cct"))
    make, _ = WRAPPERS["timm"]
    assert load_released(model, make(state_of("cct")), ema=False).part == "state_dict"
    assert torch.equal(
        model.state_dict()["classifier.fc.bias"], state_of("cct")["classifier.fc.bias"] + 1
    )


def test_safetensors(tmp_path: Path) -> None:
    path = str(tmp_path / "weights.safetensors")
    safetensors.save_file(state_of("vit_htm"), path)
    model = MAKE["vit_htm"](load_golden("vit_htm"))
    load_released(model, path)
    assert_released("vit_htm", model)


def test_names_of_the_model_itself() -> None:
    """What `export` writes can be read back."""
    first, second = (MAKE["vit_htm"](load_golden("vit_htm")) for _ in range(2))
    load_released(first, state_of("vit_htm"))
    load_released(second, first.state_dict())
    assert_released("vit_htm", second)


def test_half_precision_weights_take_the_models_type() -> None:
    model = make_cct(load_golden("cct"))
    load_released(model, {key: value.half() for key, value in state_of("cct").items()})
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


# --- refusals


def without(state: State, word: str) -> State:
    return {key: value for key, value in state.items() if word not in key}


def broken(state: State, word: str, change: Callable[[torch.Tensor], torch.Tensor]) -> State:
    return {key: change(value) if word in key else value for key, value in state.items()}


REFUSED: dict[str, tuple[str, Callable[[State], Any], str]] = {
    "missing": (
        "cct",
        lambda state: without(state, "1.norm1"),
        r"without model\.classifier\.blocks\.1\.norm1\.bias, model.*\.norm1\.weight;",
    ),
    "unknown": (
        "cct",
        lambda state: {**state, "classifier.class_emb": torch.zeros(1)},
        r"unknown classifier\.class_emb;",
    ),
    "many": (
        "vit_htm",
        lambda state: {"a": torch.zeros(1)},
        r"without .* and 39 more and with unknown a;",
    ),
    "no-key": ("vit_htm", lambda state: without(state, "0.attn.key.bias"), r"got no key"),
    "shape": (
        "cct",
        lambda state: broken(state, "blocks.0.linear1.bias", lambda value: value[1:]),
        r"linear1\.bias \(127,\) for \(128,\)",
    ),
    "classes": (
        "vit_htm",
        lambda state: broken(state, "head.", lambda value: value[:4]),
        r"head\.weight \(4, 32\) for \(10, 32\).*num_classes=4",
    ),
    "positions": (
        "vit_htm",
        lambda state: broken(state, "position", lambda value: value[:, :10]),
        r"pos_embed \(1, 10, 32\) for \(1, 17, 32\).*resize_positions=True",
    ),
    "not-weights": ("cct", lambda state: {**state, "epoch": 3}, r"something else under epoch"),
    "empty": ("cct", lambda state: {}, r"tensors by name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_change_nothing(case: str) -> None:
    file, change, words = REFUSED[case]
    mixing = wrap(file, vitmix.HorizontalTokenMixup(block=SCORENET_BLOCK))
    before = {key: value.clone() for key, value in mixing.state_dict().items()}
    with pytest.raises(vitmix.InputError, match=words):
        load_released(mixing, change(state_of(file)))
    assert all(torch.equal(value, before[key]) for key, value in mixing.state_dict().items())


def test_scorenet_of_another_block_or_kind_is_refused() -> None:
    before = state_of("cct")["classifier.fc.bias"]
    mixing = wrap("cct", vitmix.HorizontalTokenMixup(block=2))
    with pytest.raises(vitmix.InputError, match=r"block=1.*got block 2"):
        load_released(mixing, state_of("cct"))
    mixing = wrap("cct", vitmix.HorizontalTokenMixup(block=1, pool="average"))
    with pytest.raises(
        vitmix.InputError, match=r"unknown classifier\.blocks\.1\.small_h_attention_pool"
    ):
        load_released(mixing, state_of("cct"))
    assert not torch.equal(mixing.model.state_dict()["classifier.fc.bias"], before)


def test_other_models_are_refused() -> None:
    with pytest.raises(vitmix.UnsupportedModelError, match="found Linear"):
        load_released(nn.Linear(2, 2), state_of("cct"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("absent.pth", None, "there is no"),
        ("text.pth", b"weights", "weights_only=False|neither"),
        ("short.pth", b"", "neither"),
        ("text.safetensors", b"weights", "not one"),
    ],
)
def test_files_that_cannot_be_read(
    tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(vitmix.InputError, match=words):
        load_released(make_cct(load_golden("cct")), tmp_path / name)


def test_a_file_that_runs_code_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": state_of("cct"), "args": fractions.Fraction(1, 2)}, path)
    model = make_cct(load_golden("cct"))
    with pytest.raises(vitmix.InputError, match=r"Fraction.*trust.*weights_only=False"):
        load_released(model, path)
    load_released(model, torch.load(path, weights_only=False))
    assert_released("cct", model)


# --- positions of another image size


def test_positions_are_resized_as_timm_does() -> None:
    from timm.layers import resample_abs_pos_embed

    model = MAKE["vit_htm"](load_golden("vit_htm"), img_size=(48, 40))
    state = state_of("vit_htm")
    load_released(model, state, resize_positions=True)
    old = state["transformer.embeddings.position_embeddings"]
    expected = resample_abs_pos_embed(old, [6, 5], num_prefix_tokens=1)
    assert torch.equal(model.state_dict()["pos_embed"], expected)
    same = MAKE["vit_htm"](load_golden("vit_htm"))
    load_released(same, state, resize_positions=True)
    assert torch.equal(same.state_dict()["pos_embed"], old)


def test_positions_are_resized_bilinearly_for_cct() -> None:
    data = load_golden("cct")
    model = make_cct(data, img_size=(48, 32))
    state = state_of("cct")
    load_released(model, state, resize_positions=True)
    found = model.state_dict()["classifier.positional_emb"].unflatten(1, (24, 16))
    old = state["classifier.positional_emb"].unflatten(1, (16, 16))
    # Rows shrink by 16 / 24: row 1 lies at (1 + 0.5) * 16 / 24 - 0.5 = 0.5, between rows 0 and 1.
    torch.testing.assert_close(found[:, 1], (old[:, 0] + old[:, 1]) / 2)
    torch.testing.assert_close(found[:, 0], old[:, 0])
    with pytest.raises(vitmix.InputError, match="resize_positions=True"):
        load_released(make_cct(data, img_size=(48, 32)), state)
    state["classifier.positional_emb"] = state["classifier.positional_emb"][:, :200]
    with pytest.raises(vitmix.InputError, match="square grid to resize, got 200"):
        load_released(make_cct(data, img_size=(48, 32)), state, resize_positions=True)
