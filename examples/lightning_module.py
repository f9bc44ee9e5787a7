"""Your own LightningModule. What vitmix changes is marked: two lines.

Run it: ``python examples/lightning_module.py``.
"""

from __future__ import annotations

import argparse

import lightning.pytorch as pl
import timm
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

import vitmix
from digits import NUM_CLASSES, SIDE, loader


class Classifier(pl.LightningModule):
    """A timm model with an optimiser and a metric."""

    def __init__(self) -> None:
        super().__init__()
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=SIDE, patch_size=4, depth=4, num_classes=NUM_CLASSES
        )
        self.model = vitmix.MixingModel(  # 1: around the model
            model,
            mix=vitmix.TokenMix(),
            tokens=[vitmix.HorizontalTokenMixup(block=2), vitmix.VerticalTokenMixup(block=3)],
            num_classes=NUM_CLASSES,
        )
        self.accuracy = MulticlassAccuracy(NUM_CLASSES, average="micro")

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """One step."""
        images, labels = batch
        out: vitmix.MixOutput = self.model(images, labels)  # 2: instead of logits and criterion
        self.log_dict({f"mix/{name}": value for name, value in out.stats.items()})
        loss = out.loss()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        """Accuracy; Lightning puts the model into evaluation mode, which mixes nothing."""
        images, labels = batch
        self.accuracy(self.model(images), labels)
        self.log("val/accuracy", self.accuracy, on_epoch=True, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over the model and the stages' own parameters."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.05)


def main(epochs: int, steps: int | None) -> float:
    """Train, then return the accuracy."""
    pl.seed_everything(0)
    trainer = pl.Trainer(
        max_epochs=epochs,
        limit_train_batches=steps if steps is not None else 1.0,
        accelerator="auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Classifier(), loader(train=True), loader(train=False))
    return float(trainer.callback_metrics["val/accuracy"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=None, help="at most so many steps an epoch")
    arguments = parser.parse_args()
    print(f"accuracy {main(arguments.epochs, arguments.steps):.3f}")
