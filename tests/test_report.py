"""The page about finished runs, and what runs leave behind for it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from browser import content_without_complaint
from vitmix.cli import main
from vitmix.evaluate.report import write_report
from vitmix.evaluate.runs import find_runs, sort_runs
from vitmix.plots.curves import learning_curves
from vitmix.train.config import TrainConfig

CLASSES = ["cat", "dog", "a <b>bold</b> bird"]


def make_run(folder: Path, top1: float = 50.0, side: int = 40, **settings: Any) -> Path:
    """A finished run as training leaves it, with three classes and two pictures."""
    config = TrainConfig(**({"data": "pets", "epochs": 3} | settings))
    (folder / "images").mkdir(parents=True)
    results = {
        "top1": top1, "top5": 100.0, "loss": 1.5, "best_top1": top1, "best_epoch": 2, "epochs": 3,
        "method": config.method, "model": config.model, "data": config.data, "parameters": 1234,
        "train_images": 90, "test_images": 30, "seed": config.seed, "device": "CPU",
        "seconds": 12.0, "images_per_second": 99.0, "started": f"2026-01-01T00:0{config.seed}",
        "commit": None, "versions": {"torch": "2.6"}, "config": config.to_dict(),
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    stage = "horizontal_2"
    rows = [f"step,epoch,val/top1,train/epoch_loss,{stage}/mixed_samples,{stage}/mixed_tokens"]
    rows += [f"{10 * n},{n},{10 * n},{1 / n},{n},{2 * n}" for n in (1, 2, 3)]
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    pixels = np.random.default_rng(config.seed).integers(256, size=(side, side, 3), dtype=np.uint8)
    for epoch in (1, 3):
        Image.fromarray(pixels).save(folder / "images" / f"epoch-{epoch:04}.png")
    np.savez_compressed(
        folder / "predictions.npz", classes=CLASSES,
        labels=np.array([0] * 10 + [1] * 10 + [2] * 10, np.int32),
        predictions=np.array([0] * 10 + [1] * 9 + [0] + [2] * 5 + [0] * 3 + [1] * 2, np.int32),
    )  # fmt: skip
    return folder


def cells(page: str) -> list[list[str]]:
    """The text of every row of every table."""
    rows = re.findall(r"<tr.*?</tr>", page, re.DOTALL)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]


def test_curves_are_means_of_the_same_epochs() -> None:
    """A run that was tested less often, as ``--eval-epochs`` may change at any time."""
    often = {"val/top1": [(1.0, 10.0), (2.0, 30.0), (3.0, 50.0), (4.0, 60.0)]}
    seldom = {"val/top1": [(2.0, 40.0), (4.0, 70.0)]}
    figure = learning_curves({"none": [often, seldom]}, {"val/top1": "top-1"})
    (line,) = figure.axes[0].lines
    assert [list(values) for values in line.get_data()] == [[2.0, 4.0], [35.0, 65.0]]


def test_half_a_picture_is_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "images" / "epoch-0002.tmp.png").write_bytes(b"what a kill has left")
    assert write_report([folder], tmp_path / "report.html").is_file()


def test_runs_that_differ_in_the_seed_are_one_row(tmp_path: Path) -> None:
    folders = [
        make_run(tmp_path / "a", 50.0, method="none", workers=2),
        make_run(tmp_path / "b", 54.0, method="none", seed=1, out="elsewhere"),
        make_run(tmp_path / "c", 60.0, method="cutmix", lr=1e-3),
    ]
    page = write_report(folders, tmp_path / "r.html").read_text()
    rows = cells(page)
    assert ["none", "2", "52.00 ± 2.83", "100.00 ± 0.00", "1.500 ± 0.000", "", "12 s"] in rows
    assert ["cutmix", "1", "60.00", "100.00", "1.500", "+8.00", "12 s"] in rows
    assert ["lr", "0.0006", "0.001"] in rows
    assert ["method", "none", "cutmix"] in rows
    assert not [row for row in rows if row[0] in ("seed", "workers", "out", "weight decay")]
    assert "2 ways of mixing on pets" in page
    assert "1 or 2 seeds each" in page


def test_worst_classes_and_what_they_are_taken_for(tmp_path: Path) -> None:
    page = write_report([make_run(tmp_path / "a")], tmp_path / "r.html").read_text()
    rows = cells(page)
    bird = "a &lt;b&gt;bold&lt;/b&gt; bird"
    worst = rows.index(["class", "right %", "taken for"]) + 1
    assert rows[worst : worst + 3] == [
        [bird, "50.0", "cat (30.0%), dog (20.0%)"],
        ["dog", "90.0", "cat (10.0%)"],
        ["cat", "100.0", "never wrong"],
    ]


def test_runs_without_predictions_or_pictures_have_shorter_pages(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    (run / "predictions.npz").unlink()
    shutil.rmtree(run / "images")
    page = write_report([run], tmp_path / "r.html").read_text()
    assert "Learning curves" in page
    assert "The worst classes" not in page
    assert "What was mixed" not in page


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (({"method": "none"}, {"method": "cutmix"}), ["none", "cutmix"]),
        (
            ({"method": "cutmix", "alpha": 0.5}, {"method": "cutmix"}, {"method": "none"}),
            ["cutmix, alpha 0.5", "cutmix, alpha not set", "none"],
        ),
    ],
)
def test_every_kind_of_run_has_a_name_of_its_own(
    settings: tuple[dict[str, Any], ...], names: list[str], tmp_path: Path
) -> None:
    folders = [make_run(tmp_path / str(n), **own) for n, own in enumerate(settings)]
    kinds = sort_runs([run for folder in folders for run in find_runs(folder)])
    assert [kind.name for kind in kinds] == names


def test_a_comparison_stands_for_its_runs_in_order(tmp_path: Path) -> None:
    for seed, name in enumerate("cab"):
        make_run(tmp_path / "all" / name, seed=seed)
    assert [run.folder.name for run in find_runs(tmp_path / "all")] == ["c", "a", "b"]


def test_large_pictures_stay_below_five_megabytes(tmp_path: Path) -> None:
    """Noise cannot be compressed: fewer epochs are shown."""
    methods = ("none", "cutmix", "tokenmix", "tl-align", "tokenmixup")
    folders = [make_run(tmp_path / name, side=900, method=name) for name in methods]
    path = write_report(folders, tmp_path / "r.html")
    assert 1e6 < path.stat().st_size < 5e6
    assert path.read_text().count("data:image/webp") == len(methods)


def test_page_asks_for_nothing_and_opens_without_complaint(tmp_path: Path) -> None:
    page = write_report([make_run(tmp_path / "a")], tmp_path / "r.html")
    text = page.read_text()
    assert not re.findall(r'(?:src|href|srcset)="(?!data:)', text)
    assert not re.findall(r"<script|url\(|@import", text)
    assert "<b>bold" not in text
    assert "Learning curves" in content_without_complaint(page, tmp_path / "browser")


def test_command_says_where_the_page_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "page.html"
    assert main(["report", str(make_run(tmp_path / "a")), "--out", str(out)]) == 0
    assert f"the report is {out}" in capsys.readouterr().out
    assert out.is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "RUNS"),
        (["nowhere"], "a finished run, got nowhere, which is not there"),
        (["begun"], "vitmix train --resume begun"),
        (["run", "--out", "page.pdf"], "an HTML file, such as report.html, got page.pdf"),
        (["run", "--out", "run/results.json/x.html"], "cannot write"),
    ],
)
def test_what_is_no_run_is_refused(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("epochs: 3")
    assert main(["report", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
