"""Class activation maps of any classifier (TokenMix, Sec. 3; CAM, Zhou et al., CVPR 2016)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitmix.errors import InputError, UnsupportedModelError

__all__ = ["ActivationMaps"]


class ActivationMaps:
    """The ground-truth class's activation map of a classifier.

    The map is what the classifier's weights of that class give at each place of the last feature
    map (convolutional networks) or at each patch token after the last norm (transformers), cut off
    below 0. Works for CCT, for timm models (``forward_features`` and ``get_classifier``), and for
    models that end in a linear layer over pooled ``(B, D, h, w)`` features, such as torchvision's
    ResNets.

    Args:
        teacher: the classifier. It is run in evaluation mode and without gradient.

    Raises:
        UnsupportedModelError: no linear classifier was found.

    Example:
        >>> from vitmix.models import create_model
        >>> teacher = create_model("cct_2_3x2_32", num_classes=10)
        >>> ActivationMaps(teacher)(torch.rand(2, 3, 32, 32), torch.tensor([3, 7])).shape
        torch.Size([2, 8, 8])
    """

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher = teacher
        self.classifiers = _classifiers(teacher)

    def __repr__(self) -> str:
        return f"ActivationMaps({type(self.teacher).__name__})"

    @torch.no_grad()
    def __call__(self, images: Tensor, classes: Tensor) -> Tensor:
        """Compute maps.

        Args:
            images: ``(B, C, H, W)``.
            classes: ``(B,)`` int64.

        Returns:
            ``(B, h, w)`` float32, at least 0.

        Raises:
            InputError: a class that the teacher doesn't know.
            UnsupportedModelError: no feature map was found that the classifier fits.
        """
        known = self.classifiers[0].out_features
        if classes.device.type == "cpu" and len(classes) and int(classes.max()) >= known:
            raise InputError(
                f"expected classes that the teacher knows, 0 to {known - 1}, "
                f"got {int(classes.max())}; use a teacher trained on the same classes"
            )
        training = self.teacher.training
        self.teacher.to(images.device).eval()
        try:
            features = self._features(images)
        finally:
            self.teacher.train(training)
        weight = torch.stack([layer.weight for layer in self.classifiers]).mean(0)[classes]
        return (features.float() * weight.float()[:, :, None, None]).sum(1).relu()

    def _features(self, images: Tensor) -> Tensor:
        """Last features ``(B, D, h, w)``."""
        teacher: Any = self.teacher
        width = self.classifiers[0].in_features
        if not hasattr(teacher, "forward_features"):
            return self._watched(images, width)
        features: Tensor = teacher.forward_features(images)
        if features.ndim == 3 and features.shape[2] == width:
            features = _as_map(teacher, images, features)
        if features.ndim == 4 and features.shape[1] == width:
            return features
        if features.ndim == 4 and features.shape[3] == width:
            return features.permute(0, 3, 1, 2)
        raise UnsupportedModelError(
            f"looked for features of the classifier's width {width} in {type(teacher).__name__}, "
            f"found {tuple(features.shape)}"
        )

    def _watched(self, images: Tensor, width: int) -> Tensor:
        """The last ``(B, width, h, w)`` with more than one place that any module gives."""
        found: list[Tensor] = []

        def watch(module: nn.Module, args: object, output: object) -> None:
            if not isinstance(output, Tensor) or output.ndim != 4:
                return
            if output.shape[1] == width and output.shape[2:].numel() > 1:
                found[:] = [output]

        handles = [module.register_forward_hook(watch) for module in self.teacher.modules()]
        try:
            self.teacher(images)
        finally:
            for handle in handles:
                handle.remove()
        if not found:
            raise UnsupportedModelError(
                f"looked for a feature map (B, {width}, h, w) in front of the classifier of "
                f"{type(self.teacher).__name__}, found none"
            )
        return found[0]


def _classifiers(teacher: Any) -> list[nn.Linear]:
    """The linear layers that classify: two for distilled models, whose logits are averaged."""
    found: Any = None
    if hasattr(teacher, "get_classifier"):
        found = teacher.get_classifier()
    layers = list(found) if isinstance(found, tuple) else [found]
    if not all(isinstance(layer, nn.Linear) for layer in layers):
        layers = [module for module in teacher.modules() if isinstance(module, nn.Linear)][-1:]
    if not layers:
        raise UnsupportedModelError(
            f"looked for a linear classifier in the teacher {type(teacher).__name__}, found none"
        )
    return layers


def _as_map(teacher: Any, images: Tensor, tokens: Tensor) -> Tensor:
    """Patch tokens ``(B, T, D)`` as ``(B, D, h, w)``."""
    prefix = int(getattr(teacher, "num_prefix_tokens", 0))
    tokens = tokens[:, prefix:]
    if isinstance(getattr(teacher, "fc_norm", None), nn.Module):
        tokens = teacher.fc_norm(tokens)
    size = (int(images.shape[2]), int(images.shape[3]))
    if hasattr(teacher, "grid_size"):
        rows, columns = teacher.grid_size(size)
    else:
        rows, columns = teacher.patch_embed.dynamic_feat_size(size)
    return tokens.transpose(1, 2).reshape(len(tokens), tokens.shape[2], rows, columns)
