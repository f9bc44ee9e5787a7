"""Teacher labels: activation maps of any classifier, and the weights they give."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import vitmix
from models import FAMILIES, NUM_CLASSES, SIZE, batch, make_cct

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

TEACHERS = {
    "cct": make_cct,
    "vit": FAMILIES["vit"],
    "vit-average": FAMILIES["vit-average"],
    "deit-distilled": FAMILIES["deit-distilled"],
    "timm-resnet": lambda: timm.create_model("resnet10t", num_classes=NUM_CLASSES),
    "timm-convnext": lambda: timm.create_model("convnext_atto", num_classes=NUM_CLASSES),
    "timm-swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=NUM_CLASSES, img_size=64, window_size=2
    ),
    "torchvision-resnet": lambda: torchvision.models.resnet18(num_classes=NUM_CLASSES),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_maps_of_any_classifier(name: str) -> None:
    teacher = TEACHERS[name]().train()
    images, classes = batch(3)
    images = nn.functional.interpolate(images, 64) if name not in FAMILIES else images
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    maps = vitmix.ActivationMaps(teacher)(images, classes)
    assert maps.ndim == 3
    assert len(maps) == 3
    assert (maps >= 0).all()
    assert not maps.requires_grad
    assert teacher.training
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_map_of_an_average_pooled_network_is_its_logit() -> None:
    """Without the cut at 0, the mean of the map is the logit less the bias (CAM)."""
    teacher = TEACHERS["timm-resnet"]().eval()
    images, classes = batch(4)
    images = nn.functional.interpolate(images, 96)
    maps = vitmix.ActivationMaps(teacher)
    weight = teacher.fc.weight[classes]
    raw = (maps._features(images) * weight[:, :, None, None]).sum(1)
    torch.testing.assert_close(maps(images, classes), raw.relu())
    logits = teacher(images).gather(1, classes[:, None])[:, 0] - teacher.fc.bias[classes]
    torch.testing.assert_close(raw.mean((1, 2)), logits, atol=1e-5, rtol=1e-4)


def centre(images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """A teacher that sees every object in the upper left quarter."""
    maps = torch.zeros(len(images), 8, 8)
    maps[:, :4, :4] = 1
    return maps


class UpperHalf(vitmix.PixelMix):
    def own_shares(self, count, size, grid, rng):  # type: ignore[no-untyped-def]
        import numpy as np

        own = np.ones((count, *size), dtype=np.float32)
        own[:, : size[0] // 4] = 0
        return own, True


def test_weights_follow_the_object() -> None:
    """The partner covers the upper quarter of the rows: half of each object."""
    mixing = vitmix.MixingModel(
        make_cct(),
        mix=UpperHalf(),
        labels=vitmix.TeacherLabels(centre),
        num_classes=NUM_CLASSES,
    ).train()
    out = mixing(*batch())
    torch.testing.assert_close(out.trace.weights, torch.full((6, 2), 0.5))
    assert float(out.trace.pixels.lam[0]) == 0.75


def corners(images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """A teacher that sees even samples in one corner and odd ones in the other."""
    maps = torch.zeros(len(images), 8, 8)
    maps[::2, :4, :4] = 1
    maps[1::2, 4:, 4:] = 1
    return maps


def test_raw_weights_of_the_released_code() -> None:
    mixing = vitmix.MixingModel(
        make_cct(),
        mix=vitmix.TokenMix(),
        labels=vitmix.TeacherLabels(corners, normalise=False),
        num_classes=NUM_CLASSES,
    ).train()
    sums = torch.stack([mixing(*batch()).targets.sum(1) for _ in range(20)])
    assert sums.min() < 0.95
    assert sums.max() > 1.05


def test_an_empty_map_falls_back_to_the_area() -> None:
    mixing = vitmix.MixingModel(
        make_cct(),
        mix=vitmix.CutMix(),
        labels=vitmix.TeacherLabels(lambda images, classes: torch.zeros(len(images), 4, 4)),
        num_classes=NUM_CLASSES,
    ).train()
    out = mixing(*batch())
    torch.testing.assert_close(out.trace.weights[:, 0], out.trace.pixels.lam)


def test_a_teacher_is_not_part_of_the_model() -> None:
    teacher = make_cct()
    labels = vitmix.TeacherLabels(teacher)
    mixing = vitmix.MixingModel(
        make_cct(), mix=vitmix.TokenMix(), labels=labels, num_classes=NUM_CLASSES
    )
    assert len(list(mixing.parameters())) == len(list(make_cct().parameters()))
    assert copy.deepcopy(mixing).labels.maps is labels.maps
    mixing.train()(*batch()).loss().backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_bad_teachers() -> None:
    with pytest.raises(vitmix.UnsupportedModelError, match="linear classifier"):
        vitmix.TeacherLabels(nn.Conv2d(3, 4, 1))
    with pytest.raises(vitmix.InputError, match="teacher"):
        vitmix.TeacherLabels("resnet18")
    few = torchvision.models.resnet18(num_classes=2)
    images, classes = torch.rand(2, 3, 64, 64), torch.tensor([1, 5])
    with pytest.raises(vitmix.InputError, match="got 5"):
        vitmix.ActivationMaps(few)(images, classes)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 7))
    with pytest.raises(vitmix.UnsupportedModelError, match="feature map"):
        vitmix.ActivationMaps(flat)(*batch(2))
