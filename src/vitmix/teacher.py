"""Class activation maps of any classifier (TokenMix, Sec. 3; CAM, Zhou et al., CVPR 2016)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitmix.backbones import Backbone, known_part
from vitmix.compilation import uncompiled
from vitmix.errors import InputError, UnsupportedModelError
from vitmix.functional.grids import Grid
from vitmix.functional.precision import no_autocast
from vitmix.gradient import logits_of

__all__ = ["ActivationMaps"]

INSTEAD = "Take a timm ViT or ResNet as teacher, or store maps of your own (vitmix.store_maps)"

# What makes a map (B, D, h, w) of a module's result, for images of a size. The norm is one between
# pooling and classifier: tokens pass it one by one.
_Reading = Callable[[Tensor, Grid, nn.Module | None], Tensor]


class ActivationMaps:
    """The ground-truth class's activation map of a classifier.

    The map is what the classifier's weights of that class give at each place of the last feature
    map (convolutional networks) or at each patch token after the last norm (transformers), cut off
    below 0. Works for models that end in a linear layer over the mean of a feature map, or over the
    class token or the mean of tokens whose grid is known: those that :func:`vitmix.describe` knows,
    and others of timm.

    The first call looks for the module that gives the features, by one image: the last one whose
    result, pooled, is what the classifier is given.

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
        self._tokens = _token_grid(teacher)
        self._part = teacher if self._tokens is None else self._tokens.part
        self._source: tuple[nn.Module, _Reading, nn.Module | None] | None = None

    @property
    def num_classes(self) -> int:
        """Classes that the teacher knows."""
        return self.classifiers[0].out_features

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
            UnsupportedModelError: no features were found that the classifier sees the mean, or the
                class token, of.
        """
        known = self.num_classes
        if classes.device.type == "cpu" and len(classes) and int(classes.max()) >= known:
            raise InputError(
                f"expected classes that the teacher knows, 0 to {known - 1}, "
                f"got {int(classes.max())}; use a teacher trained on the same classes"
            )
        self.teacher.to(images.device)
        with _evaluating(self.teacher), uncompiled():
            features = self._features(images)
        weight = torch.stack([layer.weight for layer in self.classifiers]).mean(0)[classes]
        return (features.float() * weight.float()[:, :, None, None]).sum(1).relu()

    def _features(self, images: Tensor) -> Tensor:
        """Last features ``(B, D, h, w)``."""
        if self._source is None:
            with no_autocast(images):
                self._source = self._find(images[:1])
        module, reading, norm = self._source
        calls, _ = _watched(self.teacher, {module, self._part}, images)
        return reading(calls[module].result, self._size(calls, images), norm)

    def _size(self, calls: dict[nn.Module, _Call], images: Tensor) -> Grid:
        """Height and width of what the part with the tokens is given: a teacher may resize."""
        given = calls[self._part].given if self._part in calls else images
        return int(given.shape[2]), int(given.shape[3])

    def _find(self, images: Tensor) -> tuple[nn.Module, _Reading, nn.Module | None]:
        """The module that gives the last features, and how they are read off its result."""
        calls, logits = _watched(self.teacher, self.teacher.modules(), images)
        name, width = type(self.teacher).__name__, self.classifiers[0].in_features
        size = self._size(calls, images)
        heads = [calls[layer] for layer in self.classifiers if layer in calls]
        if not heads or not _same(torch.stack([head.result for head in heads]).mean(0), logits):
            raise UnsupportedModelError(
                f"looked for a linear classifier that gives the logits of {name}, found "
                f"{self.classifiers[-1]}, which does not. {INSTEAD}"
            )
        given = torch.stack([head.given for head in heads]).mean(0)
        pooled = [(given, None), *_in_front_of_a_norm(calls, given)]
        fitting = [
            (module, *reading)
            for module, call in reversed(calls.items())
            for reading in self._readings(call.result, size)
        ]
        for module, reading, means in fitting:
            for expected, norm in pooled:
                if any(_same(mean, expected) for mean in means):
                    return module, reading, norm
        raise UnsupportedModelError(
            f"looked for a feature map (B, {width}, h, w), or tokens (B, T, {width}) of a known "
            f"grid, whose mean or class token is what the classifier of {name} is given, found "
            + (f"{len(fitting)} of that width, pooled otherwise" if fitting else "none")
            + f". {INSTEAD}"
        )

    def _readings(self, result: Tensor, size: Grid) -> Iterator[tuple[_Reading, list[Tensor]]]:
        """Ways to read a map off a module's result, and what poolings would make of it."""
        width, tokens = self.classifiers[0].in_features, self._tokens
        if result.ndim == 4:
            for reading in (_channels_first, _channels_last):
                features = reading(result, size, None)
                if features.shape[1] == width and features.shape[2:].numel() > 1:
                    yield reading, [features.mean((2, 3))]
        elif tokens is not None and tokens.fit(result, width, size):
            yield tokens.places, tokens.pooled(result)


@dataclass(frozen=True)
class _Tokens:
    """Where a teacher's last tokens ``(B, T, D)`` lie.

    Attributes:
        prefix: tokens in front that stand for no image region.
        grid: rows and columns of the others, row by row, for images of a size.
        part: the teacher, or the part of it that is given these images.
        order: which token of the grid is at each place, or None.
        scores: module that gives the scores ``(B, T, 1)`` of sequence pooling, or None.
    """

    prefix: int
    grid: Callable[[Grid], Grid]
    part: nn.Module
    order: Tensor | None = None
    scores: nn.Module | None = None

    def fit(self, tokens: Tensor, width: int, size: Grid) -> bool:
        """Whether a tensor has the shape of tokens of this width of an image of this size."""
        rows, columns = self.grid(size)
        return tokens.ndim == 3 and tokens.shape[1:] == (self.prefix + rows * columns, width)

    def pooled(self, tokens: Tensor) -> list[Tensor]:
        """What a classifier may be given of them: ``(B, D)`` by each kind of pooling."""
        found = [tokens[:, self.prefix :].mean(1), tokens.mean(1)]
        if self.prefix:
            found += [tokens[:, 0], tokens[:, :2].mean(1)]
        if self.scores is not None:
            weights = self.scores(tokens).softmax(1).transpose(1, 2)
            found.append((weights @ tokens).squeeze(1))
        return found

    def places(self, tokens: Tensor, size: Grid, norm: nn.Module | None) -> Tensor:
        """As a map ``(B, D, h, w)``, behind the norm that follows the pooling."""
        if not self.fit(tokens, tokens.shape[2], size):
            rows, columns = self.grid(size)
            raise UnsupportedModelError(
                f"looked for {self.prefix} + {rows} x {columns} tokens of images of "
                f"{size[0]} x {size[1]} pixels in the teacher, found {tokens.shape[1]}. {INSTEAD}"
            )
        tokens = tokens[:, self.prefix :]
        if norm is not None:
            tokens = norm(tokens.flatten(0, 1)).view_as(tokens)
        if self.order is not None:
            tokens = tokens[:, self.order.argsort()]
        return tokens.transpose(1, 2).reshape(len(tokens), -1, *self.grid(size))


def _channels_first(features: Tensor, size: Grid, norm: nn.Module | None) -> Tensor:
    return features


def _channels_last(features: Tensor, size: Grid, norm: nn.Module | None) -> Tensor:
    return features.permute(0, 3, 1, 2)


def _in_front_of_a_norm(
    calls: dict[nn.Module, _Call], given: Tensor
) -> Iterator[tuple[Tensor, nn.Module]]:
    """What norms that gave the classifier its input ``(B, D)`` were given, and these norms."""
    for module, call in calls.items():
        if "norm" in type(module).__name__.lower() and _same(call.result.flatten(1), given):
            yield call.given.flatten(1), module


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
            f"looked for a linear classifier in the teacher {type(teacher).__name__}, found none. "
            f"{INSTEAD}"
        )
    return layers


def _token_grid(teacher: Any) -> _Tokens | None:
    """Where the last tokens of a transformer lie, if that is known."""
    found = known_part(teacher)
    if found is None:
        patches: Any = getattr(teacher, "patch_embed", None)
        if not hasattr(patches, "dynamic_feat_size"):
            return None
        prefix = int(getattr(teacher, "num_prefix_tokens", 0))
        return _Tokens(prefix, patches.dynamic_feat_size, teacher)
    name, backbone = found
    # A class token that joins behind the blocks is in front of the others in the end.
    prefix = backbone.num_prefix_tokens + (backbone.pooling == "class_attention")
    grid = partial(_last_grid, backbone)
    part, order = teacher.get_submodule(name), backbone.blocks[-1].order
    return _Tokens(prefix, grid, part, order, backbone.pool_scores)


def _last_grid(backbone: Backbone, size: Grid) -> Grid:
    """Token grid behind the last block."""
    grid = backbone.block_grid(-1, backbone.grid(size))
    return backbone.reach(-1, grid).result_grid


class _Call(NamedTuple):
    """The first argument and the result of a module's last call."""

    given: Tensor
    result: Tensor


def _watched(
    network: nn.Module, modules: Iterable[nn.Module], images: Tensor
) -> tuple[dict[nn.Module, _Call], Tensor]:
    """Calls of modules in a pass, the last to end last, and the logits."""
    calls: dict[nn.Module, _Call] = {}

    def watch(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        result = output[0] if isinstance(output, tuple) else output
        given = args[0] if args else result
        if isinstance(result, Tensor) and isinstance(given, Tensor):
            calls.pop(module, None)
            calls[module] = _Call(given, result)

    handles = [module.register_forward_hook(watch) for module in modules]
    try:
        logits = logits_of(network(images))
    finally:
        for handle in handles:
            handle.remove()
    return calls, logits


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in the mode that it was in."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _same(found: Any, expected: Tensor) -> bool:
    """Whether two tensors agree, as far as the lower precision of the two tells."""
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    if found.is_meta:  # shapes without numbers
        return True
    eps = max(torch.finfo(tensor.dtype).eps for tensor in (found, expected))
    off, size = (found.float() - expected.float()).abs().amax(), expected.float().abs().amax()
    return bool(off <= max(1e-4, 4 * eps) * size)
