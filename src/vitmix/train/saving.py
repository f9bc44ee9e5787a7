"""Checkpoints that a run goes on from as if nothing had happened, whatever stopped it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO

from vitmix.processes import gather_objects, process_rank
from vitmix.train.checkpoint import BEST, LAST, PREVIOUS
from vitmix.train.folder import replacing

if TYPE_CHECKING:
    from collections.abc import Iterator

    import lightning.pytorch as pl

    from vitmix.train.module import MixingTask

__all__ = ["Checkpoints", "RandomStates", "WholeFiles", "restored_signals"]

# Ctrl-C, and what schedulers send; each with what it does when it comes a second time.
SIGNALS: dict[int, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}


class WholeFiles(TorchCheckpointIO):
    """Writes beside, then renames: a reader never sees half a checkpoint."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint whole or not at all."""
        with replacing(Path(path)) as temporary:
            torch.save(checkpoint, temporary)


class Checkpoints(Callback):
    """Keeps the newest two checkpoints, and the one of the highest top-1.

    One is written after each epoch; within an epoch every ``steps`` steps and every ``minutes``
    minutes. Ctrl-C and SIGTERM end the run after a step, with a checkpoint; a second one at once.
    """

    KEPT = ("best_top1", "best_epoch", "started", "seconds")

    def __init__(self, folder: Path, *, steps: int | None, minutes: float | None) -> None:
        self.folder = folder
        self.last = folder / LAST
        self.steps, self.minutes = steps, minutes
        self.stop = False
        self.best_top1 = -1.0
        self.best_epoch = 0
        self.started = datetime.now(UTC).isoformat(timespec="seconds")
        self.seconds = 0.0  # of training, in this process and before
        self._clock = self._saved_at = 0.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._clock = self._saved_at = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen to signals in place of Lightning, which would not come as far as a checkpoint."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self.stop = True
        signal.signal(number, SIGNALS[number])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Save within the epoch; its end, and that of the run, has a checkpoint of its own."""
        task: MixingTask = pl_module  # type: ignore[assignment]
        if trainer.is_last_batch or trainer.global_step >= task.steps:
            return
        due = self.steps is not None and trainer.global_step % self.steps == 0
        if self.minutes is not None:
            due |= time.perf_counter() - self._saved_at >= 60 * self.minutes
        # Clocks differ, and a signal may reach one process only.
        if trainer.strategy.reduce_boolean_decision(due or self.stop, all=False):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save, and copy if it is the best so far."""
        task: MixingTask = pl_module  # type: ignore[assignment]
        tested = task.tested
        better = False
        if tested is not None and tested["val/top1"] > self.best_top1:
            better = True
            self.best_top1, self.best_epoch = tested["val/top1"], trainer.current_epoch + 1
        self._save(trainer, best=better)

    def _save(self, trainer: pl.Trainer, *, best: bool = False) -> None:
        for logger in trainer.loggers:
            logger.save()
        newest = self.folder / "next.ckpt"
        trainer.save_checkpoint(newest)
        if trainer.is_global_zero:
            self._put_in_place(newest, best=best)
        self._saved_at = time.perf_counter()
        # Not assigned to `stop`, which a signal may set in the meantime.
        if trainer.strategy.reduce_boolean_decision(self.stop, all=False):
            raise KeyboardInterrupt

    def _put_in_place(self, newest: Path, *, best: bool) -> None:
        if best:  # before `last`: whoever goes on from the one before comes here again
            with replacing(self.folder / BEST) as temporary:
                shutil.copyfile(newest, temporary)
        if self.last.exists():
            os.replace(self.last, self.folder / PREVIOUS)
        os.replace(newest, self.last)

    def state_dict(self) -> dict[str, Any]:
        """The best figure and the time so far."""
        now = time.perf_counter()
        self.seconds, self._clock = self.seconds + now - self._clock, now
        return {key: getattr(self, key) for key in self.KEPT}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from them."""
        for key in self.KEPT:
            setattr(self, key, state_dict[key])


class RandomStates(Callback):
    """Keeps the state of every generator in checkpoints, and puts it back before the first step.

    These are PyTorch's global ones (CPU and accelerator), Python's, NumPy's, and those given, each
    of every process.

    Args:
        seed: of this process's global generators. They are seeded once processes have found each
            other, where Lightning gives all of them what ``PL_GLOBAL_SEED`` says.
        generators: further ones.
    """

    def __init__(self, seed: int, **generators: torch.Generator) -> None:
        self.seed = seed
        self.generators = generators
        self._saved: dict[str, Any] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Seed the global generators of this process."""
        torch.manual_seed(self.seed)
        random.seed(self.seed)
        np.random.seed(self.seed % 2**32)  # noqa: NPY002 (what models may use)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store all states as plain values and tensors."""
        numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002
        words = numpy["state"]["key"].astype(np.int64)
        states = {
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": {**numpy, "state": {**numpy["state"], "key": torch.from_numpy(words)}},
            **{name: generator.get_state() for name, generator in self.generators.items()},
        }
        if pl_module.device.type != "cpu":
            accelerator = torch.get_device_module(pl_module.device)
            states[pl_module.device.type] = accelerator.get_rng_state()
        checkpoint["random"] = gather_objects(states)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Hold the states until everything is set up."""
        self._saved = checkpoint["random"][process_rank()]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the states back."""
        if self._saved is None:
            return
        saved, self._saved = self._saved, None
        torch.set_rng_state(saved["torch"])
        random.setstate(saved["python"])
        numpy = saved["numpy"]
        words = numpy["state"]["key"].numpy().astype(np.uint32)
        np.random.set_state({**numpy, "state": {**numpy["state"], "key": words}})  # noqa: NPY002
        for name, generator in self.generators.items():
            generator.set_state(saved[name])
        if pl_module.device.type in saved:
            accelerator = torch.get_device_module(pl_module.device)
            accelerator.set_rng_state(saved[pl_module.device.type])


@contextmanager
def restored_signals() -> Iterator[None]:
    """Put the handlers of the signals that stop a run back, whatever happens."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
