"""Several processes train as one."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitmix.cli import main
from vitmix.errors import InputError
from vitmix.evaluate.checkpoint import evaluate_checkpoint
from vitmix.train.checkpoint import read_checkpoint
from vitmix.train.config import TrainConfig
from vitmix.train.loading import EpochSampler, even_batch, own_places
from vitmix.train.parallel import Processes
from vitmix.train.run import train_run

# No draw differs between one process and two: nothing is augmented, no pixels are mixed, and the
# model has no dropout. ScoreNet chooses, and partners come from the whole batch.
SETTINGS: dict[str, Any] = {
    "train_limit": 160, "img_size": 16, "batch_size": 32, "epochs": 2, "lr": 3e-3, "threads": 1,
    "device": "cpu", "crop_padding": 0, "model_ema": True,
    "model_kwargs": {"attention_dropout": 0.0, "stochastic_depth": 0.0},
    "tokens": [{"name": "horizontal", "tau": "auto:0.5", "rho": 0.001, "gather": True}],
}  # fmt: skip
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def start(*arguments: str, launcher: list[str] | None = None) -> None:
    """Run the command line in processes of its own."""
    command = [sys.executable, *(launcher or []), "-m", "vitmix.cli", *arguments]
    environment = os.environ | {"PL_GLOBAL_SEED": "1"}  # as other uses of Lightning leave it
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results ") == 1  # one process prints


def options(out: Path, **changes: Any) -> list[str]:
    config = out / "settings.yaml"
    config.write_text(json.dumps(SETTINGS | {"out": str(out)} | changes))
    return ["train", "--config", str(config)]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Any:
    config = TrainConfig(**SETTINGS, out=str(tmp_path_factory.mktemp("one")), name="run")
    return train_run(config, verbose=False)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two")
    start(*options(out, devices=2))
    return next(out.glob("digits*"))


def results_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def assert_near(folder: Path, expected: dict[str, Any]) -> None:
    """Sums are rounded in another order, and a choice may then fall otherwise."""
    found = results_of(folder)
    assert found["loss"] == pytest.approx(expected["loss"], rel=2e-3)
    for name in ("top1", "top5", "best_top1"):
        assert found[name] == pytest.approx(expected[name], abs=100 * 2 / 359)  # two images


def test_two_processes_give_the_figures_of_one(one: Any, two: Path) -> None:
    assert_near(two, one.results)
    rows = (two / "metrics.csv").read_text().splitlines()
    assert len(rows) == len((one.folder / "metrics.csv").read_text().splitlines())
    assert {path.name for path in two.iterdir()} >= {"mixing.png", "examples.png", "best.ckpt"}


def test_every_test_image_counts_once(two: Path) -> None:
    """359 images over two processes: figures in training are those of the checkpoint."""
    scores = json.loads(evaluate_checkpoint(str(two), json=True))
    found = results_of(two)
    assert (scores["top1"], scores["top5"]) == (found["top1"], found["top5"])
    assert scores["loss"] == pytest.approx(found["loss"], rel=1e-5)
    stored = np.load(two / "predictions.npz")
    assert len(stored["labels"]) == 359
    right = 100 * float((stored["labels"] == stored["predictions"]).mean())
    assert right == pytest.approx(found["top1"], abs=1e-3)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    start(*options(out, devices=2, strategy="fsdp", name="run"), launcher=TORCHRUN)
    return out / "run"


def test_shards_started_by_torchrun(one: Any, shards: Path) -> None:
    assert_near(shards, one.results)
    saved = read_checkpoint(shards / "last.ckpt")
    expected = read_checkpoint(one.folder / "last.ckpt")
    for content in (saved, expected):
        content["averaged"] = content["vitmix"]["averaged"]
    for name in ("state_dict", "averaged"):
        shapes = [{key: value.shape for key, value in c[name].items()} for c in (saved, expected)]
        assert shapes[0] == shapes[1]
    assert (
        json.loads(evaluate_checkpoint(str(shards), json=True))["top1"]
        == (results_of(shards)["top1"])
    )


@pytest.mark.parametrize(("whole", "launcher"), [("two", None), ("shards", TORCHRUN)])
def test_two_processes_go_on_where_they_stopped(
    whole: str, launcher: list[str] | None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    alone: Path = request.getfixturevalue(whole)
    folder = tmp_path / "again"
    shutil.copytree(alone, folder)
    (folder / "results.json").unlink()
    (folder / "previous.ckpt").replace(folder / "last.ckpt")
    start("train", "--resume", str(folder), launcher=launcher)
    ends = [read_checkpoint(run / "last.ckpt") for run in (alone, folder)]
    for state in ([end["state_dict"] for end in ends], [end["vitmix"]["averaged"] for end in ends]):
        for key, value in state[0].items():
            assert torch.equal(state[1][key], value), key
    assert len(ends[0]["random"]) == 2
    assert not torch.equal(*(state["torch"] for state in ends[0]["random"]))
    tables = [csv.DictReader((run / "metrics.csv").open()) for run in (alone, folder)]
    losses = [[row["train/loss"] for row in table] for table in tables]
    assert losses[0] == losses[1]


def test_two_processes_train_their_teacher_first(tmp_path: Path) -> None:
    """Its run folder lies within theirs, whose name only the first process has made."""
    changes = {"tokens": None, "method": "tokenmix", "epochs": 1, "model_ema": False}
    start(*options(tmp_path, devices=2, data="fake:3x16x32", **changes))
    (folder,) = tmp_path.glob("fake*")
    assert results_of(folder)["steps"] == results_of(folder / "teacher")["steps"] == 1


@given(count=st.integers(8, 300), each=st.integers(1, 8), processes=st.integers(1, 5))
def test_processes_share_the_batches_of_one(count: int, each: int, processes: int) -> None:
    batch = each * processes
    if count < batch:
        return
    parts = [own_places(count, batch, Processes(processes, rank)) for rank in range(processes)]
    together = np.concatenate([part.reshape(-1, each) for part in parts], 1)
    assert (together.reshape(-1) < count).all()
    for step in range(count // batch):
        places = np.concatenate([part[step * each : (step + 1) * each] for part in parts])
        assert places.tolist() == list(range(step * batch, (step + 1) * batch))
    whole = list(EpochSampler(count, shuffle=True, seed=1, own=None))
    mine = list(EpochSampler(count, shuffle=True, seed=1, own=parts[-1]))
    assert mine == [whole[place] for place in parts[-1]]


@given(count=st.integers(1, 3000), batch=st.integers(1, 70), processes=st.integers(1, 7))
def test_processes_test_in_as_many_steps(count: int, batch: int, processes: int) -> None:
    if count < processes:
        return
    size = even_batch(count, batch, processes)
    shares = [len(range(rank, count, processes)) for rank in range(processes)]
    assert len({-(-share // size) for share in shares}) == 1


def test_learning_rate_goes_with_the_batch_size() -> None:
    config = TrainConfig(lr=1e-3, batch_size=512, lr_base_size=128)
    assert config.peak_lr == pytest.approx(4e-3)
    assert TrainConfig(lr=1e-3, batch_size=512).peak_lr == 1e-3


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        ({"devices": 2, "nodes": 2}, {}, "started by torchrun or srun on each node"),
        ({"devices": 3}, {}, "multiple of the 3 processes, got 32"),
        ({"strategy": "fsdp"}, {}, "at least 2 for --strategy fsdp"),
        (
            {"devices": 2},
            {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4"},
            "the 4 processes that were started, got 2 x 1",
        ),
        (
            {"devices": 2},
            {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "0"},
            "the 8 processes that were started, got 2 x 1",
        ),
    ],
)
def test_numbers_of_processes_that_do_not_fit(
    options: dict[str, Any], environment: dict[str, str], message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        Processes.of(TrainConfig(**(SETTINGS | options)))


def test_what_one_process_alone_can_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compare = ["compare", "--methods", "none", "--device", "cpu", "--devices", "2"]
    assert main([*compare, "--out", str(tmp_path)]) == 2
    assert "one process for a comparison" in capsys.readouterr().err
    rollout = "[{name: horizontal, block: 0, saliency: rollout}]"
    sharded = ["--devices", "2", "--strategy", "fsdp", "--tokens", rollout]
    assert main(["train", "--device", "cpu", *sharded, "--out", str(tmp_path)]) == 2
    assert "got 'rollout': it needs further passes" in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("lightning.fabric.utilities.rank_zero.rank_zero_only.rank", 1)
    assert main(["train", "--device", "cpu", "--devices", "2", "--out", str(tmp_path)]) == 2
    assert "--name for processes started by torchrun or srun" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
    assert "VITMIX_RUN_FOLDER" not in os.environ
