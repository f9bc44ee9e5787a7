"""Runs that are stopped, killed or damaged, and go on as if nothing had happened."""

from __future__ import annotations

import csv
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vitmix.cli import main
from vitmix.errors import InputError
from vitmix.evaluate import compare as compare_module
from vitmix.evaluate.compare import compare
from vitmix.train import run as run_module
from vitmix.train.checkpoint import load_trained, newest_checkpoint, read_checkpoint
from vitmix.train.config import TrainConfig
from vitmix.train.logs import MetricsTable
from vitmix.train.resume import resumed_settings
from vitmix.train.run import Interrupted, train_run
from vitmix.train.saving import RandomStates

STEPS, EPOCHS = 4, 2


def small(out: Path, **changes: Any) -> TrainConfig:
    """Two epochs of four steps, with every kind of state that a run can have."""
    settings: dict[str, Any] = {
        "train_limit": 64, "img_size": 16, "batch_size": 16, "epochs": EPOCHS, "threads": 1,
        "out": str(out), "name": "run", "device": "cpu", "crop_padding": 1, "log_interval": 3,
        "image_epochs": 0, "method": "cutmix+tokenmixup", "tau": "auto:0.5", "model_ema": True,
        "aa": "rand-m9-mstd0.5", "reprob": 0.3,
    }  # fmt: skip
    return TrainConfig(**(settings | changes))


def contents(folder: Path) -> dict[str, Any]:
    """The last checkpoint, without what differs between two runs in any case."""
    content = read_checkpoint(folder / "last.ckpt")
    del content["vitmix"]["config"]
    for key in ("seconds", "started"):
        del content["callbacks"]["Checkpoints"][key]
    return content


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def logged(folder: Path) -> list[dict[str, str]]:
    """The table of metrics, without how fast it went."""
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{key: row[key] for key in row if not key.startswith("speed/")} for row in rows]


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, optimiser, schedule, average, generators, places, figures and logs."""
    assert same(contents(one), contents(other))
    assert logged(one) == logged(other)
    best = [load_trained(folder / "best.ckpt").model.state_dict() for folder in (one, other)]
    assert same(*best)
    assert not [path for path in other.rglob("*") if ".tmp." in path.name]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing stops."""
    return train_run(small(tmp_path_factory.mktemp("alone")), verbose=False).folder


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, how: Callable[[], object]) -> None:
    """Do something at the end of a step, before a checkpoint may be written."""
    seen = run_module.ConsoleProgress.on_train_batch_end

    def hook(self: Any, trainer: Any, *args: Any) -> None:
        seen(self, trainer, *args)
        if trainer.global_step == step:
            how()

    monkeypatch.setattr(run_module.ConsoleProgress, "on_train_batch_end", hook)


# --- stopped by the user


@pytest.mark.parametrize(
    ("step", "number"),
    [
        (1, signal.SIGINT), (3, signal.SIGTERM), (STEPS, signal.SIGINT), (STEPS, signal.SIGTERM),
        (STEPS + 1, signal.SIGINT), (STEPS * EPOCHS, signal.SIGTERM),
    ],
)  # fmt: skip
def test_a_stopped_run_goes_on_to_the_same_weights(
    tmp_path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals
) -> None:
    config = small(tmp_path)
    with monkeypatch.context() as patch:
        stop_after(patch, step, lambda: os.kill(os.getpid(), number))
        with pytest.raises(Interrupted, match=r"last.ckpt; go on with --resume .*run$"):
            train_run(config, verbose=False)
    folder = tmp_path / "run"
    assert not (folder / "results.json").exists()
    found = newest_checkpoint(folder)
    assert found is not None
    assert found[1]["global_step"] == step
    result = train_run(config, resume=folder, verbose=False)
    assert_same_run(alone, folder)
    assert result.results["epochs"] == EPOCHS


@pytest.mark.parametrize("step", [5, 6])
def test_a_limit_of_steps_holds_for_a_run_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    def config(name: str) -> TrainConfig:
        return small(tmp_path, name=name, epochs=4, max_steps=6, checkpoint_steps=1)

    train_run(config("alone"), verbose=False)
    with monkeypatch.context() as patch:
        stop_after(patch, step, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Interrupted):
            train_run(config("run"), verbose=False)
    run = train_run(config("run"), resume=tmp_path / "run", verbose=False)
    assert (run.results["steps"], run.results["epochs"]) == (6, 2)
    assert_same_run(tmp_path / "alone", tmp_path / "run")


def test_a_second_interrupt_stops_within_the_step(
    tmp_path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    config = small(tmp_path, checkpoint_steps=2)
    with monkeypatch.context() as patch:
        stop_after(patch, 3, twice)
        with pytest.raises(Interrupted):
            train_run(config, verbose=False)
    found = newest_checkpoint(tmp_path / "run")
    assert found is not None
    assert found[1]["global_step"] == 2
    train_run(config, resume=tmp_path / "run", verbose=False)
    assert_same_run(alone, tmp_path / "run")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_a_gpu_goes_on_within_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(tmp_path, device="cuda")
    with monkeypatch.context() as patch:
        stop_after(patch, STEPS - 1, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Interrupted):
            train_run(config, verbose=False)
    assert train_run(config, resume=tmp_path / "run", verbose=False).results["epochs"] == EPOCHS


# --- killed


def live(config: TrainConfig, resume: Path | None, fault: str, count: int) -> None:
    """A process that trains, and kills itself at a call of the function named by ``fault``."""
    module, name = {"save": (torch, "save"), "replace": (os, "replace"), "": (None, "")}[fault]
    if module is not None:
        real = getattr(module, name)
        calls = []

        def faulty(first: Any, second: Any) -> None:
            calls.append(1)
            if len(calls) == count:
                if fault == "save":
                    real(first, second)
                    os.truncate(second, os.path.getsize(second) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            real(first, second)

        setattr(module, name, faulty)
    train_run(config, resume=resume, verbose=False)


@pytest.fixture(scope="module")
def start() -> Callable[..., Any]:
    """Starts such processes: forks of one that has imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vitmix.train.run", "timm", "tensorboard"])

    def begin(config: TrainConfig, fault: str = "", count: int = 0) -> Any:
        folder = Path(config.out) / "run"
        resume = folder if folder.exists() else None
        process = context.Process(target=live, args=(config, resume, fault, count))
        process.start()
        return process

    return begin


posix = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX signals")


@posix
@pytest.mark.parametrize(
    ("fault", "count"),
    # In the middle of a checkpoint; before the predictions, a new column of the table, the best
    # checkpoint, and the newest in the place of the last, which has become the one before.
    [("save", 3), ("replace", 4), ("replace", 5), ("replace", 7), ("replace", 9)],
)
def test_killed_while_writing(
    tmp_path: Path, alone: Path, start: Callable[..., Any], fault: str, count: int
) -> None:
    config = small(tmp_path, checkpoint_steps=2)
    process = start(config, fault, count)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "run" / "results.json").exists()
    if (fault, count) == ("replace", 9):
        assert not (tmp_path / "run" / "last.ckpt").exists()
    train_run(config, resume=tmp_path / "run", verbose=False)
    assert_same_run(alone, tmp_path / "run")


@posix
def test_killed_at_random_moments(tmp_path: Path, alone: Path, start: Callable[..., Any]) -> None:
    """A short form of benchmarks/kill_test.py."""
    config = small(tmp_path, checkpoint_steps=1)
    checkpoint = tmp_path / "run" / "last.ckpt"
    rng = random.Random(0)
    for _ in range(4):
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        process = start(config)
        deadline = time.monotonic() + 120
        while process.is_alive() and time.monotonic() < deadline:
            if checkpoint.exists() and checkpoint.stat().st_mtime_ns > before:
                break
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.join()
    train_run(config, resume=tmp_path / "run", verbose=False)
    assert_same_run(alone, tmp_path / "run")


def test_killed_before_the_first_checkpoint(tmp_path: Path, alone: Path) -> None:
    config = small(tmp_path)
    folder = run_module.claim_folder(str(tmp_path), "run", "", False, config.to_dict())
    (folder / "metrics.csv").write_text("step,train/loss\n3,2.5\n4")
    train_run(config, resume=folder, verbose=False)
    assert_same_run(alone, folder)


# --- damaged


def damage(path: Path, how: str) -> None:
    raw = bytearray(path.read_bytes())
    if how == "flipped":
        raw[len(raw) // 2] ^= 1
    path.write_bytes(raw[: len(raw) // 3] if how == "truncated" else raw)


@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, alone: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(alone, folder)
    (folder / "results.json").unlink()
    damage(folder / "last.ckpt", how)
    assert load_trained(folder).path.name == "previous.ckpt"
    assert f"{folder}/last.ckpt is damaged, taking previous.ckpt" in capsys.readouterr().err
    train_run(small(tmp_path), resume=folder)
    out, err = capsys.readouterr()
    assert "last.ckpt is damaged" in err
    assert f"resume  after step {STEPS}\n" in out
    assert_same_run(alone, folder)
    damage(folder / "last.ckpt", how)
    damage(folder / "previous.ckpt", how)
    with pytest.raises(InputError, match=r"previous.ckpt, it cannot be read"):
        train_run(small(tmp_path), resume=folder)


# --- what may change


def test_a_finished_run_is_left_as_it_is(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in alone.rglob("*")}

    before = state()
    assert main(["train", "--resume", str(alone)]) == 0
    assert capsys.readouterr().out.startswith("nothing is left to do, the run has finished\ntop-1")
    run = train_run(small(alone.parent), resume=alone, verbose=False)
    assert run.results["epochs"] == EPOCHS
    assert same(run.task.state_dict(), contents(alone)["state_dict"])
    assert state() == before


def test_only_settings_that_change_no_number_may_change(alone: Path, tmp_path: Path) -> None:
    for given in ({"lr": 6e-4}, {"workers": 0, "log_interval": 7, "data_root": "elsewhere"}, {}):
        settings = TrainConfig.from_dict(resumed_settings(alone, given))
        assert settings == replace(small(alone.parent), **given)
    refused = {"lr": 0.1, "epochs": 3, "method": "none", "seed": 1, "name": "other", "threads": 2}
    for name, value in refused.items():
        with pytest.raises(InputError, match=rf"config.yaml began with, got --{name} {value} inst"):
            resumed_settings(alone, {name: value})
    with pytest.raises(InputError, match="expected the folder of a comparison"):
        resumed_settings(alone, {}, comparison=True)
    for wrong in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=r"a run folder with its config.yaml, got .*: No such"):
            resumed_settings(wrong, {})
    (tmp_path / "config.yaml").write_text("- 1")
    with pytest.raises(InputError, match=r"got \[1\]"):
        resumed_settings(tmp_path, {})


def test_options_beside_resume(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", str(alone), "--workers", "1"]) == 0
    # 0.06 is the default: given is given.
    assert main(["train", "--resume", str(alone), "--weight-decay", "0.06"]) == 0
    capsys.readouterr()
    assert main(["train", "--resume", str(alone), "--epochs", "10"]) == 2
    assert "--epochs 10 instead of 2" in capsys.readouterr().err


def test_another_origin_is_refused(
    alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(alone, folder)
    (folder / "results.json").unlink()
    before = (folder / "last.ckpt").stat().st_mtime_ns
    with pytest.raises(InputError, match="the data that the run began with"):
        train_run(small(tmp_path, train_limit=63), resume=folder)
    with pytest.raises(InputError, match="the method that the run began with"):
        train_run(small(tmp_path, method="tokenmixup"), resume=folder)
    assert (folder / "last.ckpt").stat().st_mtime_ns == before
    content = read_checkpoint(folder / "last.ckpt")
    content["vitmix"]["made_on"]["torch"] = "1.0"
    torch.save(content, folder / "last.ckpt")
    train_run(small(tmp_path), resume=folder)
    assert "the run began with torch 1.0, this is" in capsys.readouterr().err
    assert (folder / "results.json").is_file()


# --- images decoded when needed, teachers, comparisons


def test_other_processes_decode_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(20):
        path = tmp_path / "data" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((110, 104), 90).save(path)

    def config(name: str, workers: int) -> TrainConfig:
        return small(
            tmp_path, name=name, data=str(tmp_path / "data"), img_size=100, batch_size=4,
            train_limit=16, workers=workers, hflip=0.5, crop_padding=None, epochs=1,
        )  # fmt: skip

    train_run(config("alone", 2), verbose=False)
    with monkeypatch.context() as patch:
        stop_after(patch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Interrupted):
            train_run(config("run", 2), verbose=False)
    train_run(config("run", 1), resume=tmp_path / "run", verbose=False)
    assert_same_run(tmp_path / "alone", tmp_path / "run")


def test_teacher_in_training_goes_on_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def config(name: str) -> TrainConfig:
        return small(tmp_path, name=name, method="tokenmix", tau=None, epochs=1)

    train_run(config("alone"), verbose=False)
    with monkeypatch.context() as patch:
        stop_after(patch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Interrupted, match=f"go on with --resume {tmp_path / 'run'}$"):
            train_run(config("run"), verbose=False)
        with pytest.raises(
            Interrupted, match=f"last.ckpt; go on with --resume {tmp_path / 'run'}$"
        ):
            train_run(config("run"), resume=tmp_path / "run", verbose=False)
    train_run(config("run"), resume=tmp_path / "run", verbose=False)
    assert_same_run(tmp_path / "alone", tmp_path / "run")
    assert_same_run(tmp_path / "alone" / "teacher", tmp_path / "run" / "teacher")


def test_comparison_goes_on_and_keeps_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(tmp_path, name=None, epochs=1, tau=None)
    alone = compare(replace(config, name="alone"), ["cutmix", "none"], [3]).folder
    summarise = compare_module.summarise

    def stop(*args: Any) -> Any:  # after the first run, within the second
        stop_after(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        return summarise(*args)

    with monkeypatch.context() as patch:
        patch.setattr(compare_module, "summarise", stop)
        with pytest.raises(Interrupted, match="compare --resume"):
            compare(replace(config, name="run"), ["cutmix", "none"], [3])
        patch.undo()
    folder = tmp_path / "run"
    before = (folder / "none-seed3" / "last.ckpt").stat().st_mtime_ns
    assert (folder / "cutmix-seed3" / "last.ckpt").is_file()
    assert main(["compare", "--resume", str(folder), "--methods", "none"]) == 2
    assert "--methods none instead of cutmix,none" in capsys.readouterr().err
    assert main(["train", "--resume", str(folder)]) == 2
    assert "use vitmix compare --resume" in capsys.readouterr().err
    assert main(["compare", "--resume", str(folder)]) == 0
    assert (folder / "none-seed3" / "last.ckpt").stat().st_mtime_ns == before
    for name in ("none-seed3", "cutmix-seed3"):
        assert_same_run(alone / name, folder / name)
    assert (folder / "report.html").is_file()
    capsys.readouterr()
    assert main(["compare", "--resume", str(folder)]) == 0
    assert "nothing is left to do" in capsys.readouterr().out


# --- parts


def test_table_of_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    table = MetricsTable(path)
    table.log_metrics({"loss": 0.1}, 1)
    table.log_metrics({"loss": 0.2, "top1": 50.0}, 2)  # a new column
    table.log_metrics({"top1": 60.0}, 12)
    whole = "step,loss,top1\n1,0.1,\n2,0.2,50.0\n12,,60.0\n"
    assert path.read_text() == whole
    path.write_text(whole + "1")  # cut off in the middle of a row
    again = MetricsTable(path, 2)
    again.log_metrics({"top1": 60.0}, 12)
    assert path.read_text() == whole


def test_all_generators_come_back() -> None:
    class Task:
        device = torch.device("cpu")

    def draw(own: torch.Generator) -> list[float]:
        return [
            float(torch.rand(())),
            random.gauss(0, 1),
            float(np.random.standard_normal()),  # noqa: NPY002
            float(torch.rand((), generator=own)),
        ]

    task: Any = Task()
    trainer: Any = None
    own = torch.Generator()
    states = RandomStates(3, own=own)
    states.setup(trainer, task, "fit")
    draw(own)  # both normal draws leave a second one behind
    checkpoint: dict[str, Any] = {}
    states.on_save_checkpoint(trainer, task, checkpoint)
    expected = [draw(own) for _ in range(2)]
    other = torch.Generator()
    states = RandomStates(4, own=other)
    states.on_load_checkpoint(trainer, task, checkpoint)
    states.setup(trainer, task, "fit")
    states.on_train_start(trainer, task)
    assert [draw(other) for _ in range(2)] == expected
