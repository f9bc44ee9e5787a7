"""Stages of one's own in place of those of vitmix, named in settings; the released mask is one."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import vitmix
from golden import load_golden
from models import NUM_CLASSES, batch, make_cct
from vitmix.cli import main
from vitmix.functional import apply_horizontal
from vitmix.train.config import TrainConfig
from vitmix.train.methods import method_name, method_of, own_class
from vitmix.train.stages import build_mixing

STUDIES = Path(__file__).parent.parent / "studies"
RELEASED = f"{STUDIES / 'released_mask.py'}:ReleasedMask"
MINE = """
import torch
import vitmix


class Halves(vitmix.LabelRule):
    def __init__(self, own=0.5):
        self.own = own

    def weights(self, evidence):
        shares = torch.zeros_like(evidence.area)
        shares[:, 0] = self.own
        shares[:, 1] = 1 - self.own
        return shares


class Small(vitmix.CutMix):
    def __init__(self, alpha=0.2):
        super().__init__(alpha=alpha)


limit = 3
"""


@pytest.fixture
def mine(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return str(path)


def settled(**options: Any) -> vitmix.MixingModel:
    torch.manual_seed(0)
    config = TrainConfig(**options)
    return build_mixing(make_cct(), config, num_classes=NUM_CLASSES, img_size=32)


def test_own_classes_take_their_places(mine: str) -> None:
    options: dict[str, Any] = {
        "mix": {"name": "cutmix", "class": f"{mine}:Small", "alpha": 0.3},
        "tokens": {"name": "horizontal", "class": RELEASED, "tau": "inf", "block": 2},
    }
    mixing = settled(**options)
    assert type(mixing.mix).__name__ == "Small"
    assert mixing.mix.alpha == 0.3  # type: ignore[union-attr]
    (stage,) = mixing.tokens
    assert type(stage).__name__ == "ReleasedMask"
    assert (stage.block, stage.rho) == (2, pytest.approx(0.005 * 256 / 64))  # as by default
    assert method_name(TrainConfig(**options)) == "cutmix:Small+horizontal:ReleasedMask"
    assert method_of(TrainConfig(**options)) == method_of(TrainConfig(**options))
    images, targets = batch(8)
    mixing.train()(images, targets).loss().backward()
    copied = pickle.loads(pickle.dumps(mixing))
    assert type(copied.mix) is type(mixing.mix)
    assert own_class(f"{mine}:Small", "CutMix", "here") is type(mixing.mix)  # read once


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("mix", "{mine}:Smal", "did you mean 'Small'"),
        ("mix", "{mine}:Halves", "subclass of vitmix.PixelMix"),
        ("mix", "{mine}:limit", "subclass of vitmix.PixelMix"),
        ("mix", "nowhere.py:Small", "No such file"),
        ("mix", "no_module_of_mine:Small", "No module named"),
        ("mix", "Small", "as file.py:Class or module:Class"),
    ],
)
def test_classes_that_do_not_fit(mine: str, option: str, value: str, message: str) -> None:
    config = TrainConfig(**{option: {"name": "cutmix", "class": value.format(mine=mine)}})
    with pytest.raises(vitmix.InputError, match=message):
        method_of(config)


def test_arguments_are_those_of_the_own_class(mine: str) -> None:
    entry = {"name": "cutmix", "class": f"{mine}:Small", "align": True}
    with pytest.raises(vitmix.InputError, match="expected arguments alpha for cutmix"):
        method_of(TrainConfig(mix=entry))


def test_a_file_with_a_mistake_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("class Small(")
    with pytest.raises(vitmix.InputError, match="never closed"):
        own_class(f"{path}:Small", "CutMix", "here")
    path.write_text(MINE)
    assert own_class(f"{path}:Small", "CutMix", "here").__name__ == "Small"


def test_training_with_an_own_label_rule(mine: str, tmp_path: Path) -> None:
    labels = f"{{name: area, class: '{mine}:Halves', own: 0.75}}"
    data = ["--data", "fake:3x16x24", "--model", "cct_2_3x2_32", "--batch-size", "8"]
    more = ["--epochs", "1", "--out", str(tmp_path), "--name", "run"]
    assert main(["train", *data, *more, "--mix", "cutmix", "--labels", labels]) == 0
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    own = rows[0].split(",").index("target/own_weight")
    assert float(rows[1].split(",")[own]) == pytest.approx(0.75)


@pytest.mark.parametrize("name", ["htm_mean", "htm_cls"])
def test_released_mask_is_the_recorded_one(name: str) -> None:
    released_plan = own_class(RELEASED, "HorizontalTokenMixup", "here").plan.__globals__[
        "released_plan"
    ]
    recorded = load_golden(name)
    for label in recorded["cases"]:
        if f"{label}/mask_official" not in recorded:
            pytest.skip("needs all recorded arrays (VITMIX_GOLDEN)")
        keys = ("easy", "S", "easy_index", "sigma", "rho", "mask_official", "x", "y")
        case = {key: recorded[f"{label}/{key}"] for key in (*keys, "x_official", "y_official")}
        easy, saliency = torch.from_numpy(case["easy"]), torch.from_numpy(case["S"])
        partner = torch.arange(len(easy))
        partner[torch.from_numpy(case["easy_index"])] = torch.from_numpy(case["sigma"])
        plan = released_plan(saliency, easy, partner, float(case["rho"]))
        assert torch.equal(plan.replace[easy], torch.from_numpy(case["mask_official"]))
        prefix = case["x"].shape[1] - case["S"].shape[1]
        tokens, targets = apply_horizontal(
            torch.from_numpy(case["x"]), torch.from_numpy(case["y"]), plan,
            num_prefix_tokens=prefix,
        )  # fmt: skip
        assert torch.equal(tokens, torch.from_numpy(case["x_official"]))
        torch.testing.assert_close(targets, torch.from_numpy(case["y_official"]))


def test_released_mask_takes_numbers_only() -> None:
    mixing = settled(tokens={"name": "horizontal", "class": RELEASED, "tau": "auto:0.5"})
    with pytest.raises(vitmix.InputError, match="as in the released code"):
        mixing.train()(*batch(4))
