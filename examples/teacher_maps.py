"""TokenMix with stored teacher maps, in a training loop of your own.

The teacher sees every image once. Afterwards its map of an image goes through the same torchvision
transforms as the image, as a mask: crops, flips and resizes keep the two aligned.

    python examples/teacher_maps.py path/to/class/folders --teacher resnet18 --weights mine.pth
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import tv_tensors
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import vitmix
from vitmix.models import create_model

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def as_input(side: int, *moves: v2.Transform) -> v2.Transform:
    """What a model takes: moved, of one size, normalised."""
    return v2.Compose(
        [
            *moves,
            v2.Resize((side, side)),
            v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


class Viewed(Dataset[Any]):
    """Images through a transform; with maps, each with its own through the same."""

    def __init__(
        self, images: Any, transform: v2.Transform, maps: vitmix.TeacherMaps | None = None
    ) -> None:
        self.images, self.transform, self.maps = images, transform, maps

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Any, ...]:
        picture, label = self.images[row]
        image = v2.functional.to_image(picture)
        if self.maps is None:
            return self.transform(image), label
        size = image.shape[-2:]  # a mask must cover its image
        mask = nn.functional.interpolate(self.maps[row][None, None].float(), size, mode="bilinear")
        image, mask = self.transform(image, tv_tensors.Mask(mask[0]))
        return image, label, mask[0]


def teach(teacher: nn.Module, images: Any, side: int, folder: str) -> vitmix.TeacherMaps:
    """Run the teacher once over whole images. Interrupted, it goes on where it stopped."""
    viewed = Viewed(images, as_input(side))

    def batches(start: int) -> Iterable[tuple[Tensor, Tensor]]:
        return DataLoader(Subset(viewed, range(start, len(viewed))), batch_size=64)

    return vitmix.store_maps(folder, vitmix.ActivationMaps(teacher), batches, len(viewed))


def train(
    model: nn.Module,
    images: Any,
    maps: vitmix.TeacherMaps,
    *,
    side: int,
    num_classes: int,
    epochs: int = 1,
    batch_size: int = 64,
    report: Callable[[float], None] = print,
) -> vitmix.MixingModel:
    """TokenMix whose labels come from the maps."""
    moves = (v2.RandomResizedCrop(side, scale=(0.4, 1.0)), v2.RandomHorizontalFlip())
    viewed = Viewed(images, as_input(side, *moves), maps)
    loader: Any = DataLoader(viewed, batch_size, shuffle=True, drop_last=True)
    mixing = vitmix.MixingModel(
        model,
        mix=vitmix.TokenMix(),
        labels=vitmix.TeacherLabels(maps=maps),
        num_classes=num_classes,
    )
    optimizer = torch.optim.AdamW(mixing.parameters(), lr=5e-4)
    for _ in range(epochs):
        for batch, labels, moved in loader:
            loss = mixing(batch, labels, maps=moved).loss()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            report(float(loss.detach()))
    return mixing


def main() -> None:
    """Teach, then train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", help="folder of class folders")
    parser.add_argument("--teacher", default="resnet18", help="timm name")
    parser.add_argument("--weights", required=True, help="its weights, trained on these classes")
    parser.add_argument("--student", default="deit_tiny_patch16_224")
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--maps", default="maps", help="folder of the maps")
    options = parser.parse_args()
    images = ImageFolder(options.images)
    count = len(images.classes)
    teacher = create_model(
        options.teacher, num_classes=count, img_size=options.side, checkpoint_path=options.weights
    )
    maps = teach(teacher, images, options.side, options.maps)
    student = create_model(options.student, num_classes=count, img_size=options.side)
    train(student, images, maps, side=options.side, num_classes=count)


if __name__ == "__main__":
    main()
