"""Where logged values and pictures go."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vitmix
from vitmix.cli import main
from vitmix.functional import HorizontalPlan
from vitmix.plots.examples import telling_examples
from vitmix.step import MixTrace
from vitmix.train import run as run_module
from vitmix.train.config import TrainConfig
from vitmix.train.data import load_data
from vitmix.train.loggers import make_loggers
from vitmix.train.module import NonFiniteLossError
from vitmix.train.run import RunResult, train_run
from vitmix.train.speed import Speed

LOGGED = {
    "train/loss", "val/top1", "val/loss", "lr", "target/own_weight", "horizontal_1/mixed_samples",
    "horizontal_1/mixed_tokens", "horizontal_1/mixed_share", "horizontal_1/replaced_share",
    "horizontal_1/difficulty", "horizontal_1/saliency_gain", "horizontal_1/own_weight",
    "horizontal_1/difficulty_q10", "horizontal_1/difficulty_q50", "horizontal_1/tau",
    "speed/step_ms", "speed/images_per_second", "speed/memory_gib",
}  # fmt: skip


def small(out: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "train_limit": 64, "img_size": 16, "batch_size": 32, "epochs": 3, "threads": 1, "name": "r",
        "device": "cpu", "out": str(out), "method": "cutmix+tokenmixup-h", "tau": "auto:0.5",
        "image_epochs": 2,
    }  # fmt: skip
    return TrainConfig(**(settings | changes))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return train_run(small(tmp_path_factory.mktemp("logs")), verbose=False)


def test_table_and_tensorboard_hold_everything(run: RunResult) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with (run.folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0].keys() >= LOGGED
    assert all(float(row["speed/step_ms"]) > 0 for row in rows if row["speed/step_ms"])
    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) >= LOGGED
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(losses)
    pictures = events.Images("mixed samples")
    assert [picture.step for picture in pictures] == [1, 5]  # in epochs 1 and 3, two steps each
    files = sorted((run.folder / "images").iterdir())
    assert [path.name for path in files] == ["epoch-0001.png", "epoch-0003.png"]


def test_predictions_of_the_last_epoch_are_kept(run: RunResult) -> None:
    stored = np.load(run.folder / "predictions.npz", allow_pickle=False)
    assert sorted(stored["labels"]) == sorted(run.data.test.labels.tolist())
    right = 100 * float((stored["labels"] == stored["predictions"]).mean())
    assert right == pytest.approx(run.results["top1"], abs=1e-3)
    assert tuple(stored["classes"]) == run.data.classes


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_on_a_terminal_and_plain_lines_elsewhere(
    terminal: bool, tmp_path: Path, run: RunResult, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("NO_COLOR", "1")
    train_run(small(tmp_path, method="cutmix", tau=None), data=run.data, verbose=False)
    out, err = capsys.readouterr()
    assert re.fullmatch(r"(epoch \d/3  loss \S+  test loss \S+  top-1 \S+%  \S+ s\n){3}", out)
    if terminal:
        last = err.split("\r")[-3]
        assert re.search(
            r"epoch 3/3: .* images/s, loss \d\.\d{3}, mixed \d+%, \d\d:\d\d left", last
        )
        assert "\x1b[3" not in err  # no colours
    else:
        assert err == ""


def test_pictures_can_be_left_out(tmp_path: Path, run: RunResult) -> None:
    config = small(tmp_path, image_epochs=0, epochs=1)
    assert not (train_run(config, data=run.data, verbose=False).folder / "images").exists()


def test_mlflow_keeps_one_run(tmp_path: Path, run: RunResult) -> None:
    pytest.importorskip("sqlalchemy")
    mlflow = pytest.importorskip("mlflow")
    config = small(tmp_path, logger="mlflow", epochs=2, image_epochs=1)
    folder = train_run(config, data=run.data, verbose=False).folder
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'vitmix'")

    def only() -> Any:
        (found,) = client.search_runs([experiment.experiment_id])
        return found

    before = only()
    assert (before.info.status, before.info.run_name) == ("FINISHED", "r")
    assert before.data.metrics.keys() >= LOGGED
    assert before.data.params["tau"] == "auto:0.5"
    pictures = client.list_artifacts(before.info.run_id, "mixed samples")
    assert [Path(picture.path).name for picture in pictures] == ["0000001.png", "0000003.png"]
    (folder / "results.json").unlink()
    shutil.copyfile(folder / "previous.ckpt", folder / "last.ckpt")
    train_run(config, data=run.data, resume=folder, verbose=False)
    assert only().info.run_id == before.info.run_id
    history = client.get_metric_history(before.info.run_id, "train/loss")
    assert sorted(value.step for value in history) == [1, 2, 3, 3, 4, 4]


def test_wandb_offline(tmp_path: Path, run: RunResult, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = small(tmp_path, logger="wandb", epochs=1)
    folder = train_run(config, data=run.data, verbose=False).folder
    assert list((folder / "wandb").glob("offline-run-*"))
    assert json.loads((folder / "loggers.json").read_text()).keys() == {"wandb"}


def test_loggers_are_closed_behind_a_run_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B would write the next run of a study into it."""
    closed: list[Any] = []
    monkeypatch.setattr(run_module, "close_loggers", closed.extend)
    config = small(tmp_path, data="fake:3x16x32", method="none", tau=None, batch_size=8)
    broken = replace(config, lr=1e30, clip_grad=None, warmup_epochs=0)
    with pytest.raises(NonFiniteLossError):
        train_run(broken, verbose=False)
    assert len(closed) == 2


@pytest.mark.parametrize(
    ("logger", "message"),
    [
        ("tensorboad", "--logger to be of wandb, mlflow, got 'tensorboad'"),
        ("mlflow, x", "got 'x'"),
        ("wandb", "the package wandb for --logger wandb, it is not installed"),
    ],
)
def test_unknown_loggers(
    logger: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(
        "vitmix.train.loggers.find_spec", lambda name: None if name == "wandb" else object()
    )
    assert main(["train", "--out", str(tmp_path), "--logger", logger]) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_two_loggers_come_without_asking(tmp_path: Path) -> None:
    assert len(make_loggers(small(tmp_path), tmp_path, 0)) == 2
    assert not (tmp_path / "loggers.json").exists()


def test_speed_leaves_pauses_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 0.5, 1.0, 50.0, 50.5, 99.0, 99.5])
    monkeypatch.setattr("vitmix.train.speed.time.perf_counter", lambda: next(now))
    speed, cpu = Speed(), torch.device("cpu")
    assert speed.read(cpu).keys() == {"speed/memory_gib"}
    speed.start()
    speed.count(32)  # half a second
    speed.count(32)
    speed.start()  # after a validation
    speed.count(32)
    speed.pause()
    speed.count(32)  # a picture was made
    speed.count(32)
    values = speed.read(cpu)
    assert values["speed/step_ms"] == pytest.approx(500)
    assert values["speed/images_per_second"] == pytest.approx(64)
    assert 0.01 < values["speed/memory_gib"] < 1000


def make_mixing() -> vitmix.MixingModel:
    model = vitmix.models.create_model("cct_2_3x2_32", num_classes=10, img_size=16)
    return vitmix.MixingModel(model, tokens=[vitmix.HorizontalTokenMixup(block=1)], num_classes=10)


def test_partners_of_other_processes_are_not_shown() -> None:
    """The second of two processes shows those of its samples whose partner it has."""
    data = load_data(TrainConfig(train_limit=64, img_size=16))
    images = torch.rand(4, 3, 16, 16)
    partner = torch.tensor([5, 0, 7, 6])  # samples 4 to 7 are here
    replace_ = torch.zeros(4, 16, dtype=torch.bool)
    replace_[:, :8] = True
    plan = HorizontalPlan(partner, replace_, torch.full((4,), 0.5))
    sources = torch.stack((torch.arange(4, 8), partner), 1)
    weights = torch.tensor([[1.0, 0.0]]).expand(4, -1)
    trace = MixTrace(images, sources=sources, weights=weights, plans=((1, plan),))
    targets = torch.full((4, 10), 0.1)
    out = vitmix.MixOutput(targets, targets, torch.zeros(()), {}, trace)
    mixing = make_mixing()
    shown = telling_examples(out, images, torch.tensor([1, 2, 3, 4]), data, mixing)
    assert sorted(e.names for e in shown) == [
        (data.classes[1], data.classes[2]),
        (data.classes[3], data.classes[4]),
        (data.classes[4], data.classes[3]),
    ]
    here = replace(trace, sources=sources - 4, plans=((1, plan._replace(partner=partner % 4)),))
    alone = vitmix.MixOutput(targets, targets, torch.zeros(()), {}, here)
    assert len(telling_examples(alone, images, torch.tensor([1, 2, 3, 4]), data, mixing)) == 4
