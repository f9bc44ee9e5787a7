"""What else a trained model is measured by: calibration, robustness, localisation.

Each measure takes a :class:`Subject` and gives plain figures: accuracies, shares and errors as
fractions. What they compute on tensors stands in functions of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot, softmax

from vitmix.analysis import saliency_by_detector
from vitmix.backbones import describe
from vitmix.errors import InputError
from vitmix.functional.grids import on_pixels
from vitmix.mixing import MixingModel

__all__ = [
    "Subject",
    "calibration",
    "corruptions",
    "fgsm",
    "inside_box",
    "localisation",
    "occluded",
    "occlusion",
    "reliability",
]

Figures = dict[str, Any]
BINS = 15
ORDERS = ("random", "salient", "non-salient")
SHARES = tuple(step / 10 for step in range(10))
EPSILONS = (0.0, 0.5, 1.0, 2.0, 4.0)
THRESHOLDS = tuple(step / 20 for step in range(1, 20))


@dataclass(frozen=True)
class Subject:
    """A model and the images that it is measured on.

    Attributes:
        model: in evaluation mode, on its device; gives logits ``(B, K)``.
        batches: goes over the test images anew: ``(B, 3, H, W)`` uint8 and labels ``(B,)``.
        prepare: makes of images in [0, 255], of any dtype, what the model takes.
        num_classes: K.
        device: of the model.
        seed: of what is drawn.
    """

    model: nn.Module
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]]
    prepare: Callable[[Tensor], Tensor]
    num_classes: int
    device: str = "cpu"
    seed: int = 0

    def loaded(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches, on the device."""
        for images, labels in self.batches():
            yield images.to(self.device), labels.to(self.device)

    @torch.no_grad()
    def right(self, images: Tensor, labels: Tensor) -> int:
        """How many prepared images the model puts into their class."""
        return int((self.model(images).argmax(1) == labels).sum())


# --- calibration


def reliability(confidence: Tensor, right: Tensor, bins: int = BINS) -> list[Figures]:
    """A reliability diagram: in each of equal bins of confidence, how often a model is right.

    Args:
        confidence: ``(N,)`` probability of the predicted class.
        right: ``(N,)`` bool, whether the prediction is right.
        bins: number of bins.

    Returns:
        For each bin that is not empty its ``images``, mean ``confidence`` and ``accuracy``.

    Source: Guo et al., On Calibration of Modern Neural Networks (2017).
    """
    place = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    found = []
    for index in sorted(set(place.tolist())):
        inside = place == index
        found.append({
            "images": int(inside.sum()),
            "confidence": float(confidence[inside].mean()),
            "accuracy": float(right[inside].float().mean()),
        })  # fmt: skip
    return found


@torch.no_grad()
def calibration(subject: Subject) -> Figures:
    """Expected and largest calibration error of 15 bins, Brier score, and the reliability diagram.

    Mixed labels make a model less sure of itself; whether that is just, these say.
    """
    gathered = [
        (softmax(subject.model(subject.prepare(images)).float(), 1), labels)
        for images, labels in subject.loaded()
    ]
    probabilities, labels = (torch.cat(part) for part in zip(*gathered, strict=True))
    confidence, predicted = probabilities.max(1)
    bins = reliability(confidence.cpu(), (predicted == labels).cpu())
    errors = [abs(each["accuracy"] - each["confidence"]) for each in bins]
    shares = [each["images"] / len(labels) for each in bins]
    truth = one_hot(labels, subject.num_classes)
    return {
        "images": len(labels),
        "ece": sum(share * error for share, error in zip(shares, errors, strict=True)),
        "mce": max(errors),
        "brier": float((probabilities - truth).square().sum(1).mean()),
        "mean_confidence": float(confidence.mean()),
        "bins": bins,
    }


# --- occlusion


def occluded(images: Tensor, scores: Tensor, share: float) -> Tensor:
    """Images without the patches of the highest scores: those become the mean colour.

    Args:
        images: ``(B, C, H, W)``, normalised, so that 0 is the mean colour.
        scores: ``(B, h, w)`` of the patches; ``h`` and ``w`` at most ``H`` and ``W``.
        share: of the patches that is dropped, rounded to whole patches.

    Example:
        >>> occluded(torch.ones(1, 1, 2, 2), torch.tensor([[[3.0, 1.0], [2.0, 0.0]]]), 0.5)
        tensor([[[[0., 1.],
                  [0., 1.]]]])
    """
    count = round(share * scores[0].numel())
    chosen = scores.flatten(1).topk(count, dim=1).indices
    kept = torch.ones_like(scores).flatten(1).scatter(1, chosen, 0).view_as(scores)
    return images * on_pixels(kept, (images.shape[2], images.shape[3]))[:, None]


def occlusion(subject: Subject, shares: Sequence[float] = SHARES) -> Figures:
    """Accuracy against the share of patches that is dropped: at random, salient ones, others first.

    Patches are the tokens of the last block; how salient they are is what the model's own attention
    there says (Eq. 3 of TokenMixup).

    Returns:
        ``shares``, and for each order of dropping its ``accuracy``, a figure a share.

    Raises:
        UnsupportedModelError: a model without attention that could be read.

    Source: the occlusion study of TokenMix, after Naseer et al. (2021).
    """
    attention = _Attention(subject)
    generator = torch.Generator().manual_seed(subject.seed)
    right = {order: [0] * len(shares) for order in ORDERS}
    count = 0
    for raw, labels in subject.loaded():
        images = subject.prepare(raw)
        saliency = attention(images, labels)
        drawn = torch.rand(saliency.shape, generator=generator).to(images.device)
        orders = {"random": drawn, "salient": saliency, "non-salient": -saliency}
        count += len(labels)
        for order, scores in orders.items():
            for place, share in enumerate(shares):
                right[order][place] += subject.right(occluded(images, scores, share), labels)
    accuracy = {order: [hits / count for hits in found] for order, found in right.items()}
    return {"shares": list(shares), "accuracy": accuracy, "images": count}


class _Attention:
    """Saliency of the last block's tokens, ``(B, h, w)``, on the device of the images."""

    def __init__(self, subject: Subject) -> None:
        self.mixing = MixingModel(
            subject.model, num_classes=subject.num_classes, backbone=describe(subject.model)
        )
        self.block = self.mixing.backbone.depth - 1

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        (found,) = saliency_by_detector(
            self.mixing, images, labels, block=self.block, detectors=["attention"]
        ).values()
        assert found.maps is not None
        return found.maps.to(images.device)


# --- corruptions


def corruptions(
    subject: Subject, names: Sequence[str] | None = None, severities: Sequence[int] = range(1, 6)
) -> Figures:
    """Accuracy under the common corruptions of ImageNet-C.

    Args:
        subject: the model.
        names: of corruptions; by default the 15 common ones.
        severities: from 1 to 5.

    Returns:
        ``severities``; for each corruption its ``accuracy``, a figure a severity; and their
        ``mean``.

    Raises:
        InputError: the library that corrupts is not installed, or images that it cannot take.

    Source: Hendrycks and Dietterich (2019). Strengths are those of ImageNet-C, which are harder on
    small images than those of CIFAR-10-C.
    """
    library = corruption_library()
    names = list(names or library.get_corruption_names("common"))
    right = {name: [0] * len(severities) for name in names}
    count = 0
    for images, labels in subject.batches():
        if min(images.shape[2:]) < 32:
            raise InputError(
                "expected images of at least 32 x 32 pixels for --measures corruptions, got "
                f"{images.shape[2]} x {images.shape[3]}"
            )
        pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
        labels = labels.to(subject.device)
        for name in names:
            for place, severity in enumerate(severities):
                with _numpy_seed(subject.seed + count):
                    changed = np.stack([
                        library.corrupt(each, severity=severity, corruption_name=name, **_own_seed(
                            name, subject.seed + count + row
                        ))
                        for row, each in enumerate(pixels)
                    ])  # fmt: skip
                tensor = torch.from_numpy(changed).permute(0, 3, 1, 2).to(subject.device)
                right[name][place] += subject.right(subject.prepare(tensor), labels)
        count += len(labels)
    accuracy = {name: [hits / count for hits in found] for name, found in right.items()}
    mean = float(np.mean(list(accuracy.values())))
    return {"severities": list(severities), "accuracy": accuracy, "mean": mean, "images": count}


def corruption_library() -> Any:
    """The module imagecorruptions.

    Raises:
        InputError: it is not installed.
    """
    try:
        import imagecorruptions
    except ImportError as error:
        raise InputError(
            "expected the library imagecorruptions-imaug for --measures corruptions, it is not "
            "installed; pip install 'vitmix[evaluate]'"
        ) from error
    return imagecorruptions


def _own_seed(corruption: str, seed: int) -> dict[str, int]:
    """For the two corruptions that do not draw from NumPy's global generator."""
    return {"seed": seed} if corruption in ("impulse_noise", "glass_blur") else {}


@contextmanager
def _numpy_seed(seed: int) -> Iterator[None]:
    """Seed NumPy's global generator, which most corruptions draw from, and put it back."""
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002


# --- adversarial examples


def fgsm(subject: Subject, epsilons: Sequence[float] = EPSILONS) -> Figures:
    """Accuracy after one step of each pixel along the sign of the loss's gradient.

    Args:
        subject: the model.
        epsilons: sizes of the step, in 255ths of the range of a pixel.

    Source: Goodfellow et al., Explaining and Harnessing Adversarial Examples (2015).
    """
    right, count = [0] * len(epsilons), 0
    for raw, labels in subject.loaded():
        images = raw.float().requires_grad_()
        loss = cross_entropy(subject.model(subject.prepare(images)).float(), labels)
        (gradient,) = torch.autograd.grad(loss, images)
        count += len(labels)
        for place, epsilon in enumerate(epsilons):
            moved = (images.detach() + epsilon * gradient.sign()).clamp(0, 255)
            right[place] += subject.right(subject.prepare(moved), labels)
    return {
        "epsilons": list(epsilons), "accuracy": [hits / count for hits in right], "images": count,
    }  # fmt: skip


# --- localisation


def inside_box(saliency: Tensor, boxes: Tensor) -> dict[str, Tensor]:
    """How well saliency says where the object is.

    Args:
        saliency: ``(B, h, w)``, at least 0.
        boxes: ``(B, H, W)`` bool, the pixels inside the box; at least one in each image.

    Returns:
        ``pointing`` ``(B,)`` bool, whether the most salient patch has its middle inside (the
        pointing game); ``share`` ``(B,)`` of the saliency inside; ``area`` ``(B,)`` of the image
        inside, which is both for even saliency; ``overlap`` ``(B, T)``, intersection over union of
        the box with what reaches each of ``THRESHOLDS`` of the greatest saliency.

    Example:
        >>> box = torch.tensor([[[True, False], [True, False]]])
        >>> found = inside_box(torch.tensor([[[3.0, 1.0], [0.0, 0.0]]]), box)
        >>> found["pointing"].tolist(), found["share"].tolist(), found["area"].tolist()
        ([True], [0.75], [0.5])
    """
    height, width = boxes.shape[1:]
    rows, columns = saliency.shape[1:]
    peak = saliency.flatten(1).argmax(1)
    middle_row = (peak // columns * 2 + 1) * height // (2 * rows)
    middle_column = (peak % columns * 2 + 1) * width // (2 * columns)
    pixels = on_pixels(saliency, (height, width))
    inside = boxes.float()
    levels = torch.tensor(THRESHOLDS, device=saliency.device)
    reached = pixels[:, None] >= levels[:, None, None] * pixels.amax((1, 2))[:, None, None, None]
    common = (reached & boxes[:, None]).sum((2, 3))
    return {
        "pointing": boxes[torch.arange(len(boxes), device=boxes.device), middle_row, middle_column],
        "share": (pixels * inside).sum((1, 2)) / pixels.sum((1, 2)),
        "area": inside.mean((1, 2)),
        "overlap": common / (reached | boxes[:, None]).sum((2, 3)),
    }


def localisation(subject: Subject, batches: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Figures:
    """Whether the attention of the last block is where the object's box is.

    Args:
        subject: the model.
        batches: images ``(B, 3, H, W)`` uint8, labels ``(B,)``, and the pixels inside of boxes
            ``(B, H, W)`` bool.

    Returns:
        Means over the images of ``pointing``, ``share`` and ``area`` (see :func:`inside_box`), and
        the best mean ``iou`` over thresholds with its ``threshold``.

    Raises:
        UnsupportedModelError: a model without attention that could be read.
    """
    attention = _Attention(subject)
    found: list[dict[str, Tensor]] = []
    for images, labels, boxes in batches:
        prepared = subject.prepare(images.to(subject.device))
        saliency = attention(prepared, labels.to(subject.device))
        found.append(inside_box(saliency.cpu(), boxes))
    means = {
        key: torch.cat([each[key].float() for each in found]).mean(0)
        for key in ("pointing", "share", "area", "overlap")
    }
    overlap, place = means.pop("overlap").max(0)
    return {
        **{key: float(value) for key, value in means.items()},
        "iou": float(overlap),
        "threshold": THRESHOLDS[int(place)],
        "images": sum(len(each["area"]) for each in found),
    }
