"""A script put together from timm's parts, as timm's own training script is. Four lines change.

In timm's ``train.py`` the same four lines are: leave ``--mixup`` and ``--cutmix`` at 0
(``--smoothing`` is then a part of ``loss_fn``, which is not used); wrap the model behind
``create_model``; in ``train_one_epoch`` take ``model(input, target)`` and its ``.loss()`` instead
of ``loss_fn(output, target)``; give the averaged weights and the checkpoints ``model.model``.

Run it: ``python examples/timm_script.py``.
"""

from __future__ import annotations

import argparse

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, NativeScaler, accuracy

import vitmix
from digits import NUM_CLASSES, SIDE, loader


def main(epochs: int, steps: int | None) -> float:
    """Train, then return the accuracy of the averaged weights."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=SIDE, patch_size=4, depth=4, num_classes=NUM_CLASSES
    )
    model = vitmix.MixingModel(  # 1: behind create_model, instead of timm.data.Mixup
        model,
        mix=vitmix.OneOf([vitmix.Mixup(0.8), vitmix.CutMix(1.0)]),
        tokens=[vitmix.HorizontalTokenMixup(block=2)],
        num_classes=NUM_CLASSES,
        label_smoothing=0.1,
    ).to(device)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=max(epochs, 1), warmup_epochs=1, warmup_lr=1e-5
    )
    ema = ModelEmaV3(model.model, decay=0.9)  # 2: averaged weights are the model's own
    scaler = NativeScaler(device=device)
    for epoch in range(epochs):
        model.train()
        losses = AverageMeter()
        for step, (images, target) in enumerate(loader(train=True)):
            if step == steps:
                break
            images, target = images.to(device), target.to(device)
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = model(images, target).loss()  # 3: instead of output and loss_fn
            optimizer.zero_grad()
            scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
            ema.update(model.model)  # 4
            losses.update(loss.item(), len(images))
        scheduler.step(epoch + 1)
        print(f"epoch {epoch} loss {losses.avg:.3f}")
    top1 = AverageMeter()
    ema.module.eval()
    with torch.no_grad():
        for images, target in loader(train=False):
            output = ema.module(images.to(device))
            top1.update(accuracy(output, target.to(device))[0].item(), len(images))
    return float(top1.avg) / 100


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=None, help="at most so many steps an epoch")
    arguments = parser.parse_args()
    print(f"accuracy {main(arguments.epochs, arguments.steps):.3f}")
