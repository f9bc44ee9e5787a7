"""The Trainer of Hugging Face. What vitmix changes is marked: the model and one method.

Run it: ``python examples/huggingface_trainer.py``.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import vitmix
from digits import NUM_CLASSES, SIDE, tensors


class Digits(Dataset[dict[str, Tensor]]):
    """Items as the Trainer takes them."""

    def __init__(self, train: bool) -> None:
        self.images, self.labels = tensors(train)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


class MixingTrainer(Trainer):  # type: ignore[misc]  # 1: the loss comes from the mixing model
    """A Trainer whose model is a MixingModel."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Any:
        """Mixed in training; in evaluation mode exactly the model's logits and cross-entropy."""
        out = model(inputs["pixel_values"], inputs["labels"])
        loss = out.loss()
        return (loss, {"loss": loss, "logits": out.logits}) if return_outputs else loss


def accuracy(prediction: Any) -> dict[str, float]:
    """Metrics of the Trainer."""
    logits, labels = prediction
    return {"accuracy": float(np.mean(logits.argmax(-1) == labels))}


def main(epochs: int, steps: int | None) -> float:
    """Train, export, load again, and return the accuracy."""
    torch.manual_seed(0)
    model = ViTForImageClassification(
        ViTConfig(
            image_size=SIDE,
            patch_size=4,
            hidden_size=96,
            num_hidden_layers=4,
            num_attention_heads=3,
            intermediate_size=192,
            num_labels=NUM_CLASSES,
        )
    )
    mixing = vitmix.MixingModel(  # 2: around the model
        model,
        mix=vitmix.CutMix(),
        labels=vitmix.TokenAlignedLabels(),
        num_classes=NUM_CLASSES,
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            max_steps=-1 if steps is None else steps,
            per_device_train_batch_size=64,
            per_device_eval_batch_size=64,
            learning_rate=1e-3,
            weight_decay=0.05,
            save_strategy="no",
            report_to="none",
            label_names=["labels"],
            remove_unused_columns=False,
        )
        trainer = MixingTrainer(
            mixing, arguments, train_dataset=Digits(True), eval_dataset=Digits(False),
            compute_metrics=accuracy,
        )  # fmt: skip
        trainer.train()
        found = trainer.evaluate()["eval_accuracy"]
        mixing.export(f"{folder}/vit")  # config.json and model.safetensors, without vitmix in it
        ViTForImageClassification.from_pretrained(f"{folder}/vit")
    return float(found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=None, help="at most so many steps")
    arguments = parser.parse_args()
    print(f"accuracy {main(arguments.epochs, arguments.steps):.3f}")
