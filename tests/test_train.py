"""Methods by name, the training task, checkpoints, evaluation and comparison."""

from __future__ import annotations

import csv
import inspect
import itertools
import json
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import vitmix
from vitmix.cli import _configure_compare
from vitmix.errors import InputError
from vitmix.evaluate.checkpoint import evaluate_checkpoint
from vitmix.evaluate.compare import _command, _settings_of, compare, parse_seeds
from vitmix.evaluate.table import as_markdown, as_text, header, summarise, table_rows
from vitmix.models import create_model
from vitmix.options import Parser
from vitmix.plots.curves import read_metrics
from vitmix.plots.run_figures import save_run_figures
from vitmix.train import run as run_module
from vitmix.train.callbacks import WeightAverage
from vitmix.train.checkpoint import load_trained
from vitmix.train.config import TrainConfig
from vitmix.train.data import load_data
from vitmix.train.folder import claim_folder, read_settings
from vitmix.train.methods import LABELS, METHODS, MIXES, TOKENS, method_of, parse_method
from vitmix.train.module import NonFiniteLossError
from vitmix.train.optimiser import check_optimiser, learning_rate_factor, parameter_groups
from vitmix.train.recipes import settings_under
from vitmix.train.run import Interrupted, train_run
from vitmix.train.stages import build_mixing


def small(tmp_path: Path, **changes: Any) -> TrainConfig:
    """Two steps an epoch on 16 x 16 digits, 16 tokens."""
    settings: dict[str, Any] = {
        "train_limit": 64, "img_size": 16, "batch_size": 32, "epochs": 1, "threads": 1,
        "out": str(tmp_path / "runs"), "device": "cpu", "crop_padding": 1,
    }  # fmt: skip
    return TrainConfig(**(settings | changes))


@pytest.fixture(scope="module")
def digits() -> Any:
    return load_data(TrainConfig(train_limit=64, img_size=16))


# --- methods


def build(method: str, model: nn.Module | None = None, **options: Any) -> vitmix.MixingModel:
    model = model or create_model("cct_2_3x2_32", num_classes=10, img_size=32)
    config = TrainConfig(method=method, **options)
    return build_mixing(model, config, num_classes=10, img_size=32, teacher=model)


@pytest.mark.parametrize(
    ("method", "mix", "labels", "tokens"),
    [
        ("none", None, "AreaLabels", []),
        ("mixup", "Mixup", "AreaLabels", []),
        ("cutmix", "CutMix", "AreaLabels", []),
        ("mixup+cutmix", "OneOf", "AreaLabels", []),
        ("tokenmix", "TokenMix", "TeacherLabels", []),
        ("tokenmix-area", "TokenMix", "AreaLabels", []),
        ("transmix", "CutMix", "AttentionLabels", []),
        ("tl-align", "CutMix", "TokenAlignedLabels", []),
        ("manifold-mixup", None, "AreaLabels", ["ManifoldMixup"]),
        ("tokenmixup-h", None, "AreaLabels", ["HorizontalTokenMixup"]),
        ("tokenmixup-v", None, "AreaLabels", ["VerticalTokenMixup"]),
        ("tokenmixup", None, "AreaLabels", ["HorizontalTokenMixup", "VerticalTokenMixup"]),
        ("cutmix+tokenmixup-h", "CutMix", "AreaLabels", ["HorizontalTokenMixup"]),
        ("mixup+transmix+tokenmixup-v", "OneOf", "AttentionLabels", ["VerticalTokenMixup"]),
    ],
)
def test_names_stand_for_stages(
    method: str, mix: str | None, labels: str, tokens: list[str]
) -> None:
    mixing = build(method)
    assert (type(mixing.mix).__name__ if mixing.mix else None) == mix
    assert type(mixing.labels).__name__ == labels
    assert [type(stage).__name__ for stage in mixing.tokens] == tokens


def test_every_named_method_is_in_the_table_above() -> None:
    assert len(METHODS) == 12


def test_tl_align_uses_boxes_of_whole_tokens() -> None:
    assert build("tl-align").mix.align  # type: ignore[union-attr]
    assert not build("cutmix").mix.align  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "method", "blocks", "rho", "kappa"),
    [
        # The released CIFAR-100 configurations.
        ("cct_7_3x1_32", "tokenmixup-h", (2,), 0.005, None),
        ("cct_7_3x1_32", "tokenmixup-v", (2,), None, 80),
        ("cct_7_3x1_32", "tokenmixup", (3, 2), 0.005, 3),
        # Shallow: what is left is block 1; a quarter of the tokens, four times the threshold.
        ("cct_2_3x2_32", "tokenmixup", (1, 1), 0.02, 3),
        ("cct_2_3x2_32", "tokenmixup-v", (1,), None, 20),
    ],
)
def test_defaults_are_the_published_ones_scaled(
    name: str, method: str, blocks: tuple[int, ...], rho: float | None, kappa: int | None
) -> None:
    mixing = build(method, create_model(name, num_classes=10, img_size=32))
    stages: list[Any] = list(mixing.tokens)
    assert tuple(stage.block for stage in stages) == blocks
    if rho is not None:
        assert stages[0].rho == pytest.approx(rho)
        assert stages[0].tau == 1.0  # of the released CIFAR-10 configurations
        assert (stages[0].scorenet_weight, stages[0].stop_gradient) == (0.001, False)
    if kappa is not None:
        assert stages[-1].kappa == kappa


@pytest.mark.parametrize(("classes", "tau"), [(10, 1.0), (100, 2.0)])
def test_tau_is_the_published_one_for_as_many_classes(classes: int, tau: float) -> None:
    model = create_model("cct_7_3x1_32", num_classes=classes)
    config = TrainConfig(method="tokenmixup-h")
    mixing = build_mixing(model, config, num_classes=classes, img_size=32)
    assert mixing.tokens[0].tau == tau


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_token_models_get_the_published_imagenet_setting(smoothing: float) -> None:
    model = create_model("vit_tiny_patch16_224", num_classes=1000, img_size=224)
    config = TrainConfig(method="tokenmixup", smoothing=smoothing)
    mixing = build_mixing(model, config, num_classes=1000, img_size=224)
    horizontal, vertical = mixing.tokens
    smoothed = vitmix.functional.smooth_targets(torch.tensor([0]), 1000, smoothing)
    least = (
        float(vitmix.functional.soft_cross_entropy(smoothed.log(), smoothed)) if smoothing else 0
    )
    assert horizontal.block == 3
    assert horizontal.tau == pytest.approx(1.0 + least, abs=1e-3)  # published without smoothing
    assert horizontal.rho == pytest.approx(0.01)  # type: ignore[operator]
    assert (horizontal.stop_gradient, horizontal.scorenet_weight) == (True, 1.0)
    assert (vertical.block, vertical.kappa) == (4, 3)


def mixes(config: TrainConfig) -> list[tuple[str, float]]:
    return [(part.name, part.args.get("alpha", 1.0)) for part in method_of(config).mix]


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("none", {"mixup": 0.8}, [("mixup", 0.8)]),
        ("none", {"mixup": 0.8, "cutmix": 1.0}, [("mixup", 0.8), ("cutmix", 1.0)]),
        ("tokenmixup", {"cutmix": 0.5}, [("cutmix", 0.5)]),
        ("mixup+cutmix", {"mixup": 0.2}, [("mixup", 0.2), ("cutmix", 1.0)]),
        ("mixup+cutmix", {"mixup": 0.0}, [("cutmix", 1.0)]),
        ("tokenmix", {"mixup": 0.8}, [("mixup", 0.8), ("tokenmix", 1.0)]),
        ("cutmix", {"cutmix": 0.0, "mixup": 0.0}, []),
        ("tl-align", {"mix": "tokenmix"}, [("tokenmix", 1.0)]),
        ("tl-align", {"mix": "none"}, []),
    ],
)
def test_mixup_and_cutmix_have_timms_options(
    method: str, options: dict[str, Any], expected: list[tuple[str, float]]
) -> None:
    assert mixes(TrainConfig(method=method, **options)) == expected


def test_turns_of_pixel_mixes_have_timms_options() -> None:
    options: dict[str, Any] = {"mixup_prob": 0.9, "mixup_mode": "elem"}
    both = build("none", mixup=0.8, cutmix=1.0, mixup_switch_prob=0.3, **options).mix
    assert isinstance(both, vitmix.OneOf)
    assert both.weights == pytest.approx([0.7, 0.3])
    one = build("cutmix", **options).mix
    assert isinstance(one, vitmix.CutMix)
    for mix in (both, one):
        assert (mix.prob, mix.draw) == (0.9, "element")
    spec = {"name": "one-of", "mixers": ["mixup", "cutmix"], "weights": [3, 1], "pairing": "flip"}
    listed = build("none", mix=spec).mix
    assert isinstance(listed, vitmix.OneOf)
    assert (listed.weights, listed.pairing) == ([0.75, 0.25], "flip")
    alone = {"name": "one-of", "mixers": ["cutmix"], "prob": 0.5}
    for given, draw in (({}, "batch"), ({"mixup_mode": "elem"}, "element")):
        only = build("none", mix=alone, **given).mix
        assert (only.prob, only.draw) == (0.5, draw)


def test_stages_of_a_method_can_be_replaced() -> None:
    mixing = build("cutmix+tokenmixup", labels="aligned", tokens={"name": "vertical", "kappa": 2})
    assert isinstance(mixing.mix, vitmix.CutMix)
    assert isinstance(mixing.labels, vitmix.TokenAlignedLabels)
    (vertical,) = mixing.tokens
    assert vertical.kappa == 2
    assert not build("tokenmixup", tokens="none").tokens


EVERY_PARAMETER: dict[str, dict[str, dict[str, Any]]] = {
    "mix": {
        "mixup": {"alpha": 0.5, "prob": 0.5, "draw": "pair", "pairing": "flip"},
        "cutmix": {"alpha": 0.5, "prob": 0.5, "draw": "pair", "pairing": "flip", "align": True},
        "tokenmix": {
            "alpha": 0.5, "prob": 0.5, "draw": "pair", "pairing": "flip", "mask": "block",
            "min_block_tokens": 2, "extra_tokens": 1, "lam": 0.5, "patch": 8,
        },
    },
    "labels": {
        "area": {}, "aligned": {}, "attention": {"block": 0, "area": 0.5},
        "teacher": {"normalise": False},
    },
    "tokens": {
        "horizontal": {
            "block": 0, "tau": 1.0, "rho": 0.01, "pool": "average", "stop_gradient": True,
            "scorenet_weight": 0.5, "saliency": "rollout", "rollout_steps": 1,
            "assignment": "grouped:128", "relabel": "area", "gather": True,
        },
        "vertical": {"block": 1, "kappa": 2, "stop_gradient": True},
        "manifold": {"block": [0, 1], "alpha": 1.0, "prob": 0.5},
    },
}  # fmt: skip
KNOWN = {"mix": MIXES, "labels": LABELS, "tokens": TOKENS}


@pytest.mark.parametrize(
    ("stage", "name"),
    [(stage, name) for stage, names in EVERY_PARAMETER.items() for name in names],
)
def test_every_parameter_of_every_stage_is_settable(stage: str, name: str) -> None:
    given = EVERY_PARAMETER[stage][name]
    accepted = set(inspect.signature(getattr(vitmix, KNOWN[stage][name])).parameters)
    assert set(given) == accepted - {"teacher", "maps"}  # which the program makes
    mixing = build("none", **{stage: {"name": name, **given}})
    made: Any = {"mix": mixing.mix, "labels": mixing.labels, "tokens": [*mixing.tokens, None][0]}
    renamed = {"mask": "kind", "lam": "fixed_lam", "block": "block"}
    for option, value in given.items():
        attribute = "attention_block" if stage == "labels" and option == "block" else option
        kept = getattr(made[stage], renamed.get(attribute, attribute))
        assert kept == (tuple(value) if isinstance(value, list) else value)


def test_every_stage_is_in_the_table_above() -> None:
    assert {stage: set(names) for stage, names in KNOWN.items()} == {
        stage: set(names) for stage, names in EVERY_PARAMETER.items()
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mix": "cutmx"}, "--mix to name one of.*did you mean 'cutmix'"),
        ({"mix": {"name": "cutmix", "alhpa": 1}}, "in --mix, got 'alhpa'; did you mean 'alpha'"),
        ({"mix": [{"name": "cutmix", "draw": "pair"}, "mixup"]}, "for all pixel mixes together"),
        ({"mix": {"name": "one-of", "mixer": []}}, "did you mean 'mixers'"),
        ({"mix": {"name": "one-of", "mixers": ["cutmix", "mixup"], "weights": [1]}}, "2 mixers"),
        ({"mix": 3}, "--mix to name one of"),
        ({"labels": ["area", "aligned"]}, "one way to make labels in --labels"),
        ({"tokens": {"name": "horizontal", "rho": "much"}}, "rho"),
        ({"tokens": {"name": "vertical", "kappa": "x"}}, "arguments that fit VerticalTokenMixup"),
        ({"cutmix": 1.0, "mixup_switch_prob": 0.5}, "two pixel mixes for --mixup-switch-prob"),
        ({"mixup_prob": 0.5}, "uses --mixup-prob"),
        ({"mixup_mode": "pair"}, "uses --mixup-mode"),
    ],
)
def test_stages_that_do_not_exist(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build("none", **options)


def test_options_override_defaults() -> None:
    stages: list[Any] = list(
        build("tokenmixup", tau=math.inf, rho=0.1, kappa=5, block=0, vertical_block=1).tokens
    )
    assert (stages[0].block, stages[0].tau, stages[0].rho) == (0, math.inf, 0.1)
    assert (stages[1].block, stages[1].kappa) == (1, 5)
    assert build("cutmix", alpha=0.3).mix.alpha == 0.3  # type: ignore[union-attr]


def test_yaml_file_combines_stages(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "mix: {name: tokenmix, mask: random}\n"
        "labels: aligned\n"
        "tokens:\n  - {name: horizontal, args: {block: 0, tau: inf}}\n  - name: vertical\n"
    )
    mixing = build(str(path))
    horizontal, vertical = mixing.tokens
    assert mixing.mix.kind == "random"  # type: ignore[union-attr]
    assert type(mixing.labels).__name__ == "TokenAlignedLabels"
    assert (horizontal.block, horizontal.tau) == (0, math.inf)
    assert (vertical.block, vertical.kappa) == (1, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mixx: cutmix", "got 'mixx'; did you mean 'mix'"),
        ("mix: cutmx", "got 'cutmx'; did you mean 'cutmix'"),
        ("labels: algined", "did you mean 'aligned'"),
        ("labels: [area, aligned]", "one way to make labels"),
        ("tokens: {name: horizontal, tua: 1}", "got 'tua'; did you mean 'tau'"),
        ("tokens: [3]", "got None"),
        ("- cutmix", "got 'nothing'|expected only the keys"),
        ("mix: [", "expected YAML"),
    ],
)
def test_bad_method_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        parse_method(str(path))


# --- optimiser and schedule


def test_schedule_warms_up_then_falls_to_its_floor() -> None:
    factors = [learning_rate_factor(step, 100, 10, 0.01) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(factors) == 1.0
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))
    assert factors[-1] == pytest.approx(0.01, abs=1e-3)
    assert factors[55] == pytest.approx(0.505)  # half way down


def test_norms_and_biases_do_not_decay() -> None:
    mixing = build("tokenmixup")
    decayed, kept = parameter_groups(mixing, TrainConfig(weight_decay=0.1))
    assert decayed["weight_decay"] == 0.1
    assert kept["weight_decay"] == 0
    assert {p.ndim for p in kept["params"]} == {1}
    assert min(p.ndim for p in decayed["params"]) > 1
    assert len(decayed["params"]) + len(kept["params"]) == len(list(mixing.parameters()))


def test_what_a_timm_model_names_does_not_decay() -> None:
    model = create_model("deit_tiny_distilled_patch16_224", num_classes=10, img_size=32)
    decayed, kept = parameter_groups(build("tl-align", model), TrainConfig())
    for name in ("cls_token", "dist_token", "pos_embed"):
        parameter = getattr(model, name)
        assert any(parameter is p for p in kept["params"])
        assert not any(parameter is p for p in decayed["params"])


def test_layer_decay_lowers_the_rate_layer_by_layer() -> None:
    model: Any = create_model("vit_tiny_patch16_224", num_classes=10, img_size=32, depth=3)
    config = TrainConfig(method="tokenmixup-h", layer_decay=0.5, lr=1.0, weight_decay=0.1)
    mixing = build_mixing(model, config, num_classes=10, img_size=32)
    groups = parameter_groups(mixing, config)
    assert sum(len(group["params"]) for group in groups) == len(list(mixing.parameters()))
    rates = {id(p): group.get("lr", 1.0) for group in groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    blocks = [model.blocks[index].attn.qkv.weight for index in range(3)]
    assert [rates[id(p)] for p in (*blocks, model.head.weight)] == [0.125, 0.25, 0.5, 1.0]
    assert rates[id(model.pos_embed)] == rates[id(model.patch_embed.proj.weight)] == 0.0625
    assert rates[id(mixing.tokens[0].scorenet.fc.weight)] == 1.0  # type: ignore[union-attr]
    assert decays[id(blocks[0])] == 0.1
    assert decays[id(model.pos_embed)] == 0
    with pytest.raises(InputError, match="timm model for --layer-decay"):
        parameter_groups(build("none"), config)


@pytest.mark.parametrize("opt", ["adamw", "sgd", "lamb", "lookahead_adamw"])
def test_optimisers_by_timms_names(tmp_path: Path, digits: Any, opt: str) -> None:
    config = small(tmp_path, opt=opt, lr=1e-3, opt_kwargs={"momentum": 0.7} if opt == "sgd" else {})
    result = train_run(config, data=digits)
    optimiser = result.task.optimizers()
    if opt == "sgd":
        assert optimiser.param_groups[0]["momentum"] == 0.7
    assert math.isfinite(result.results["loss"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"opt": "adamww"}, "optimiser of timm.*'adamww'; did you mean 'adamw'"),
        ({"opt_kwargs": {"betta": 1}}, "--opt-kwargs to be arguments of adamw.*betta"),
        ({"opt_kwargs": {"betas": [2, 3]}}, "--opt-kwargs to be arguments of adamw.*beta"),
    ],
)
def test_optimisers_that_do_not_exist(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_optimiser(TrainConfig(**changes))


def test_binary_cross_entropy_is_a_choice(tmp_path: Path, digits: Any) -> None:
    task = train_run(small(tmp_path, bce_loss=True), data=digits).task
    images, labels = torch.zeros(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    out = task.mixing.train()(images, labels)
    expected = nn.functional.binary_cross_entropy_with_logits(out.logits, out.targets)
    assert torch.equal(out.loss(task.criterion), expected)


def test_average_follows_its_definition() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixing = nn.Module()
            self.mixing.model = nn.Linear(2, 2, bias=False)

    holder: Any = Holder()
    average = WeightAverage(0.5)
    average.on_train_start(None, holder)  # type: ignore[arg-type]
    expected = holder.mixing.model.weight.detach().clone()
    for step in range(12):
        with torch.no_grad():
            holder.mixing.model.weight.normal_(generator=torch.Generator().manual_seed(step))
        average.on_train_batch_end(None, holder)  # type: ignore[arg-type]
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * holder.mixing.model.weight.detach()
    torch.testing.assert_close(average.average["weight"], expected)
    before = holder.mixing.model.weight.detach().clone()
    average.on_validation_start(None, holder)  # type: ignore[arg-type]
    torch.testing.assert_close(holder.mixing.model.weight.detach(), expected)
    average.on_validation_end(None, holder)  # type: ignore[arg-type]
    assert torch.equal(holder.mixing.model.weight.detach(), before)


# --- runs


@pytest.mark.parametrize("method", [*METHODS, "tl-align+tokenmixup"])
def test_every_method_trains(tmp_path: Path, digits: Any, method: str) -> None:
    result = train_run(small(tmp_path, method=method, teacher="auto"), data=digits)
    assert math.isfinite(result.results["loss"])
    assert json.loads((result.folder / "results.json").read_text()) == result.results
    keys = read_metrics(result.folder).keys()
    assert {"train/loss", "val/top1", "lr"} <= keys
    if "tokenmixup" in method and method != "tokenmixup-v":
        assert {"horizontal_1/mixed_samples", "horizontal_1/mixed_tokens"} <= keys


@pytest.mark.parametrize("ema", [False, True])
def test_run_leaves_everything_and_evaluate_agrees(tmp_path: Path, digits: Any, ema: bool) -> None:
    result = train_run(
        small(tmp_path, method="tokenmixup", tau=math.inf, epochs=2, model_ema=ema, lr=3e-3),
        data=digits,
    )
    results = result.results
    for name in ("config.yaml", "results.json", "metrics.csv", "last.ckpt", "best.ckpt"):
        assert (result.folder / name).is_file()
    assert list((result.folder / "tensorboard").glob("events*"))
    expected = {"top1", "top5", "loss", "seed", "device", "seconds", "versions", "commit", "config"}
    assert expected <= results.keys()
    assert results["best_top1"] >= results["top1"]
    for name, figure in (("", "top1"), ("best.ckpt", "best_top1")):
        scores = json.loads(evaluate_checkpoint(str(result.folder / name), json=True))
        assert scores["top1"] == pytest.approx(results[figure], abs=1e-4)
    line = evaluate_checkpoint(str(result.folder))
    assert f"top-1 {results['top1']:.2f}%" in line
    content = torch.load(result.folder / "last.ckpt", weights_only=True)
    assert (content["vitmix"]["averaged"] is not None) == ema
    paths = {path.name for path in save_run_figures(result)}
    assert {"curves.png", "mixing.png"} <= paths


def test_same_seed_same_weights(tmp_path: Path, digits: Any) -> None:
    def weights(seed: int) -> torch.Tensor:
        config = small(tmp_path, method="cutmix+tokenmixup", seed=seed, aa="rand-m5", reprob=0.3)
        model = train_run(config, data=digits).task.mixing.model
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    first = weights(1)
    assert torch.equal(first, weights(1))
    assert not torch.equal(first, weights(2))


def test_learning_happens(tmp_path: Path) -> None:
    config = small(tmp_path, train_limit=320, epochs=12, lr=3e-3, img_size=16, crop_padding=0)
    result = train_run(config)
    assert result.results["top1"] > 50
    with (result.folder / "metrics.csv").open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("max_steps", "epochs"), [(1, 1), (2, 1), (3, 2), (9, 3)])
def test_steps_have_a_limit(tmp_path: Path, digits: Any, max_steps: int, epochs: int) -> None:
    result = train_run(small(tmp_path, max_steps=max_steps, epochs=3), data=digits)
    assert result.task.global_step == min(max_steps, 6)
    assert (result.results["steps"], result.results["epochs"]) == (min(max_steps, 6), epochs)
    assert math.isfinite(result.results["loss"])


def test_epochs_between_two_tests(
    tmp_path: Path, digits: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(tmp_path, epochs=5, eval_epochs=2)
    run = train_run(config, data=digits)
    assert [entry["epoch"] for entry in run.task.history] == [2, 4, 5]
    assert run.results["epochs"] == 5
    assert run.results["best_epoch"] in (2, 4, 5)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert [line.split()[1] for line in lines] == ["2/5", "4/5", "5/5"]
    always = train_run(replace(config, eval_epochs=1), data=digits)
    assert always.results["top1"] == run.results["top1"]
    stopped = train_run(replace(config, max_steps=1), data=digits)
    assert [entry["epoch"] for entry in stopped.task.history] == [1]


def test_arguments_of_the_model_are_kept_with_it(tmp_path: Path, digits: Any) -> None:
    config = small(tmp_path, model_kwargs={"num_layers": 1, "embed_dim": 64})
    result = train_run(config, data=digits)
    assert len(load_trained(result.folder).model.classifier.blocks) == 1  # type: ignore[union-attr,arg-type]
    with pytest.raises(InputError, match="--model-kwargs to be arguments of"):
        train_run(small(tmp_path, model_kwargs={"deep": 1}), data=digits)


def test_teacher_from_a_checkpoint_or_an_earlier_run(tmp_path: Path, digits: Any) -> None:
    plain = train_run(small(tmp_path), data=digits)
    config = small(tmp_path, method="tokenmix", teacher=str(plain.folder / "last.ckpt"))
    given = train_run(config, data=digits)
    reused = train_run(replace(config, teacher="auto"), data=digits, teacher_run=plain.folder)
    for result in (given, reused):
        assert not (result.folder / "teacher").exists()
        teacher = result.task.mixing.labels.maps.teacher
        for key, value in plain.task.mixing.model.state_dict().items():
            assert torch.equal(teacher.state_dict()[key], value)
        saved = torch.load(result.folder / "last.ckpt", weights_only=True)["state_dict"]
        assert not [key for key in saved if "teacher" in key]
    trained = train_run(replace(config, teacher="auto"), data=digits)
    assert (trained.folder / "teacher" / "results.json").is_file()


def test_compiled(tmp_path: Path, digits: Any) -> None:
    weights = []
    with torch.compiler.set_stance(force_backend="eager"):
        for compiled in (False, True):
            counters.clear()
            config = small(tmp_path, method="tokenmixup", compile=compiled)
            weights.append(train_run(config, data=digits).task.mixing.state_dict())
            assert (counters["stats"]["unique_graphs"] > 0) == compiled
    torch.testing.assert_close(*weights)


def test_bf16_and_channels_last(tmp_path: Path, digits: Any) -> None:
    config = small(tmp_path, method="tokenmixup", precision="bf16", channels_last=True)
    result = train_run(config, data=digits)
    scores = json.loads(evaluate_checkpoint(str(result.folder), json=True))
    assert scores["top1"] == pytest.approx(result.results["top1"], abs=0.6)  # two images of 359


def test_broken_loss_stops_and_keeps_the_last_checkpoint(
    tmp_path: Path, digits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(tmp_path, epochs=5)
    step = vitmix.MixingModel.forward
    calls = []

    def forward(
        self: vitmix.MixingModel, images: torch.Tensor, targets: Any = None, **others: Any
    ) -> Any:
        if targets is not None:
            calls.append(1)
            if len(calls) == 5:  # one dry run, two steps in epoch 1, the second step of epoch 2
                images = images * math.nan
        return step(self, images, targets, **others)

    monkeypatch.setattr(vitmix.MixingModel, "forward", forward)
    with pytest.raises(NonFiniteLossError, match=r"nan in step 4 \(epoch 2\).*last.ckpt") as error:
        train_run(config, data=digits)
    path = re.search(r"checkpoint is (\S+);", str(error.value))
    assert path is not None
    model = load_trained(path[1]).model
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_interrupt_leaves_a_usable_checkpoint(
    tmp_path: Path, digits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    handler = signal.getsignal(signal.SIGINT)
    calls = []

    def interrupted(self: Any, *args: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(run_module.ConsoleProgress, "on_train_batch_end", interrupted)
    with pytest.raises(Interrupted, match=r"the checkpoint is .*last.ckpt"):
        train_run(small(tmp_path, epochs=5, model_ema=True, name="stopped"), data=digits)
    assert signal.getsignal(signal.SIGINT) is handler
    folder = tmp_path / "runs" / "stopped"
    assert not (folder / "results.json").exists()
    assert "top-1" in evaluate_checkpoint(str(folder))


# --- checkpoints


def test_wrong_checkpoints_are_refused(tmp_path: Path, digits: Any) -> None:
    run = train_run(small(tmp_path), data=digits).folder
    with pytest.raises(InputError, match="there is no"):
        load_trained(tmp_path / "nothing.ckpt")
    with pytest.raises(InputError, match=r"there is no .*last.ckpt"):
        load_trained(tmp_path)
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(InputError, match="cannot be read"):
        load_trained(tmp_path / "text.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(InputError, match="that vitmix train wrote"):
        load_trained(tmp_path / "foreign.ckpt")
    torch.save(nn.Linear(1, 1), tmp_path / "pickle.ckpt")
    with pytest.raises(InputError, match="cannot be read"):
        load_trained(tmp_path / "pickle.ckpt")
    with pytest.raises(InputError, match=r"checkpoint of cct_4_3x2_32 .* got one of cct_2_3x2_32"):
        evaluate_checkpoint(str(run), model="cct_4_3x2_32")
    data = tmp_path / "pets"
    for name in ("cat", "dog"):
        (data / name).mkdir(parents=True)
        for index in range(3):
            from PIL import Image

            Image.new("RGB", (16, 16), (index, 0, 0)).save(data / name / f"{index}.png")
    with pytest.raises(InputError, match=r"test images of the 10 classes .* got 2 classes"):
        evaluate_checkpoint(str(run), data=str(data))


# --- folders


def test_folders_are_never_written_over(tmp_path: Path) -> None:
    out, settings = str(tmp_path), {"lr": 0.1}
    assert claim_folder(out, None, "run", False, settings).name == "run"
    second = claim_folder(out, None, "run", False, settings)
    assert second.name == "run-2"
    assert read_settings(second) == settings
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match=r"exists and is not empty.*--overwrite"):
        claim_folder(out, "mine", "run", False, settings)
    with pytest.raises(InputError, match="holds something else"):
        claim_folder(out, "mine", "run", True, settings)
    assert (mine / "thesis.txt").read_text() == "precious"
    (mine / "config.yaml").write_text("")
    assert claim_folder(out, "mine", "run", True, settings) == mine
    assert [path.name for path in mine.iterdir()] == ["config.yaml"]
    (tmp_path / "empty").mkdir()
    assert claim_folder(out, "empty", "run", False, settings) == tmp_path / "empty"
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run-2", "mine", "empty"}


# --- comparison


@pytest.mark.parametrize(
    ("settings", "seeds"),
    [
        (TrainConfig(data="fake:3x32x16", mean=[0.1, 0.2, 0.3], lr=1e-05, tau="auto:0.5"), [2]),
        (TrainConfig(model_kwargs={"num_layers": 3}, channels_last=True, download=True), [0, 1]),
        (TrainConfig(recipe="cct7-cifar100", data="my data", epochs=3, mixup=0.3), [4, 7]),
    ],
)
def test_the_command_of_a_report_does_it_again(settings: TrainConfig, seeds: list[int]) -> None:
    recipe = {} if settings.recipe is None else {"recipe": settings.recipe}
    base = settings_under(recipe, whole_method=True)
    plain = TrainConfig().to_dict()
    given = {key: value for key, value in settings.to_dict().items() if value != plain[key]}
    settings = TrainConfig.from_dict(base | given | {"seed": seeds[0], "out": "elsewhere"})
    words = shlex.split(_command(settings, ["none", "cutmix"], seeds))
    assert words[:2] == ["vitmix", "compare"]
    parser = Parser("vitmix compare", "compare", "")
    _configure_compare(parser)
    found = parser.parse(words[2:])
    assert found["methods"] == "none,cutmix"
    assert parse_seeds(found["seeds"] or "1", found.get("seed", 0)) == seeds
    again = TrainConfig.from_dict(found | {"seed": seeds[0], "out": "elsewhere"})
    assert again == settings


def test_rows_are_named_by_what_all_of_them_got(tmp_path: Path) -> None:
    config = small(tmp_path, tau=None, mixup=0.8, max_steps=1, epochs=1)
    assert [row["method"] for row in compare(config, ["none", "tl-align"], [0]).summaries] == [
        "none (mixup)",
        "tl-align (mixup+cutmix+aligned)",
    ]


def test_comparison_writes_table_plots_and_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(tmp_path, tau=None, name="all")
    comparison = compare(config, ["cutmix", "tokenmix", "tokenmixup", "none"], [3, 4])
    folder = comparison.folder
    document = json.loads((folder / "compare.json").read_text())
    assert [row["method"] for row in document["methods"]] == [
        "cutmix", "tokenmix", "tokenmixup", "none",
    ]  # fmt: skip
    assert len(document["runs"]) == 8
    row = document["methods"][0]
    first, second = row["top1_runs"]
    assert row["top1"] == pytest.approx((first + second) / 2)
    assert row["top1_sd"] == pytest.approx(abs(first - second) / math.sqrt(2))
    assert not (folder / "tokenmix-seed3" / "teacher").exists()  # the plain run is the teacher
    assert (folder / "compare.png").stat().st_size > 5000
    assert "| cutmix |" in (folder / "compare.md").read_text()
    page = comparison.report.read_text()
    assert not re.findall(r'(?:src|href|srcset)="(?!data:)', page)
    assert page.count("<picture>") >= 5
    assert "prefers-color-scheme: dark" in page
    assert "±" in capsys.readouterr().out


def test_tables_align_and_name_the_reference() -> None:
    runs = [{"seed": 0, "top1": 90.0, "top5": 99.0, "loss": 0.4, "best_top1": 91, "seconds": 3.0}]
    better = [{**runs[0], "top1": 91.5}]
    summaries = [summarise("none", runs), summarise("cutmix", better)]
    rows = table_rows(summaries)
    assert rows[1] == ["cutmix", "1", "91.50", "99.00", "0.400", "+1.50", "3 s"]
    assert header(summaries)[5] == "top-1 vs. none"
    lines = as_text(header(summaries), rows).splitlines()
    assert len({line.index("9") for line in lines[2:]}) == 1
    assert as_markdown(header(summaries), rows).count("\n") == 4


def test_options_of_one_method_are_kept_from_the_others() -> None:
    config = TrainConfig(tau=1.0, kappa=2, alpha=0.5)
    chosen = {name: _settings_of(config, name) for name in ("none", "cutmix", "tokenmixup")}
    options = {name: (c.tau, c.kappa, c.alpha) for name, c in chosen.items()}
    assert options == {
        "none": (None, None, None),
        "cutmix": (None, None, 0.5),
        "tokenmixup": (1.0, 2, None),
    }


@pytest.mark.parametrize("text", ["0", "-1", "a", "1,1", "1,-2", ""])
def test_bad_seeds(text: str) -> None:
    with pytest.raises(InputError, match="--seeds"):
        parse_seeds(text, 0)
