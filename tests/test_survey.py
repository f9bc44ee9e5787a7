"""The survey of registered models: what it says, and that its number does not fall."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

import vitmix
from vitmix.cli import main
from vitmix.survey import STAGES, model_names, survey_model

timm = pytest.importorskip("timm")
RECORD = json.loads((Path(__file__).parent.parent / "docs" / "coverage.json").read_text())
# Names of timm 1.0.31 with all four label rules and horizontal mixing; it may only grow.
LEAST = 582


def test_the_number_of_supported_names_does_not_fall() -> None:
    full = [
        name
        for name, stages in RECORD["names"].items()
        if {"attention", "aligned", "horizontal"} <= set(stages)
    ]
    assert len(full) == RECORD["full"] >= LEAST


def sample() -> list[str]:
    """A small model of each first word of a name, and some at random."""
    if timm.__version__ != RECORD["timm"]:
        return []
    rng = random.Random(0)
    words: dict[str, list[str]] = {}
    for name in RECORD["names"]:
        words.setdefault(name.split("_")[0], []).append(name)
    small = [
        min(
            names, key=lambda n: (not any(w in n for w in ("tiny", "nano", "small", "_t", "_s")), n)
        )
        for names in words.values()
    ]
    return sorted(rng.sample(small, min(16, len(small))))


@pytest.mark.parametrize("name", sample())
def test_the_record_still_holds(name: str) -> None:
    found = survey_model(name)
    assert found.refusal is None
    assert [stage for stage in sorted(STAGES) if found.reasons[stage] is None] == RECORD["names"][
        name
    ]


def test_details_of_one_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "cct_2_3x2_32"]) == 0
    text = capsys.readouterr().out
    assert "blocks      0 to 1: 8 x 8 tokens of 128 channels, attention global" in text
    assert text.count(" yes") == 7


def test_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "cct_[26]_*"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(model_names("cct_[26]_*")) > 1
    assert all("attention aligned horizontal manifold vertical" in line for line in lines)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet18", "attention between channels at most"),
        ("gernet_s", "^no attention$"),  # lists fewer stages than it has
    ],
)
def test_refusals_say_what_was_found(name: str, words: str) -> None:
    found = survey_model(name)
    assert found.backbone is None
    assert re.search(words, str(found.refusal))
    assert "not supported" in found.details()


def test_names_that_are_not_registered() -> None:
    with pytest.raises(vitmix.InputError, match="vit_nowhere"):
        survey_model("vit_nowhere")
