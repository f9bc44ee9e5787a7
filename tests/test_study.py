"""Studies: tables of settings, trained cell by cell, of which only what is missing is trained."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy import stats

import vitmix
from vitmix.cli import main
from vitmix.evaluate.study import read_study, studies
from vitmix.evaluate.study_results import measures_in, taken_on
from vitmix.evaluate.study_tables import ROUNDED, paired
from vitmix.train.folder import claim_folder, held
from vitmix.train.methods import method_name

ROOT = Path(__file__).parent.parent
STUDY = """
title: A small one
seeds: 2
against: [none]
settings: {data: "fake:3x32x16", model: cct_2_3x2_32, epochs: 1, batch_size: 8}
cells:
  none: {}
  aligned: {method: tl-align}
  both: {tokens: [horizontal, vertical]}
"""


@pytest.fixture
def study(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(STUDY)
    return str(path)


@pytest.mark.parametrize("name", list(studies()))
def test_studies_of_vitmix_are_well_formed(name: str) -> None:
    study = read_study(name)
    assert len(study.cells) >= 5
    assert study.against
    digests = {cell.digest(seed) for cell in study.cells for seed in range(2)}
    assert len(digests) == 2 * len(study.cells)  # no two cells are the same


@pytest.mark.parametrize("name", ["digits", "cifar10-few"])
def test_studies_of_the_released_mask_share_their_runs(name: str) -> None:
    mask, study = read_study(str(ROOT / f"studies/mask-{name}.yaml")), read_study(name)
    shared = {cell.folder(0) for cell in mask.cells} & {cell.folder(0) for cell in study.cells}
    assert len(shared) == 2
    assert mask.seeds == study.seeds


@pytest.mark.filterwarnings("ignore")
def test_every_cell_of_the_study_for_gpus_trains(tmp_path: Path) -> None:
    """Two steps of each on the CPU, with few images."""
    command = ["study", "cifar100-gpu", "--data", "fake:100x32x8", "--max-steps", "2"]
    small = ["--batch-size", "4", "--precision", "fp32"]
    small += ["--model-kwargs", "{num_layers: 5, embed_dim: 64, mlp_ratio: 1}"]
    assert main([*command, *small, "--workers", "0", "--out", str(tmp_path)]) == 0
    runs = [json.loads(path.read_text()) for path in tmp_path.glob("*/results.json")]
    assert {run["steps"] for run in runs} == {2}
    assert len(runs) == len(read_study("cifar100-gpu").cells)


def test_paired_differences() -> None:
    first, second = [1.0, 2.5, 3.0, 3.5], [0.5, 2.0, 3.25, 1.0]
    found = paired(first, second)
    differences = [one - other for one, other in zip(first, second, strict=True)]
    interval = stats.ttest_rel(first, second).confidence_interval()
    assert found["mean"] == pytest.approx(sum(differences) / 4)
    assert found["mean"] - found["half_width"] == pytest.approx(interval.low)
    assert found["mean"] + found["half_width"] == pytest.approx(interval.high)
    assert found["p"] == pytest.approx(stats.ttest_rel(first, second).pvalue)
    assert paired([1.0], [0.5]) == {"mean": 0.5, "seeds": 1}
    assert paired([1.0, 2.0], [0.5, 1.5])["p"] is None
    # Three images of 359 more at every seed, in percent with four digits.
    found = paired([98.8858, 98.3287, 97.7716], [98.0501, 97.4930, 96.9359], ROUNDED)
    assert (found["p"], found["sd"]) == (None, 0.0)


def test_only_what_is_missing_is_trained(
    study: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs"
    assert main(["study", study, "--out", str(out), "--cells", "none,aligned"]) == 0
    first = capsys.readouterr().out
    assert "4 runs, 4 to train" in first
    runs = sorted(path.parent.name for path in out.glob("*/results.json"))
    assert [name.rpartition("-")[0] for name in runs] == [
        "aligned-seed0", "aligned-seed1", "none-seed0", "none-seed1",
    ]  # fmt: skip
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*/results.json")}
    assert main(["study", study, "--out", str(out)]) == 0
    assert "6 runs, 2 to train" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    document = json.loads((out / "study.json").read_text())
    assert [row["method"] for row in document["cells"]] == ["none", "aligned", "both"]
    row = document["cells"][1]
    difference = row["against"]["none"]
    plain = document["cells"][0]
    assert difference["mean"] == pytest.approx(row["top1"] - plain["top1"])
    assert (out / "study.md").read_text().count("| aligned |") == 1
    # Another setting is another run; what numbers do not depend on is not.
    more = ["--cells", "none", "--seeds", "1"]
    assert main(["study", study, "--out", str(out), *more, "--workers", "3"]) == 0
    assert "1 runs, 0 to train" in capsys.readouterr().out
    assert main(["study", study, "--out", str(out), *more, "--lr", "0.01"]) == 0
    assert "1 runs, 1 to train" in capsys.readouterr().out


def test_measures_of_every_run(
    study: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs"
    command = ["study", study, "--out", str(out), "--cells", "none,aligned", "--measures"]
    assert main([*command, "calibration,occlusion", "--limit", "2"]) == 0
    assert capsys.readouterr().out.count("measure ") == 4
    text = (out / "study.md").read_text()
    assert "calibration error %" in text
    assert "half dropped, salient %" in text
    pictures = {path.name for path in out.glob("*.png")}
    assert pictures == {"study-calibration.png", "study-occlusion.png"}
    assert main([*command, "calibration", "--limit", "2"]) == 0
    assert "measure " not in capsys.readouterr().out
    row = json.loads((out / "study.json").read_text())["cells"][1]
    assert len(row["measures"]["calibration error %"]) == 2


def test_measures_are_of_the_run_and_of_so_many_images(
    study: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs"
    command = ["study", study, "--out", str(out), "--cells", "none", "--seeds", "1", "--measures"]
    assert main([*command, "calibration,fgsm", "--limit", "2"]) == 0
    assert main([*command, "occlusion"]) == 0
    assert main([*command, "fgsm"]) == 0
    lines = capsys.readouterr().out.splitlines()
    measured = [line.partition(": ")[2] for line in lines if line.startswith("measure ")]
    assert measured == ["calibration, fgsm", "occlusion", "fgsm"]
    (folder,) = out.glob("none-*")
    found = measures_in(folder)
    taken = {name: taken_on(found[name]) for name in ("calibration", "occlusion", "fgsm")}
    assert taken == {"calibration": 2, "occlusion": 4, "fgsm": 4}
    # Those of a checkpoint in the folder, or of other data, are not the run's.
    assert main(["evaluate", str(folder / "best.ckpt"), "--measures", "fgsm"]) == 0
    assert measures_in(folder) == {}
    other = ["--data", "fake:3x32x20", "--measures", "fgsm"]
    assert main(["evaluate", str(folder), *other]) == 0
    assert measures_in(folder) == {}
    assert main(["study", study, "--out", str(out), "--limit", "2"]) == 2
    assert "--limit with --measures" in capsys.readouterr().err


def test_runs_on_other_images_are_refused(
    study: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two folders of one name."""
    for place, seed in (("here", 0), ("there", 1)):
        for split, count in (("train", 8), ("test", 4)):
            save_images(tmp_path / place / "data" / f"{split}.parquet", count, seed)
    command = ["study", study, "--out", str(tmp_path / "runs"), "--cells", "none"]
    assert main([*command, "--data", str(tmp_path / "here" / "data"), "--seeds", "1"]) == 0
    assert main([*command, "--data", str(tmp_path / "there" / "data"), "--seeds", "2"]) == 2
    assert "none seed 1" in (message := capsys.readouterr().err)
    assert "has others than none seed 0" in message


def save_images(path: Path, count: int, seed: int) -> None:
    rng, images = np.random.default_rng(seed), []
    for _ in range(count):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": images, "label": [k % 2 for k in range(count)]}), path)


def test_a_run_that_fails_does_not_keep_the_others_from_being_trained(
    study: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An enormous learning rate breaks the loss."""
    Path(study).write_text(STUDY.replace("{method: tl-align}", "{lr: 1.0e+30, warmup_epochs: 0}"))
    command = ["study", study, "--seeds", "1", "--epochs", "4"]
    for jobs in ("1", "2"):
        out = tmp_path / jobs
        assert main([*command, "--jobs", jobs, "--out", str(out)]) == 1
        shown = capsys.readouterr()
        assert "1 of 3 runs failed (aligned seed 0)" in shown.err
        assert "aligned seed 0  failed: " in shown.out
        assert len(list(out.glob("*/results.json"))) == 2
        assert "| both |" in (out / "study.md").read_text()


def test_a_row_that_does_not_fit_is_refused_before_any_is_trained(
    study: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(study).write_text(STUDY.replace("vertical]", "{name: vertical, kappa: 99}]"))
    assert main(["study", study, "--out", str(tmp_path / "runs")]) == 2
    assert "cell 'both' cannot be trained: expected `kappa`" in capsys.readouterr().err
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize(
    ("plain", "taught", "model"),
    [
        ("{}", "{method: tokenmix, model: cct_4_3x2_32}", "cct_4_3x2_32"),
        ("{method: cutmix}", "{method: tokenmix}", "cct_2_3x2_32"),  # named none, but is not
    ],
)
def test_a_teacher_is_plain_and_has_the_settings_of_its_student(
    study: str, tmp_path: Path, plain: str, taught: str, model: str
) -> None:
    changed = STUDY.replace("none: {}", f"none: {plain}").replace("{method: tl-align}", taught)
    Path(study).write_text(changed)
    command = ["study", study, "--cells", "none,aligned", "--seeds", "1"]
    assert main([*command, "--out", str(tmp_path / "runs")]) == 0
    (folder,) = (tmp_path / "runs").glob("aligned-*")
    teacher = json.loads((folder / "teacher" / "results.json").read_text())
    assert (teacher["model"], teacher["method"]) == (model, "none")


def test_rows_may_have_data_of_their_own(study: str, tmp_path: Path) -> None:
    Path(study).write_text(STUDY.replace("{method: tl-align}", '{data: "fake:2x32x12"}'))
    command = ["study", study, "--cells", "none,aligned", "--seeds", "1"]
    assert main([*command, "--out", str(tmp_path / "runs")]) == 0
    assert "| aligned | 1 |" in (tmp_path / "runs" / "study.md").read_text()


def test_one_process_at_a_time_trains_a_run(tmp_path: Path) -> None:
    folder = claim_folder(str(tmp_path), "run", "run", False, {"seed": 0})
    with held(folder), pytest.raises(vitmix.InputError, match="in use by another"), held(folder):
        pass
    with held(folder), pytest.raises(vitmix.InputError, match="in use by another"):
        claim_folder(str(tmp_path), "run", "run", True, {"seed": 1})
    below = claim_folder(str(folder), "teacher", "", False, {"seed": 0})
    with held(below), pytest.raises(vitmix.InputError, match="teacher is in use by another"):
        claim_folder(str(tmp_path), "run", "run", True, {"seed": 1})
    assert claim_folder(str(tmp_path), "run", "run", True, {"seed": 1}) == folder  # it was let go
    assert not below.exists()


def test_stored_results_count_as_finished(
    study: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "results"
    command = ["study", study, "--results", str(store)]
    plain = [*command, "--out", str(tmp_path / "first"), "--cells", "none"]
    assert main([*plain, "--measures", "calibration"]) == 0
    assert "2 runs, 2 to train" in capsys.readouterr().out
    files = sorted(store.iterdir())
    assert [path.name.rpartition("-")[0] for path in files] == ["none-seed0", "none-seed1"]
    kept = json.loads(files[0].read_text())
    assert kept["measures"]["calibration"]["ece"] >= 0
    assert kept["data_fingerprint"]
    assert kept["commit"] == kept["measures"]["commit"]
    assert str(tmp_path) not in files[0].read_text()  # nothing about this machine's folders
    # Elsewhere only what is missing is trained, and differences are those of the same seed.
    before = [path.read_text() for path in files]
    again = [*command, "--out", str(tmp_path / "second"), "--cells", "none,aligned"]
    assert main(again) == 0
    assert "4 runs, 2 to train" in capsys.readouterr().out
    assert not list((tmp_path / "second").glob("none-*"))
    assert [path.read_text() for path in files] == before
    document = json.loads((tmp_path / "second" / "study.json").read_text())
    assert document["cells"][1]["against"]["none"]["seeds"] == 2
    assert len(document["cells"][0]["measures"]["calibration error %"]) == 2
    # Measures need the checkpoint of that very run.
    assert main([*again, "--measures", "calibration,fgsm"]) == 2
    assert "checkpoint is not there" in capsys.readouterr().err


def test_stored_results_of_other_settings_are_refused(
    study: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after the default of a setting has changed, which the digest leaves out."""
    store = tmp_path / "results"
    command = ["study", study, "--results", str(store), "--cells", "none", "--seeds", "1"]
    assert main([*command, "--out", str(tmp_path / "first")]) == 0
    (path,) = store.iterdir()
    content = json.loads(path.read_text())
    content["config"]["data"] = "/elsewhere/fake:3x32x16"  # the same data in another place
    path.write_text(json.dumps(content))
    assert main([*command, "--out", str(tmp_path / "second")]) == 0
    content["config"]["smoothing"] = 0.3
    path.write_text(json.dumps(content))
    capsys.readouterr()
    assert main([*command, "--out", str(tmp_path / "second")]) == 2
    assert "smoothing 0.3 instead of 0.1" in capsys.readouterr().err
    path.write_text("{")
    assert main([*command, "--out", str(tmp_path / "second")]) == 2
    assert f"expected the results of a run in {path}" in capsys.readouterr().err


def test_runs_side_by_side_give_the_same_figures(study: str, tmp_path: Path) -> None:
    """The teacher of a run is trained before it, whatever the order of the cells."""
    path = Path(study)
    path.write_text(STUDY.replace("  none: {}", "  taught: {method: tokenmix}\n  none: {}"))
    command = ["study", study, "--seeds", "1", "--cells", "taught,none"]
    found = []
    for jobs in ("1", "2"):
        out = tmp_path / jobs
        assert main([*command, "--threads", "1", "--jobs", jobs, "--out", str(out)]) == 0
        cells = json.loads((out / "study.json").read_text())["cells"]
        found.append({row["method"]: (row["top1_runs"], row["loss_runs"]) for row in cells})
        assert not list(out.glob("taught-*/teacher"))
    assert found[0] == found[1]
    assert list(found[0]) == ["taught", "none"]


@pytest.mark.skipif(os.name == "nt", reason="signals as in POSIX")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_what_stops_a_study_stops_its_processes_at_a_checkpoint(
    study: str, tmp_path: Path, sent: signal.Signals
) -> None:
    path = Path(study)
    path.write_text(STUDY.replace("epochs: 1", "epochs: 900"))
    command = [sys.executable, "-m", "vitmix.cli", "study", study, "--out", str(tmp_path / "runs")]
    command += ["--jobs", "2", "--seeds", "1", "--cells", "none"]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts what ends in "&"
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        assert process.stdout is not None
        assert any("epoch   1/900" in line for line in process.stdout)
        os.killpg(process.pid, sent)
        _, complaint = process.communicate(timeout=120)
    assert process.returncode == 130
    assert complaint == "vitmix: interrupted; the same command goes on\n"
    assert list((tmp_path / "runs").glob("*/last.ckpt"))


def test_ablation_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", "fake:3x32x16", "--model", "cct_2_3x2_32", "--epochs", "1"]
    more = ["--batch-size", "8", "--seeds", "1", "--cells", "horizontal,random tokens"]
    assert main(["ablate", "parts", *data, *more, "--out", str(tmp_path / "runs")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("random tokens ") for line in lines)
    assert any("against horizontal" in line for line in lines)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("epochs: 1", "epoch: 1"), "did you mean 'epochs'"),
        (("cells:", "cell:"), "with cells by name"),
        (("against: [none]", "against: [non]"), "did you mean 'none'"),
        (("title:", "titel:"), "did you mean 'title'"),
        (("tl-align", "tl-alin"), "tl-align"),
        (("[horizontal, vertical]", "[horizontal, vertical"), "expected YAML"),
        (("epochs: 1", "epochs: many"), "whole number, got 'many', in `settings` in"),
        (("{method: tl-align}", "{precision: fp64}"), "one of fp32, .*, in cell 'aligned'"),
        (("{method: tl-align}", "tl-align"), "expected settings of vitmix train in cell 'aligned'"),
        (("seeds: 2", "seeds: [0, 1]"), "as a number of seeds"),
        (("against: [none]", "against: 5"), "expected cells of .*, got '5'"),
        ((STUDY[STUDY.index("cells:") :], "cells: {}"), "expected cells in .*, got none"),
    ],
)
def test_files_that_are_wrong(study: str, change: tuple[str, str], message: str) -> None:
    path = Path(study)
    path.write_text(STUDY.replace(*change))
    with pytest.raises(vitmix.InputError, match=message):
        read_study(study)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_bytes(b"\xff")
    with pytest.raises(vitmix.InputError, match="expected YAML in"):
        read_study(str(tmp_path / "study.yaml"))


def test_text_in_a_file_is_what_its_setting_says(study: str) -> None:
    path = Path(study)
    path.write_text(STUDY.replace("epochs: 1", "epochs: 1, lr: 1e-3").replace("[none]", "none"))
    found = read_study(study)
    assert found.cells[0].config.lr == 1e-3  # which YAML takes for text
    assert found.against == ("none",)


def test_cells_may_be_named_by_numbers(study: str) -> None:
    Path(study).write_text(STUDY.replace("aligned:", "0.5:").replace("[none]", "[0.5, none]"))
    found = read_study(study)
    assert [cell.name for cell in found.cells] == ["none", "0.5", "both"]
    assert found.against == ("0.5", "none")
    assert [cell.name for cell in read_study(study, only=["0.5"]).cells] == ["0.5"]


def test_a_method_in_a_file_is_another_one_when_the_file_changes(
    study: str, tmp_path: Path
) -> None:
    method = tmp_path / "method.yaml"
    Path(study).write_text(STUDY.replace("{method: tl-align}", f"{{method: {method}}}"))
    folders = []
    for alpha in (0.5, 0.5, 1.0):
        method.write_text(f"mix: {{name: cutmix, alpha: {alpha}}}")
        folders.append(read_study(study).cells[1].folder(0))
    assert folders[0] == folders[1] != folders[2]


def parts(name: str, **given: object) -> dict[str, tuple[str, object]]:
    return {
        cell.name: (method_name(cell.config), cell.config.tau)
        for cell in read_study(name, given).cells
    }


def test_rows_are_what_their_names_say_under_any_recipe() -> None:
    for name in ("parts", "combinations", "digits"):
        plain = parts(name)
        for recipe in ("cct7-cifar100", "cct7-cifar100-tokenmixup-h"):
            assert parts(name, recipe=recipe) == plain
    found = {cell: method for cell, (method, _) in parts("cifar100-gpu").items()}
    assert found == {
        "baseline": "mixup+cutmix",
        "horizontal": "mixup+cutmix+horizontal",
        "vertical": "mixup+cutmix+vertical",
        "horizontal+vertical": "mixup+cutmix+horizontal+vertical",
        "tl-align": "tl-align",
        "tokenmix+tl-align": "tokenmix+aligned",
        "everything": "mixup+tokenmix+aligned+horizontal+vertical",
    }


def test_options_leave_rows_what_they_are_about() -> None:
    found = parts("sensitivity", tau=1.5)
    assert found["horizontal"] == ("tokenmixup-h", 1.5)
    assert found["tau 3"] == ("tokenmixup-h", 3.0)
    assert found["kappa 3"] == ("tokenmixup-v", None)  # has no use for it
    found = parts("parts", tau=1.5)
    assert found["no assignment"][1] == 1.5
    assert found["no ScoreNet"][1] is None  # says tau itself, among the arguments of its stage
    assert found["without"] == ("none", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["study", "cifar10"], "did you mean 'cifar10-few'"),
        (["study", "nowhere.yaml"], "No such file"),
        (["study", "digits", "--cells", "nothing"], "expected cells of digits"),
        (["ablate", "combination"], "did you mean 'combinations'"),
        (["study", "digits", "--measures", "speed"], "expected --measures"),
        (["study", "digits", "--devices", "2", "--batch-size", "64"], "one process a run"),
        (["study", "digits", "--results", __file__], "--results to be a folder to write in"),
    ],
)
def test_bad_commands(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--out", str(tmp_path / "runs")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
