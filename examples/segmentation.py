"""A dense task: a backbone trained with vitmix, loaded by timm, under a small segmentation head.

Run it: ``python examples/segmentation.py`` makes images, backbone and masks in about a minute. With
``--data`` it takes a folder with ``images`` and, under the same names, ``masks`` of class numbers
(255: not counted); with ``--weights`` a file of ``vitmix export RUN FILE --part backbone``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torchmetrics.classification import MulticlassJaccardIndex

import vitmix
from digits import NUM_CLASSES, SIDE, tensors
from vitmix.weights import read_facts

IGNORED = 255
OWN = {  # the backbone that is trained here where none is given
    "model_name": "vit_tiny_patch16_224",
    "img_size": SIDE, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2,
    "class_token": False, "global_pool": "avg",
}  # fmt: skip


def scenes(train: bool, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Digits, moved a little, on smooth noise; where there is ink, the mask is the digit plus 1.

    Returns:
        Images ``(N, 3, 32, 32)`` in [-1, 1], masks ``(N, 32, 32)`` and digits ``(N,)``.
    """
    generator = torch.Generator().manual_seed(seed)
    digits, labels = tensors(train)
    shifts = torch.randint(-2, 3, (len(digits), 2), generator=generator).tolist()
    digits = torch.stack([d.roll(s, (1, 2)) for d, s in zip(digits, shifts, strict=True)])
    noise = torch.rand(len(digits), 3, 4, 4, generator=generator) * 0.6 - 1
    ink = digits > -0.25
    images = torch.where(ink, digits, interpolate(noise, size=SIDE, mode="bilinear"))
    return images, ink[:, 0] * (labels[:, None, None] + 1), labels


def pretrain(path: Path, steps: int) -> None:
    """Train a classifier of the digits in such scenes, and export it without its classifier."""
    images, _, labels = scenes(train=True, seed=0)
    model = timm.create_model(num_classes=NUM_CLASSES, **OWN)
    mixing = vitmix.MixingModel(
        model,
        mix=vitmix.CutMix(prob=0.3),
        labels=vitmix.TokenAlignedLabels(),
        num_classes=NUM_CLASSES,
    ).train()
    optimizer = torch.optim.AdamW(mixing.parameters(), lr=4e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, max(steps, 2))
    for _ in range(steps):
        rows = torch.randint(len(images), (64,))
        loss = mixing(images[rows], labels[rows]).loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    mixing.export(path, head=False)


@torch.no_grad()
def levels(backbone: Any, images: Tensor) -> Tensor:
    """The backbone's last three levels, side by side at the resolution of the first of them."""
    parts = []
    for start in range(0, len(images), 64):
        batch = images[start : start + 64]
        found = backbone.eval().forward_intermediates(batch, intermediates_only=True)[-3:]
        size = found[0].shape[-2:]
        parts.append(torch.cat([interpolate(level, size, mode="bilinear") for level in found], 1))
    return torch.cat(parts)


def mean_iou(
    backbone: nn.Module, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], steps: int
) -> float:
    """Train a linear layer from each place of the frozen backbone's levels to its pixels.

    Returns:
        The mean over classes of intersection by union on the test masks.
    """
    torch.manual_seed(0)
    classes = 1 + max(int(masks[masks != IGNORED].max()) for _, masks in (train, test))
    seen, unseen = levels(backbone, train[0]), levels(backbone, test[0])
    scale = train[1].shape[-1] // seen.shape[-1]
    head = nn.Sequential(
        nn.BatchNorm2d(seen.shape[1]),
        nn.Conv2d(seen.shape[1], classes * scale**2, kernel_size=1),
        nn.PixelShuffle(scale),
        nn.Upsample(train[1].shape[-2:], mode="bilinear"),
    )
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(steps):
        rows = torch.randint(len(seen), (64,))
        loss: Any = cross_entropy(head(seen[rows]), train[1][rows], ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    metric = MulticlassJaccardIndex(classes, average="macro", ignore_index=IGNORED)
    with torch.no_grad():
        metric.update(head.eval()(unseen).argmax(1), test[1])
    return float(metric.compute())


def read_folder(folder: Path, side: int, facts: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Images, normalised as the backbone knows them, and masks; squares of ``side`` pixels."""
    images, masks = [], []
    for path in sorted((folder / "images").iterdir()):
        mask = next((folder / "masks").glob(f"{path.stem}.*"))
        picture = Image.open(path).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        classes = Image.open(mask).resize((side, side), Image.Resampling.NEAREST)
        images.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255)
        masks.append(torch.from_numpy(np.array(classes)).long())
    mean, std = (torch.tensor(facts.get(key, [0.5] * 3))[:, None, None] for key in ("mean", "std"))
    return (torch.stack(images) - mean) / std, torch.stack(masks)


def main(
    steps: int, pretraining: int, weights: Path | None = None, data: Path | None = None
) -> tuple[float, float]:
    """Mean IoU with the trained backbone, and with one of random weights."""
    torch.manual_seed(0)
    facts = {} if weights is None else read_facts(weights)
    options: dict[str, Any] = OWN
    if weights is not None:
        if not facts:
            raise SystemExit(
                f"expected what vitmix export RUN FILE --part backbone wrote: {weights}"
            )
        options = {"model_name": facts["model"], "img_size": facts["img_size"]}
        options |= facts["model_kwargs"] or {}
    if weights is None:
        weights = Path("backbone.safetensors")
        pretrain(weights, pretraining)
    if data is None:
        train, test = scenes(True, seed=1)[:2], scenes(False, seed=2)[:2]
        if options["img_size"] != SIDE:
            raise SystemExit(f"expected --data for {weights}: the scenes have {SIDE} pixels")
    else:
        images, masks = read_folder(data, options["img_size"], facts)
        held_out = torch.arange(len(images)) % 5 == 0
        train, test = (images[~held_out], masks[~held_out]), (images[held_out], masks[held_out])
    trained = timm.create_model(num_classes=0, checkpoint_path=weights, **options)  # checked
    untrained = timm.create_model(num_classes=0, **options)
    return mean_iou(trained, train, test, steps), mean_iou(untrained, train, test, steps)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="of the segmentation head")
    parser.add_argument("--pretraining", type=int, default=500, help="steps of the classifier")
    parser.add_argument("--weights", type=Path, help="of a backbone that vitmix export wrote")
    parser.add_argument("--data", type=Path, help="folder with images and masks")
    arguments = parser.parse_args()
    found, control = main(**vars(arguments))
    print(f"mean IoU {found:.3f} with the trained backbone, {control:.3f} with random weights")
