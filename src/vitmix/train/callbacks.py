"""What happens around the steps: progress, pictures, predictions, averaged weights."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from vitmix.processes import gather_objects
from vitmix.train.folder import replacing
from vitmix.train.loggers import log_picture
from vitmix.train.parallel import placed_like

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import lightning.pytorch as pl

    from vitmix.train.data import ImageData
    from vitmix.train.module import MixingTask

__all__ = ["ConsoleProgress", "MixedImages", "Predictions", "WeightAverage"]

# tqdm's own bar draws no colours, whatever NO_COLOR says.
BAR = "{desc}{percentage:3.0f}%|{bar}| {rate_fmt}{postfix}, {remaining} left"


class ConsoleProgress(Callback):
    """One bar for the run on a terminal; one plain line a tested epoch everywhere."""

    def __init__(self, label: str = "") -> None:
        self.label = label
        self.bar: tqdm[Any] | None = None
        self.started = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the bar, which counts images.

        Where a run goes on within an epoch, Lightning has counted the epoch's start before.
        """
        task: MixingTask = pl_module  # type: ignore[assignment]
        images = task.config.batch_size
        self.bar = tqdm(
            initial=trainer.global_step * images,
            total=task.steps * images,
            unit=" images",
            bar_format=BAR,
            leave=False,
            dynamic_ncols=True,
            disable=None,  # off where standard error is not a terminal
        )
        if trainer.fit_loop.restarted_mid_epoch:
            self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock, and say on the bar which epoch it is."""
        self.started = self.started or time.perf_counter()
        if self.bar is not None:
            self.bar.set_description(self._epoch(trainer))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *args: Any
    ) -> None:
        """Move the bar; to read the loss is to wait for the device, so not at every step."""
        if self.bar is None or self.bar.disable:
            return
        task: MixingTask = pl_module  # type: ignore[assignment]
        self.bar.update(task.config.batch_size)
        if trainer.global_step % 10 == 1:
            mixed = 100 * (1 - float(outputs["own_weight"]))
            self.bar.set_postfix_str(f"loss {float(outputs['loss']):.3f}, mixed {mixed:.0f}%")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the line of an epoch that was tested, above the bar."""
        task: MixingTask = pl_module  # type: ignore[assignment]
        entry = task.tested
        if entry is None:
            return
        with tqdm.external_write_mode():
            print(
                f"{self._epoch(trainer)}"
                f"  loss {entry.get('train/epoch_loss', float('nan')):.3f}"
                f"  test loss {entry['val/loss']:.3f}"
                f"  top-1 {entry['val/top1']:.2f}%"
                f"  {time.perf_counter() - self.started:.1f} s",
                flush=True,
            )
        self.started = 0.0

    def _epoch(self, trainer: pl.Trainer) -> str:
        width = len(str(trainer.max_epochs))
        return f"{self.label}epoch {trainer.current_epoch + 1:{width}}/{trainer.max_epochs}"

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the bar away."""
        self._close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Leave the terminal clean."""
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class MixedImages(Callback):
    """A picture of mixed samples in every N-th epoch and the last, as they were trained on.

    It is of the first step that mixes something, among the first of the epoch. It goes to the
    loggers, and as a file to a folder.
    """

    STEPS = 20  # that are looked at

    def __init__(self, data: ImageData, folder: Path, every: int) -> None:
        self.data, self.folder, self.every = data, folder, every
        self.wanted = False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Ask the task to keep what it mixes."""
        epoch = trainer.current_epoch
        if batch_idx == 0:
            self.wanted = epoch % self.every == 0 or epoch + 1 == trainer.max_epochs
        if self.wanted and batch_idx < self.STEPS:
            pl_module.watches = True  # type: ignore[assignment]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Make and log the picture."""
        task: MixingTask = pl_module  # type: ignore[assignment]
        if task.watched is None:
            return
        (out, images, labels), task.watched = task.watched, None
        from vitmix.plots.examples import examples_figure, telling_examples
        from vitmix.plots.style import LIGHT, pixels_of_figure, themed

        examples = telling_examples(out, images, labels, self.data, task.mixing)
        if not examples:
            return
        task.speed.pause()
        self.wanted = False
        epoch = trainer.current_epoch + 1
        with themed(LIGHT):
            figure = examples_figure(examples, LIGHT, f"epoch {epoch}")
            picture = pixels_of_figure(figure)
        for logger in trainer.loggers:
            log_picture(logger, "mixed samples", picture, trainer.global_step)
        self.folder.mkdir(exist_ok=True)
        with replacing(self.folder / f"epoch-{epoch:04}.png") as temporary:
            Image.fromarray(picture).save(temporary)


class Predictions(Callback):
    """``predictions.npz``: label and predicted class of every test image, as of the last epoch.

    The file is in place before the checkpoint of its epoch, so a run that goes on has it. All
    processes take part.
    """

    def __init__(self, path: Path, classes: Sequence[str]) -> None:
        self.path, self.classes = path, classes
        self._parts: list[np.ndarray] = []

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin anew."""
        self._parts.clear()

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *args: Any
    ) -> None:
        """Keep both in rows ``(2, B)``."""
        both = torch.stack((outputs["labels"], outputs["predictions"]))
        self._parts.append(both.to("cpu", torch.int32).numpy())

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file."""
        parts = gather_objects(np.concatenate(self._parts, axis=1))
        if trainer.is_global_zero:
            labels, predictions = np.concatenate(parts, axis=1)
            with replacing(self.path) as temporary:
                np.savez_compressed(
                    temporary, labels=labels, predictions=predictions, classes=self.classes
                )


class WeightAverage(Callback):
    """Exponential moving average of the weights, used for validation and stored beside them.

    The decay starts low, at ``(1 + step) / (10 + step)``, so that short runs work too.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.average: dict[str, torch.Tensor] = {}
        self.swapped: dict[str, torch.Tensor] | None = None

    @staticmethod
    def _state(pl_module: pl.LightningModule) -> dict[str, torch.Tensor]:
        task: MixingTask = pl_module  # type: ignore[assignment]
        return task.mixing.model.state_dict()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start from the first weights, or go on with the average of a checkpoint.

        At ``on_fit_start`` shards have not been read from a checkpoint yet.
        """
        self.average = {
            key: placed_like(self.average.get(key, value), value)
            for key, value in self._state(pl_module).items()
        }
        task: MixingTask = pl_module  # type: ignore[assignment]
        task.averaged = self.average

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Move the average towards the weights; counters and the like are copied."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        state = self._state(pl_module)
        floating = [key for key, value in state.items() if value.is_floating_point()]
        move = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        move([self.average[key] for key in floating], [state[key] for key in floating], self.steps)
        for key in state.keys() - set(floating):
            self.average[key].copy_(state[key])

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the average in place of the weights."""
        self.swapped = {key: value.clone() for key, value in self._state(pl_module).items()}
        pl_module.mixing.model.load_state_dict(self.average)  # type: ignore[union-attr]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the weights back."""
        if self.swapped is not None:
            pl_module.mixing.model.load_state_dict(self.swapped)  # type: ignore[union-attr]
            self.swapped = None

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """The average is stored by the task."""
        self.average = checkpoint["vitmix"]["averaged"]

    def state_dict(self) -> dict[str, Any]:
        """Kept in checkpoints."""
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting."""
        self.steps = state_dict["steps"]
