"""Recipes: they exist, say where they come from, are laid under options, and run."""

from __future__ import annotations

import inspect
import json
import math
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

import vitmix
from vitmix.cli import main
from vitmix.errors import InputError
from vitmix.train.config import TrainConfig
from vitmix.train.data import load_data
from vitmix.train.methods import method_of
from vitmix.train.recipes import (
    SHAPES,
    all_recipes,
    as_page,
    find_recipes,
    get_recipe,
    settings_under,
)
from vitmix.train.run import check_config, train_run

RECIPES = all_recipes()

# Every row that the papers train, with its published top-1; None: a row of ours.
FIGURES = {
    "cct7-cifar10": 97.48,
    "cct7-cifar10-tokenmixup-h": 97.57,
    "cct7-cifar10-tokenmixup-v": 97.78,
    "cct7-cifar10-tokenmixup": 97.75,
    "cct7-cifar100": 82.87,
    "cct7-cifar100-tokenmixup-h": 83.56,
    "cct7-cifar100-tokenmixup-v": 83.54,
    "cct7-cifar100-tokenmixup": 83.57,
    "cct7-cifar100-no-scorenet": 82.85,
    "cct7-cifar100-no-assignment": 82.61,
    "cct7-cifar100-random-tokens": 83.05,
    "cct7-cifar100-area-labels": 82.62,
    "cct7-cifar100-gradient-saliency": 83.28,
    "cct7-cifar100-unmixed": 76.80,
    "cct7-cifar100-unmixed-manifold": 76.72,
    "cct7-cifar100-unmixed-tokenmixup-h": 77.34,
    "cct7-cifar100-unmixed-tokenmixup-v": 78.18,
    "cct7-cifar100-manifold": 80.08,
    "cct7-cifar100-all": None,
    "vit-b16-imagenet-tokenmixup-h": 82.37,
    "vit-b16-imagenet-tokenmixup-v": 82.30,
    "vit-b16-imagenet-tokenmixup": 82.32,
    "deit-tiny-tokenmix": 73.2,
    "deit-small-tokenmix": 80.8,
    "deit-base-tokenmix": 82.9,
    "deit-small-tokenmix-400": 81.2,
    "deit-small-tokenmix-released": 80.8,
    "deit-tiny-tokenmix-block": None,
    "deit-tiny-tokenmix-random": None,
    "deit-tiny-tokenmix-region": None,
    "deit-small-tokenmix-block": 80.6,
    "deit-small-tokenmix-random": 80.6,
    "deit-small-tokenmix-region": 79.8,
    "deit-base-tokenmix-block": None,
    "deit-base-tokenmix-random": None,
    "deit-base-tokenmix-region": None,
    "deit-tiny-tl-align": 73.2,
    "deit-small-tl-align": 80.6,
    "deit-base-tl-align": 82.3,
    "swin-tiny-tl-align": 81.4,
    "swin-small-tl-align": 83.4,
    "swin-base-tl-align": 83.7,
    "deit-small-all": None,
}

# Larger models are made smaller here, but for one of each architecture.
SMALL_VIT = {"depth": 5, "embed_dim": 96, "num_heads": 3}
SMALL_SWIN = {"depths": [1, 1, 2, 1], "embed_dim": 48, "num_heads": [3, 6, 12, 24]}
FULL = ("cct7", "deit-tiny", "swin-tiny", "vit-b16-imagenet-tokenmixup")


def settings(name: str, **changes: Any) -> TrainConfig:
    return TrainConfig(**(settings_under({"recipe": name}) | {"recipe": name} | changes))


def test_every_row_of_the_papers_is_a_recipe_with_its_figure() -> None:
    assert {name: recipe.top1 for name, recipe in RECIPES.items()} == FIGURES


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_says_where_it_comes_from(name: str) -> None:
    recipe = RECIPES[name]
    assert recipe.title
    assert recipe.section
    assert recipe.data in SHAPES
    assert recipe.paper in ("TokenMixup", "TokenMix", "TL-Align", "vitmix")
    assert recipe.published
    assert recipe.inferred
    assert (recipe.top1 is None) == recipe.source.startswith("not published")
    assert recipe.settings.keys() <= {entry.name for entry in fields(TrainConfig)} - {"recipe"}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_runs_two_steps(name: str, tmp_path: Path) -> None:
    classes, side = SHAPES[RECIPES[name].data]
    changes: dict[str, Any] = {
        "data": f"fake:{classes}x{side}x4", "batch_size": 2, "max_steps": 2, "precision": "fp32",
        "device": "cpu", "threads": 1, "workers": 0, "out": str(tmp_path), "teacher": "auto",
    }  # fmt: skip
    config = settings(name, **changes)
    config.pretrained = False
    if not (name.startswith(FULL[:-1]) or name == FULL[-1]):
        config.model_kwargs = SMALL_SWIN if name.startswith("swin") else SMALL_VIT
    result = train_run(config)
    assert result.results["steps"] == result.task.global_step == 2
    assert math.isfinite(result.results["loss"])
    assert result.folder.name == f"{name}-seed0"
    shutil.rmtree(tmp_path)  # checkpoints of large models


@pytest.mark.parametrize("name", RECIPES)
def test_settings_are_valid_as_published(name: str) -> None:
    config = settings(name)
    config.precision = "fp32"
    check_config(config)
    method_of(config)


@pytest.mark.parametrize("name", RECIPES)
def test_fake_data_has_the_shape_of_the_real(name: str) -> None:
    recipe = RECIPES[name]
    data = load_data(TrainConfig(data=f"{recipe.fake_data()}x4", workers=0))
    assert (len(data.classes), data.img_size) == SHAPES[recipe.data]
    assert recipe.settings["img_size"] == data.img_size


STAGES = [
    ("cct7-cifar100-tokenmixup", 0, {"block": 3, "tau": 2.0, "rho": 0.005}),
    ("cct7-cifar100-tokenmixup", 1, {"block": 2, "kappa": 3}),
    ("cct7-cifar100-tokenmixup-v", 0, {"block": 2, "kappa": 80}),
    ("cct7-cifar10-tokenmixup", 0, {"block": 2, "tau": 1.0, "rho": 0.004}),
    ("cct7-cifar10-tokenmixup", 1, {"block": 3, "kappa": 3}),
    ("cct7-cifar100-no-scorenet", 0, {"tau": math.inf, "block": 2}),
    ("cct7-cifar100-no-assignment", 0, {"assignment": "random"}),
    ("cct7-cifar100-random-tokens", 0, {"saliency": "random"}),
    ("cct7-cifar100-area-labels", 0, {"relabel": "area"}),
    ("vit-b16-imagenet-tokenmixup", 0, {"block": 3, "tau": 1.0, "scorenet_weight": 1.0}),
    ("vit-b16-imagenet-tokenmixup", 1, {"block": 4, "kappa": 3}),
]


@pytest.mark.parametrize(("name", "stage", "expected"), STAGES)
def test_token_stages_are_the_released_ones(
    name: str, stage: int, expected: dict[str, Any]
) -> None:
    args = method_of(settings(name)).tokens[stage].args
    assert args.items() >= expected.items()


def test_ablations_change_one_thing() -> None:
    whole = method_of(settings("cct7-cifar100-tokenmixup-h")).tokens[0].args
    defaults = inspect.signature(vitmix.HorizontalTokenMixup).parameters
    for name in ("no-scorenet", "no-assignment", "random-tokens", "area-labels"):
        args = method_of(settings(f"cct7-cifar100-{name}")).tokens[0].args
        changed = [key for key in args if args[key] != whole.get(key, defaults[key].default)]
        assert len(changed) == 1


# --- layers


def printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main([*arguments, "--print-config"]) == 0
    content: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return content


def test_recipe_then_file_then_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("recipe: cct7-cifar100-tokenmixup\nlr: 1e-3\nepochs: 7\nscale: null\n")
    got = printed(["train", "--config", str(path), "--epochs", "3"], capsys)
    assert (got["epochs"], got["lr"], got["scale"]) == (3, 1e-3, None)
    assert (got["weight_decay"], got["model"]) == (0.06, "cct_7_3x1_32")  # the recipe's
    assert got["recipe"] == "cct7-cifar100-tokenmixup"
    # An option chooses another recipe than the file.
    got = printed(["train", "--config", str(path), "--recipe", "cct7-cifar10"], capsys)
    assert (got["model"], got["lr"], got["tokens"]) == ("cct_7_3x1_32_sine", 1e-3, None)


def test_another_method_replaces_that_of_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ["train", "--recipe", "deit-small-all"]
    got = printed([*recipe, "--method", "tl-align"], capsys)
    assert (got["method"], got["mix"], got["tokens"], got["labels"]) == ("tl-align", *[None] * 3)
    assert got["model"] == "deit_small_patch16_224"
    got = printed([*recipe, "--tau", "3", "--labels", "area"], capsys)
    assert (got["tau"], got["labels"], got["mix"]["name"]) == (3, "area", "tokenmix")


@pytest.mark.parametrize(
    ("name", "option", "gone"),
    [
        ("deit-tiny-tokenmix", ["--teacher-maps", "maps"], {"teacher": "auto"}),
        ("cct7-cifar100", ["--crop-padding", "4"], {"scale": None}),
        ("vit-b16-imagenet-tokenmixup", ["--opt", "lamb"], {"opt_kwargs": None}),
    ],
)
def test_a_choice_replaces_what_goes_with_the_recipes(
    name: str, option: list[str], gone: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert get_recipe(name).settings.keys() >= gone.keys()
    got = printed(["train", "--recipe", name, *option], capsys)
    assert {key: got[key] for key in gone} == gone


def test_comparison_takes_settings_but_no_method(capsys: pytest.CaptureFixture[str]) -> None:
    got = printed(["compare", "--recipe", "cct7-cifar100-tokenmixup"], capsys)
    assert (got["weight_decay"], got["mixup"], got["cutmix"]) == (0.06, None, None)


def test_shown_recipe_is_a_settings_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "vit-b16-imagenet-tokenmixup"
    assert main(["recipes", name]) == 0
    shown = capsys.readouterr().out
    assert "# top-1 to compare with: 82.32 (TokenMixup, Table 2)" in shown
    assert "# published:\n#   - ViT-B/16" in shown
    path = tmp_path / "shown.yaml"
    path.write_text(shown)
    from_file = printed(["train", "--config", str(path)], capsys)
    assert from_file == printed(["train", "--recipe", name], capsys)


def test_dry_run_of_a_recipe_can_be_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "train", "--recipe", "cct7-cifar100-tokenmixup-h", "--data", "fake", "--max-steps", "1",
        "--train-limit", "8", "--batch-size", "4", "--precision", "fp32", "--device", "cpu",
        "--model", "cct_2_3x2_32", "--block", "1", "--threads", "1", "--out", str(tmp_path),
    ]  # fmt: skip
    assert main(arguments) == 0
    saved = tmp_path / "cct7-cifar100-tokenmixup-h-seed0" / "config.yaml"
    resolved = yaml.safe_load(saved.read_text())
    assert resolved["data"] == "fake:100x32"
    assert main(["train", "--config", str(saved), "--name", "again"]) == 0
    first, second = (
        json.loads((folder / "results.json").read_text())
        for folder in (saved.parent, tmp_path / "again")
    )
    assert first["loss"] == second["loss"]
    assert first["config"] | {"name": "again"} == second["config"]


# --- listing


def test_patterns_find_recipes() -> None:
    assert len(find_recipes(None)) == len(RECIPES)
    assert [recipe.name for recipe in find_recipes("swin")] == [
        "swin-tiny-tl-align", "swin-small-tl-align", "swin-base-tl-align",
    ]  # fmt: skip
    assert [recipe.name for recipe in find_recipes("*-all")] == [
        "cct7-cifar100-all", "deit-small-all",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipes", "cct7-cifar10O"], "did you mean 'cct7-cifar10' or 'cct7-cifar100'?"),
        (["train", "--recipe", "swin-tiny-tlalign"], "did you mean 'swin-tiny-tl-align'"),
        (["train", "--recipe", "_cct7"], "to be a recipe, got '_cct7'"),
        (["train", "--recipe", "swin-tiny-tl-align"], "there is no 'imagenet'"),
    ],
)
def test_recipes_that_do_not_exist(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments]) == 2
    assert message in capsys.readouterr().err


def test_list_has_names_models_and_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "deit-small"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["recipe", "model", "data", "top-1", "what"]
    assert len(lines) == len(find_recipes("deit-small"))
    assert lines[0].split()[:4] == [
        "deit-small-tokenmix", "deit_small_patch16_224", "ImageNet-1k", "80.80",
    ]  # fmt: skip


def test_page_of_recipes_is_current() -> None:
    page = Path(__file__).parent.parent / "docs" / "recipes.md"
    assert page.read_text(encoding="utf-8") == as_page(), "vitmix recipes --markdown writes it"


def test_unknown_recipe_is_refused_from_python() -> None:
    with pytest.raises(InputError, match="did you mean 'deit-small-all'"):
        get_recipe("deit-small-al")
