"""The Lightning task: one training step, validation, optimiser and schedule."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from vitmix.analysis import difficulty_quantiles
from vitmix.errors import VitmixError
from vitmix.functional import soft_cross_entropy
from vitmix.processes import gather_objects, mean_over_processes, process_rank
from vitmix.tokens import HorizontalTokenMixup
from vitmix.train.optimiser import learning_rate_factor, make_optimiser
from vitmix.train.parallel import whole
from vitmix.train.speed import Speed

if TYPE_CHECKING:
    from torch import Tensor

    from vitmix import MixingModel, MixOutput, MixTrace
    from vitmix.train.augment import BatchAugment
    from vitmix.train.config import TrainConfig

__all__ = ["MixingTask", "NonFiniteLossError"]


class NonFiniteLossError(VitmixError):
    """The training loss became NaN or infinite."""


class MixingTask(pl.LightningModule):
    """Trains a :class:`vitmix.MixingModel` and measures the model inside it.

    Args:
        mixing: model and stages.
        config: settings of the optimiser, the schedule and the logs.
        augment: what happens to a training batch on its device.
        prepare: what happens to a test batch there.
        num_classes: number of classes.
        epoch_steps: optimiser steps an epoch.
        facts: plain values to be stored in checkpoints, enough to build the model again.
    """

    def __init__(
        self,
        mixing: MixingModel,
        config: TrainConfig,
        *,
        augment: BatchAugment,
        prepare: BatchAugment,
        num_classes: int,
        epoch_steps: int,
        facts: dict[str, Any],
    ) -> None:
        super().__init__()
        self.mixing = mixing
        self.config = config
        self.augment, self.prepare = augment, prepare
        self.criterion = binary_cross_entropy_with_logits if config.bce_loss else soft_cross_entropy
        self.epoch_steps = epoch_steps
        self.steps = epoch_steps * config.epochs
        if config.max_steps is not None:
            self.steps = min(self.steps, config.max_steps)
        self.facts = facts
        self.log_every = config.log_interval or max(1, round(self.steps / 1000))
        self.top1 = MulticlassAccuracy(num_classes, average="micro")
        self.top5 = MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro")
        self.val_loss = MeanMetric()
        self.history: list[dict[str, float]] = []  # one entry a tested epoch
        self.averaged: dict[str, Tensor] | None = None  # set by the EMA callback
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._epoch_loss: list[Tensor] = []
        self.speed = Speed()
        self.watched: tuple[MixOutput, Tensor, Tensor] | None = None  # a step to make a picture of
        self.watches = False

    def configure_model(self) -> None:
        """Shard each block, and the rest, where the strategy asks for it."""
        if self.device_mesh is None:
            return
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        for block in self.mixing.backbone.blocks:
            fully_shard(block.module, mesh=mesh)
        fully_shard(self.mixing, mesh=mesh)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment and normalise on the device that the batch is on."""
        images, labels, *maps = batch
        stage = self.augment if self.trainer.training else self.prepare
        images, moved = stage.with_maps(images, maps[0] if maps else None)
        if self.config.channels_last:
            images = images.to(memory_format=torch.channels_last)
        return images, labels, moved

    def training_step(
        self, batch: tuple[Tensor, Tensor, Tensor | None], batch_idx: int
    ) -> dict[str, Tensor]:
        """Mix, predict, and check the loss before it can reach the weights."""
        images, labels, maps = batch
        out = self.mixing(images, labels, maps=maps)
        loss: Tensor = out.loss(self.criterion)
        worst = mean_over_processes(loss.detach(), torch.ones_like(loss))
        if not bool(torch.isfinite(worst)):
            raise NonFiniteLossError(
                f"the loss became {float(worst)} in step {self.global_step + 1} "
                f"(epoch {self.current_epoch + 1})"
            )
        values = {"train/loss": loss.detach(), **out.stats}
        if (self.global_step + 1) % self.log_every == 0:
            values |= self._difficulty(out.trace)
        self._record(values)
        self._epoch_loss.append(loss.detach())
        if self.watches:
            self.watched, self.watches = (out, images, labels), False
        return {"loss": loss, "own_weight": out.stats["target/own_weight"]}

    def on_train_start(self) -> None:
        """Stop at once where a run goes on that had come to its last step."""
        self._stop_at_the_end()

    def on_train_epoch_start(self) -> None:
        """Go on with the clock after a pause, and begin the epoch's loss anew."""
        self.speed.start()
        self._epoch_loss.clear()

    def on_train_batch_end(self, *args: Any) -> None:
        """Take the time; stop after the last step."""
        self.speed.count(self.config.batch_size)
        self._stop_at_the_end()

    def _stop_at_the_end(self) -> None:
        """Stop where ``max_steps`` says so; the last epoch is tested and closed as usual."""
        if self.global_step >= self.steps:
            self.trainer.check_val_every_n_epoch = 1
            self.trainer.should_stop = True

    @property
    def tested(self) -> dict[str, float] | None:
        """The figures of this epoch, where it was tested."""
        epoch = self.current_epoch + 1
        return self.history[-1] if self.history and self.history[-1]["epoch"] == epoch else None

    def _difficulty(self, trace: MixTrace) -> dict[str, Tensor]:
        """Quantiles of the difficulty in this step, and what it is compared with."""
        values = {}
        for stage in self.mixing.tokens:
            if isinstance(stage, HorizontalTokenMixup) and stage.block in trace.difficulty:
                name = f"{stage.short_name}_{stage.block}"
                for key, value in difficulty_quantiles(trace.difficulty[stage.block]).items():
                    values[f"{name}/{key}"] = value
                if not isinstance(stage.tau, str) and math.isfinite(stage.tau):
                    values[f"{name}/tau"] = torch.tensor(float(stage.tau))
        return values

    def _record(self, values: dict[str, Tensor]) -> None:
        """Log the mean of each value over ``log_every`` steps."""
        for key, value in values.items():
            value = value.detach().float()
            self._sums[key] = self._sums[key] + value if key in self._sums else value
            self._counts[key] = self._counts.get(key, 0) + 1
        if (self.global_step + 1) % self.log_every == 0:
            means = self._means() | self.speed.read(self.device)
            groups = self.optimizers().param_groups  # type: ignore[union-attr]
            means["lr"] = max(group["lr"] for group in groups)
            self._write(means, self.global_step + 1)
            self._sums.clear()
            self._counts.clear()

    def _means(self) -> dict[str, float]:
        """Mean of each value over the steps so far and over all processes that have it."""
        own = {key: (float(total), self._counts[key]) for key, total in self._sums.items()}
        parts = gather_objects(own)
        means = {}
        for key in dict.fromkeys(key for part in parts for key in part):
            found = [part[key] for part in parts if key in part]
            means[key] = sum(total for total, _ in found) / sum(count for _, count in found)
        return means

    def _write(self, values: dict[str, float], steps: int) -> None:
        """Log what is known after so many steps of the run."""
        for logger in self.loggers:
            logger.log_metrics(values, step=steps)

    def validation_step(
        self, batch: tuple[Tensor, Tensor, Tensor | None], batch_idx: int
    ) -> dict[str, Tensor]:
        """Measure the model on test images as they are; returns labels and predictions ``(B,)``."""
        images, labels, _ = batch
        logits = self.mixing(images).float()
        self.top1.update(logits, labels)
        self.top5.update(logits, labels)
        self.val_loss.update(torch.nn.functional.cross_entropy(logits, labels), weight=len(labels))
        return {"labels": labels, "predictions": logits.argmax(1)}

    def on_validation_epoch_end(self) -> None:
        """Close the epoch's figures."""
        entry = {
            "epoch": float(self.current_epoch + 1),
            "val/top1": round(100 * float(self.top1.compute()), 4),
            "val/top5": round(100 * float(self.top5.compute()), 4),
            "val/loss": float(self.val_loss.compute()),
        }
        for metric in (self.top1, self.top5, self.val_loss):
            metric.reset()
        if self._epoch_loss:
            own = torch.stack([loss.to(self.device) for loss in self._epoch_loss]).mean()
            entry["train/epoch_loss"] = float(mean_over_processes(own, torch.ones_like(own)))
        self.history.append(entry)
        self._write(entry, self.global_step)

    def configure_optimizers(self) -> Any:
        """The optimiser, with linear warm-up and a cosine down to ``min_lr``."""
        config = self.config
        optimiser = make_optimiser(self.mixing, config)
        warmup = round(config.warmup_epochs * self.epoch_steps)
        floor = min(config.min_lr / config.peak_lr, 1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: learning_rate_factor(step, self.steps, warmup, floor)
        )
        return {
            "optimizer": optimiser,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what is needed to build the model again, and the figures that are not closed yet."""
        checkpoint["vitmix"] = {
            **self.facts,
            "metrics": dict(self.history[-1]) if self.history else {},
            "averaged": self.averaged
            and {key: whole(value) for key, value in self.averaged.items()},
            "history": self.history,
            "running": gather_objects(
                {
                    "sums": {key: value.cpu() for key, value in self._sums.items()},
                    "counts": self._counts,
                    "epoch_loss": [value.cpu() for value in self._epoch_loss],
                }
            ),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the figures."""
        stored = checkpoint["vitmix"]
        self.history = stored["history"]
        running = stored["running"][process_rank()]
        # On the CPU: where this module will be, Lightning has not said yet.
        self._sums, self._counts = running["sums"], running["counts"]
        self._epoch_loss = running["epoch_loss"]
