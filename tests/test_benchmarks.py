"""``vitmix bench``: every group runs to its end and writes what it found. No time is tested."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from vitmix.benchmarks import steps, targets
from vitmix.benchmarks.measure import (
    Comparison,
    Limits,
    Measured,
    Memory,
    Row,
    compare,
    peak_memory,
)
from vitmix.benchmarks.options import BenchOptions
from vitmix.benchmarks.page import MARK, target_rows
from vitmix.benchmarks.pipeline import pipeline_comparison
from vitmix.benchmarks.steps import VARIANTS, supported_variants
from vitmix.benchmarks.targets import Sizes, Target, Verdict, verdicts
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
                 {"step", "pipeline", "end to end", "product"}),
}  # fmt: skip
TINY = Sizes(
    vit=("test_vit", 2),
    cct=("cct_4_3x2_32", 2),
    pixels=(2, 32),
    small=(8, 16, 4),
    large=(12, 16, 4),
    growth=(8, 160, 16, 4),
    pipeline=("cct7-cifar100", "cct_2_3x2_32", 2),
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


def test_every_target_of_a_gpu_has_its_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made on the CPU here, not run."""
    monkeypatch.setattr(targets, "SIZES", TINY)
    options = BenchOptions(device="cuda", data="fake:10x32x8", workers=0)
    made = set()
    for job in targets.comparisons(options):
        assert "cuda" in job.args or job.args[0].device == "cuda"
        on_cpu = (
            replace(each, device="cpu") if isinstance(each, BenchOptions) else each
            for each in ("cpu" if each == "cuda" else each for each in job.args)
        )
        made.add(job.make(*on_cpu).key)
    wanted = [each for each in targets.targets() if each.on_gpu]
    assert {each.key for each in wanted} == made
    assert [each.unit for each in wanted].count("s") == 2


def test_training_end_to_end_has_epochs_and_a_share_of_products() -> None:
    options = BenchOptions(
        models=("cct_2_3x2_32",), batch_sizes=(2,), data="fake:10x32x8", workers=0
    )
    measured = compare(pipeline_comparison(options), "cpu", Limits(0.0, most=1, least=1))
    rows = {name: row.figures for name, row in measured.rows.items()}
    assert rows["product"]["of product"] == 1.0
    assert set(rows["pipeline"]) == {"images/s", "s/epoch"}
    for name in ("step", "end to end"):
        figures = rows[name]
        assert figures["s/epoch"] == pytest.approx(50_000 / figures["images/s"])
        share = figures["TFLOP/s"] / rows["product"]["TFLOP/s"]
        assert 0 < figures["of product"] == pytest.approx(share)
    target = Target("", measured.key, 4.0, "end to end", "end to end", "s/epoch", unit="s")
    assert target.read(measured).median == rows["end to end"]["s/epoch"]


def test_a_comparison_has_a_process_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "horizontal", "--batch-size", "4", "--tokens", "4", "--rounds", "1"]
    assert main([*arguments, "--device", "cpu", "--variants", "exact"]) == 0
    assert "horizontal: batch 4, 4 tokens, 384 wide (1 rounds)" in capsys.readouterr().out
    assert main([*arguments, "--device", "cpu", "--variants", "x"]) == 2
    assert "expected `assignment`" in capsys.readouterr().err


def test_steps_are_compiled_where_there_is_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    for compiler, count in ((None, 0), ("/usr/bin/g++", 2)):
        monkeypatch.setattr("shutil.which", lambda _, found=compiler: found)
        jobs = list(steps.comparisons(BenchOptions(device="cpu")))
        compiled = [job for job in jobs if "plain+compiled" in job.args[2]]
        assert (len(jobs), len(compiled)) == (4 + count, count)


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
    ("at_least", "bound", "by_clock", "by_processor", "said"),
    [
        (False, 2.0, True, False, "reached"),
        (False, 1.9, False, False, "not reached"),
        (True, 2.0, True, True, "reached"),
        (True, 2.1, False, True, "reached by processor time"),
        (True, 3.1, False, False, "not reached"),
    ],
)
def test_verdicts(
    at_least: bool, bound: float, by_clock: bool, by_processor: bool, said: str
) -> None:
    rows = {
        "a": Row([1.0] * 3, [1.0] * 3, Memory(1, 0)),
        "b": Row([2.0] * 3, [3.0] * 3, Memory(1, 0)),
    }
    measured = Measured("steps", "x", "a", {}, 1, rows)
    target = Target("b over a", "steps: x", bound, "b", "a", at_least=at_least)
    verdict = Verdict(target, measured.ratio("b"), measured.ratio("b", kind="processor"))
    assert verdict.reached is by_clock
    assert verdict.reached_by_processor is by_processor
    assert target_rows([verdict])[0][-1] == said
    assert Verdict(target).reached is Verdict(target).reached_by_processor is None


def test_targets_without_their_comparison_are_not_measured() -> None:
    found = verdicts([])
    assert found
    assert all(each.ratio is None for each in found)
    assert all(math.isfinite(each.target.bound) for each in found)
