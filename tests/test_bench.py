"""``vitmix bench``: every group runs to its end and writes what it found. No time is tested."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch

from vitmix.bench import targets
from vitmix.bench.measure import (
    Comparison,
    Limits,
    Measured,
    Memory,
    Row,
    compare,
    peak_memory,
)
from vitmix.bench.page import MARK
from vitmix.bench.steps import VARIANTS, supported_variants
from vitmix.bench.targets import Sizes, Target, Verdict, verdicts
from vitmix.cli import main

SHORT = ["--rounds", "2", "--seconds", "0", "--device", "cpu", "--isolate", "false"]
GROUPS = {
    "steps": (["--model", "cct_4_3x2_32", "--batch-size", "2"],
              set(VARIANTS)),
    "saliency": (["--model", "cct_4_3x2_32", "--batch-size", "2", "--precision", "bf16"],
                 {"attention", "attention+baseline", "random", "rollout-1", "gradient",
                  "gradient+baseline"}),
    "horizontal": (["--batch-size", "8", "--tokens", "16"],
                   {"exact", "grouped:128", "greedy", "baseline"}),
    "pixels": (["--batch-size", "2", "--variants", "cutmix-timm,cutmix+in-place,cutmix"],
               {"cutmix-timm", "cutmix+in-place", "cutmix"}),
    "pipeline": (["--model", "cct_2_3x2_32", "--batch-size", "2", "--workers", "0",
                  "--data", "fake:10x32x8"],
                 {"step", "pipeline", "end to end"}),
}  # fmt: skip
TINY = Sizes(
    vit=("test_vit", 2),
    cct=("cct_4_3x2_32", 2),
    pixels=(2, 32),
    small=(8, 16, 4),
    large=(12, 16, 4),
    growth=(8, 160, 16, 4),
)


@pytest.mark.parametrize("group", GROUPS)
def test_groups_write_what_they_found(
    group: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, variants = GROUPS[group]
    path = tmp_path / "found.json"
    assert main(["bench", group, *arguments, *SHORT, "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert f"{group}: " in out
    assert "(2 rounds)" in out
    found = json.loads(path.read_text())
    assert found["command"].startswith("vitmix")
    machine = found["machine"]
    assert {"device", "threads", "platform", "versions", "commit", "date"} <= set(machine)
    assert machine["versions"]["torch"]
    (comparison,) = found["comparisons"]
    assert comparison["group"] == group
    assert set(comparison["variants"]) == variants
    assert comparison["base"] in variants
    for name, row in comparison["variants"].items():
        assert len(row["clock_seconds"]) == len(row["processor_seconds"]) == 2
        assert all(seconds > 0 for seconds in row["clock_seconds"])
        assert row["clock_ratio"]["low"] <= row["clock_ratio"]["median"]
        assert row["peak_bytes"] >= max(0, row["kept_bytes"])
        assert name in out
    assert all(each["reached"] is None for each in found["targets"])


def test_targets_stand_beside_their_ratios(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(targets, "SIZES", TINY)
    page, path = tmp_path / "page.md", tmp_path / "found.json"
    page.write_text(f"# By hand\n\n{MARK}\n\nwritten before\n")
    arguments = ["bench", "--write", str(page), "--json", str(path), *SHORT]
    assert main(arguments) == 0
    found = json.loads(path.read_text())
    on_cpu = [each for each in found["targets"] if not each["what"].startswith("GPU")]
    assert len(on_cpu) == len(set(map(str, on_cpu))) >= 15
    assert all(each["ratio"]["median"] > 0 for each in on_cpu)
    assert all(each["reached"] in (True, False) for each in on_cpu)
    assert all(each["reached"] is None for each in found["targets"] if each not in on_cpu)
    out, text = capsys.readouterr().out, page.read_text()
    assert text.startswith(f"# By hand\n\n{MARK}\n")
    assert "written before" not in text
    for each in on_cpu:
        assert each["what"] in out
        assert each["what"] in text
    assert "waits for a GPU" in text


def test_a_comparison_has_a_process_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "horizontal", "--batch-size", "4", "--tokens", "4", "--rounds", "1"]
    assert main([*arguments, "--device", "cpu", "--variants", "exact"]) == 0
    assert "horizontal: batch 4, 4 tokens, 384 wide (1 rounds)" in capsys.readouterr().out
    assert main([*arguments, "--device", "cpu", "--variants", "x"]) == 2
    assert "expected `assignment`" in capsys.readouterr().err


def test_models_are_asked_for_what_they_support() -> None:
    windows = supported_variants("swin_tiny_patch4_window7_224")
    assert {"tl-align", "tokenmixup-h", "transmix"} <= set(windows)
    assert not any("tokenmixup-v" in each or "baseline" in each for each in windows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed"], "one of targets, steps"),
        (["steps", "--variants", "plain,plane"], "got 'plane'"),
        (
            ["saliency", "--model", "cct_4_3x2_32", "--batch-size", "1", "--variants", "x"],
            "got 'x'",
        ),
        (["horizontal", "--variants", "x"], "expected `assignment`"),
        (["pixels", "--variants", "x"], "got 'x'"),
        (["steps", "--batch-size", "many"], "--batch-size to be whole numbers above 0"),
        (["steps", "--rounds", "0"], "--rounds to be at least 1"),
        (["steps", "--write", __file__], "expected --write to name a page with the line"),
        (["steps", "--device", "abacus"], "--device abacus"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments, "--isolate", "false"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_peak_memory_is_what_is_held_at_once() -> None:
    def work() -> torch.Tensor:
        first = torch.zeros(1000)
        second = first + 1
        del first
        return second * 2

    memory, result = peak_memory(work, "cpu")
    assert 8000 <= memory.peak < 8100  # and the numbers 1 and 2
    assert memory.kept == 4000
    assert len(result) == 1000


def test_variants_take_turns() -> None:
    calls: list[str] = []
    comparison = Comparison(
        "steps", "turns", "a", {name: partial(partial, calls.append, name) for name in "abc"}
    )
    measured = compare(comparison, "cpu", Limits(0.0, most=9, least=2))
    assert "".join(calls[:6]) == "aabbcc"
    turns = [name for name, before in zip(calls[6:], calls[5:], strict=False) if name != before]
    assert "".join(turns) == "abcba"  # the second round begins where the first ended
    assert all(len(row.clock) == 2 for row in measured.rows.values())
    assert measured.ratio("a") == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("at_least", "bound", "reached"),
    [(False, 2.0, True), (False, 1.9, False), (True, 2.0, True), (True, 2.1, False)],
)
def test_verdicts(at_least: bool, bound: float, reached: bool) -> None:
    rows = {
        "a": Row([1.0] * 3, [1.0] * 3, Memory(1, 0)),
        "b": Row([2.0] * 3, [2.0] * 3, Memory(1, 0)),
    }
    measured = Measured("steps", "x", "a", {}, 1, rows)
    target = Target("b over a", "steps: x", bound, "b", "a", at_least=at_least)
    assert Verdict(target, measured.ratio("b")).reached is reached
    assert Verdict(target, None).reached is None


def test_targets_without_their_comparison_are_not_measured() -> None:
    found = verdicts([])
    assert found
    assert all(each.ratio is None for each in found)
    assert all(math.isfinite(each.target.bound) for each in found)
