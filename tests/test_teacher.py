"""Teacher labels: activation maps of any classifier, and the weights they give."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import vitmix
from models import FAMILIES, NUM_CLASSES, SIZE, batch, make_cct, make_vit
from more_models import MORE_FAMILIES, logits_of, unsettle
from staged_models import STAGED

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


# Where the last norm and the classifier are, and how many tokens are in front of the patches.
BY_CLASS_TOKEN = {
    "vit": ("norm", "head", 1),
    "vit-registers": ("norm", "head", 4),
    "torchvision": ("encoder.ln", "heads.head", 1),
    "hf-vit": ("vit.layernorm", "classifier", 1),
    "hf-deit": ("deit.layernorm", "classifier", 2),
}


def make(name: str) -> tuple[Any, int]:
    """A teacher with weights far from where they begin, and the side of its images."""
    torch.manual_seed(0)
    staged = STAGED.get(name)
    made = {**FAMILIES, **MORE_FAMILIES}[name] if staged is None else staged.make
    teacher: Any = made()
    unsettle(teacher)
    return teacher.eval(), SIZE if staged is None else staged.side


@pytest.mark.parametrize("name", BY_CLASS_TOKEN)
def test_map_of_a_transformer_is_of_its_last_tokens(name: str) -> None:
    """Not of the patch embedding, a map of the same width that comes much earlier."""
    teacher, _ = make(name)
    norm, head, prefix = BY_CLASS_TOKEN[name]
    images, classes = batch(3)
    seen: list[torch.Tensor] = []
    handle = teacher.get_submodule(norm).register_forward_hook(lambda *call: seen.append(call[2]))
    teacher(images)
    handle.remove()
    weight = teacher.get_submodule(head).weight[classes]
    expected = torch.einsum("btd,bd->bt", seen[0][:, prefix:], weight).relu().view(3, 4, 4)
    torch.testing.assert_close(vitmix.ActivationMaps(teacher)(images, classes), expected)


@pytest.mark.parametrize(
    "name",
    ["relpos", "hf-ijepa", "hf-clip", "hf-siglip", "vit-pytorch-mean", "torchvision-swin",
     "hf-swin", "hf-pvt-v2", "twins", "mvit", "efficientformer"],
)  # fmt: skip
def test_the_mean_of_a_map_is_the_logit(name: str) -> None:
    teacher, side = make(name)
    images, classes = torch.randn(3, 3, side, side), torch.tensor([1, 0, 4])
    maps = vitmix.ActivationMaps(teacher)
    weight, bias = (
        torch.stack([getattr(layer, part) for layer in maps.classifiers]).mean(0)[classes]
        for part in ("weight", "bias")
    )
    with torch.no_grad():
        raw = (maps._features(images) * weight[:, :, None, None]).sum(1)
        logits = logits_of(teacher(images)).gather(1, classes[:, None])[:, 0]
    torch.testing.assert_close(raw.mean((1, 2)), logits - bias, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["vit-average", "naflex", "hf-beit", "hiera", "cait", "twins"])
def test_a_place_of_a_map_is_that_place_of_the_image(name: str) -> None:
    """Where one patch is another, the features change most: rows, columns and order are right."""
    teacher, side = make(name)
    maps, images = vitmix.ActivationMaps(teacher), torch.rand(1, 3, side, side)
    with torch.no_grad():
        before = maps._features(images)
        rows, columns = before.shape[2:]
        row, column, cell = rows // 2, columns // 4, side // rows
        images[:, :, row * cell :, column * cell :][:, :, :cell, :cell] = -2.0
        changed = (maps._features(images) - before).abs().sum(1)[0]
    assert divmod(int(changed.argmax()), columns) == (row, column)


class Squashed(nn.Module):
    """A layer and a tanh between the mean and the classifier, as in torchvision's MaxViT."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, NUM_CLASSES))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.stem(images).mean((2, 3)))


def make_timm(kind: str, **options: Any) -> nn.Module:
    arguments = {"img_size": SIZE, "patch_size": 8, "embed_dim": 32, "num_classes": NUM_CLASSES}
    return getattr(timm.models, kind)(**arguments, **options)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "tanh": (Squashed, "pooled otherwise"),
    "torchvision-maxvit": (STAGED["torchvision-maxvit"].make, "pooled otherwise"),
    "attention pooling": (FAMILIES["vit-attention-pool"], "pooled otherwise"),
    "mixer": (lambda: make_timm("MlpMixer", num_blocks=1), "tokens .* of a known grid"),
    "xcit": (lambda: make_timm("Xcit", depth=1, num_heads=2), "tokens .* of a known grid"),
    "two classifiers": (MORE_FAMILIES["hf-deit-teacher"], "gives the logits"),
    "crossvit": (lambda: timm.create_model("crossvit_tiny_240", num_classes=7), "gives the logits"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_features_that_the_classifier_does_not_see_are_refused(name: str) -> None:
    make, words = REFUSED[name]
    torch.manual_seed(0)
    teacher = make()
    side = 240 if name == "crossvit" else 64 if name.startswith("torchvision") else SIZE
    maps = vitmix.ActivationMaps(teacher)
    with pytest.raises(vitmix.UnsupportedModelError, match=words) as caught:
        maps(torch.randn(2, 3, side, side), torch.tensor([1, 2]))
    assert "store_maps" in str(caught.value)
    assert not any(module._forward_hooks for module in teacher.modules())


class Prepared(nn.Module):
    """A teacher for larger images that are normalised otherwise."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.vit(nn.functional.interpolate((images - 0.5) / 0.25, scale_factor=2))


def test_a_teacher_may_prepare_its_images() -> None:
    torch.manual_seed(0)
    vit = make_vit(img_size=2 * SIZE)
    images, classes = batch(3)
    prepared = nn.functional.interpolate((images - 0.5) / 0.25, scale_factor=2)
    found = vitmix.ActivationMaps(Prepared(vit))(images, classes)
    assert found.shape == (3, 8, 8)
    assert torch.equal(found, vitmix.ActivationMaps(vit)(prepared, classes))


def test_tokens_of_another_grid_are_refused() -> None:
    """A grid that changes between calls is not cut out of the tokens that are there."""
    maps = vitmix.ActivationMaps(FAMILIES["vit-dynamic-size"]())
    images, classes = batch(2)
    maps(images, classes)
    assert maps(images[:, :, :16], classes).shape == (2, 2, 4)
    maps._tokens = dataclasses.replace(maps._tokens, grid=lambda size: (3, 4))
    maps._source = (maps._source[0], maps._tokens.places, None)
    with pytest.raises(vitmix.UnsupportedModelError, match="3 x 4 tokens"):
        maps(images, classes)


def test_a_teacher_keeps_its_modes_and_precision_does_not_hide_its_features() -> None:
    teacher = torchvision.models.resnet18(num_classes=NUM_CLASSES).train()
    teacher.bn1.eval()
    maps = vitmix.ActivationMaps(teacher)
    with torch.autocast("cpu", torch.bfloat16):
        maps(torch.rand(2, 3, 64, 64), torch.tensor([1, 2]))
    assert teacher.training
    assert teacher.layer4.training
    assert not teacher.bn1.training


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


@pytest.mark.parametrize("shape", [(6, 1, 4, 4), (1, 4, 4)])
def test_maps_of_another_shape(shape: tuple[int, ...]) -> None:
    labels = vitmix.TeacherLabels(lambda images, classes: torch.rand(shape))
    mixing = vitmix.MixingModel(
        make_cct(), mix=vitmix.CutMix(), labels=labels, num_classes=NUM_CLASSES
    )
    with pytest.raises(vitmix.InputError, match=r"maps \(6, h, w\)"):
        mixing.train()(*batch())


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
    more = vitmix.TeacherLabels(torchvision.models.resnet18(num_classes=NUM_CLASSES + 1))
    with pytest.raises(vitmix.InputError, match=f"same {NUM_CLASSES} classes, got one of 8"):
        vitmix.MixingModel(make_cct(), vitmix.CutMix(), more, num_classes=NUM_CLASSES)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 7))
    with pytest.raises(vitmix.UnsupportedModelError, match="feature map"):
        vitmix.ActivationMaps(flat)(*batch(2))
