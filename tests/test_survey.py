"""The survey of registered models: what it says of them."""

from __future__ import annotations

import pytest

import vitmix
from vitmix.cli import main
from vitmix.survey import model_names, survey_model

pytest.importorskip("timm")


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


def test_refusals_say_what_was_found() -> None:
    found = survey_model("resnet18")
    assert (found.backbone, found.refusal) == (None, "no transformer that is known")
    assert "not supported" in found.details()
    with pytest.raises(vitmix.InputError, match="vit_nowhere"):
        survey_model("vit_nowhere")
