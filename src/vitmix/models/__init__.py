"""Models by name: the compact convolutional transformers of this package, and timm's."""

from __future__ import annotations

import difflib
from typing import Any, cast

import torch
from torch import nn

from vitmix.errors import InputError
from vitmix.models.cct import CCT, cct_names, cct_side
from vitmix.models.cct import cct as _cct
from vitmix.models.released import LoadedWeights, load_released

__all__ = [
    "CCT",
    "LoadedWeights",
    "cct_names",
    "create_model",
    "input_side",
    "load_released",
    "pretrained_facts",
]

_HUB_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")


def create_model(
    name: str, num_classes: int, img_size: int | tuple[int, int] | None = None, **kwargs: Any
) -> nn.Module:
    """Build a model by name.

    Args:
        name: A compact convolutional transformer (see `cct_names`), else any name that
            `timm.create_model` knows. timm is imported only in the second case.
        num_classes: Number of classes of the head.
        img_size: Side of the input in pixels, or `(height, width)`; by default the one that the
            model is registered for (`input_side`). timm models that take an input size get it; the
            others (convolutional networks) take any size as they are.
        **kwargs: Passed on to the model.

    Raises:
        InputError: If the name is unknown (the message lists the nearest names), if timm is
            needed and missing, or if the model's patches don't divide the image.

    Example:
        >>> from vitmix.models import create_model
        >>> model = create_model("cct_2_3x2_32", num_classes=10)
        >>> model.grid_size(32)
        (8, 8)
    """
    if name in cct_names():
        own = {} if img_size is None else {"img_size": img_size}
        return _cct(name, num_classes=num_classes, **own, **kwargs)
    try:
        import timm
    except ImportError as error:
        raise InputError(
            f"Expected one of vitmix's own models ({', '.join(cct_names())}), but got {name!r}. "
            "Other names need timm: pip install 'vitmix[timm]'."
        ) from error
    hub = name.startswith(_HUB_PREFIXES)
    if not (hub or timm.is_model(name)):
        raise InputError(_unknown_name(name, [*cct_names(), *timm.list_models()]))
    if img_size is None and not hub:  # timm reads the configuration of a hub model itself
        img_size = input_side(name)
    model = _create_timm(name, num_classes, img_size, kwargs)
    if img_size is not None:
        _check_patches(name, model, img_size)
    return model


def input_side(name: str) -> int:
    """Side in pixels of the images that a model is registered for; 224 where nothing says so.

    Args:
        name: as `create_model` takes it.

    Example:
        >>> input_side("cct_7_3x1_32")
        32
    """
    if name in cct_names():
        return cct_side(name)
    facts = pretrained_facts(name)
    return 224 if facts is None else int(facts.input_size[-1])


def pretrained_facts(name: str) -> Any:
    """What timm knows of a model's weights: classes, image size, mean, std; None if nothing.

    Args:
        name: as `create_model` takes it.
    """
    import timm

    if name.startswith(_HUB_PREFIXES):
        with torch.device("meta"):
            model: Any = timm.create_model(name)
        return timm.models.PretrainedCfg(**model.pretrained_cfg)
    return timm.get_pretrained_cfg(name) if timm.is_model(name) else None


def _create_timm(
    name: str, num_classes: int, img_size: int | tuple[int, int] | None, kwargs: dict[str, Any]
) -> nn.Module:
    import timm

    kwargs = {**kwargs, "num_classes": num_classes}
    try:
        return cast("nn.Module", timm.create_model(name, img_size=img_size, **kwargs))
    except TypeError as error:
        if "img_size" not in str(error):
            raise
    return cast("nn.Module", timm.create_model(name, **kwargs))


def _check_patches(name: str, model: nn.Module, img_size: int | tuple[int, int]) -> None:
    """A patch embedding drops the pixels beyond the last whole patch silently; refuse instead.

    Patches that overlap or are padded lose less than a step of their convolution.
    """
    patch_embed: Any = getattr(model, "patch_embed", None)
    if not hasattr(patch_embed, "patch_size") or getattr(patch_embed, "dynamic_img_pad", False):
        return
    first = next((part for part in patch_embed.modules() if isinstance(part, nn.Conv2d)), None)
    if first is None or first.kernel_size != first.stride or first.padding != (0, 0):
        return
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    patch = first.stride
    if size[0] % patch[0] or size[1] % patch[1]:
        raise InputError(
            f"Expected an image size that is a multiple of {name}'s patch size "
            f"{patch[0]}x{patch[1]}, but got {size[0]}x{size[1]}. "
            "Choose another image size or a model with other patches."
        )


def _unknown_name(name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(map(repr, nearest))}?" if nearest else "Nothing is near it."
    return (
        f"Expected the name of a model of vitmix (cct_...) or of timm, but got {name!r}. {hint} "
        "`timm.list_models()` lists timm's names."
    )
