"""Your own loop in plain PyTorch. What vitmix changes is marked: three lines.

Run it: ``python examples/plain_pytorch.py``.
"""

from __future__ import annotations

import argparse

import timm
import torch

import vitmix
from digits import NUM_CLASSES, SIDE, loader


def main(epochs: int, steps: int | None) -> float:
    """Train, then return the accuracy."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=SIDE, patch_size=4, depth=4, num_classes=NUM_CLASSES
    )
    mixing = vitmix.MixingModel(  # 1: around the model
        model,
        mix=vitmix.CutMix(alpha=1.0),
        labels=vitmix.TokenAlignedLabels(),
        tokens=[vitmix.HorizontalTokenMixup(block=2)],
        num_classes=NUM_CLASSES,
        label_smoothing=0.1,
    )
    # ScoreNet is a part of `mixing`, so its parameters are trained too.
    optimizer = torch.optim.AdamW(mixing.parameters(), lr=1e-3, weight_decay=0.05)
    for epoch in range(epochs):
        mixing.train()
        for step, (images, labels) in enumerate(loader(train=True)):
            if step == steps:
                break
            loss = mixing(images, labels).loss()  # 2: mixes, runs the model, makes the targets
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch} loss {loss.item():.3f}")
    mixing.eval()
    hits = total = 0
    with torch.no_grad():
        for images, labels in loader(train=False):
            hits += int((mixing(images).argmax(1) == labels).sum())  # exactly model(images)
            total += len(labels)
    torch.save(mixing.model.state_dict(), "vit_digits.pt")  # 3: the model's own weights
    return hits / total


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=None, help="at most so many steps an epoch")
    arguments = parser.parse_args()
    print(f"accuracy {main(arguments.epochs, arguments.steps):.3f}")
