"""Image classifiers of transformers that attend globally.

ViT, ViT-MSN, DeiT (with and without a distillation head), BEiT, Data2Vec-Vision, DINOv2 (with and
without registers), I-JEPA, CLIP, MetaCLIP 2 and SigLIP, with ``attn_implementation`` ``"sdpa"`` or
``"eager"``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

from torch import nn

from vitmix.backbones.base import GIVEN, Backbone, Block, Pooling, Reason, is_made_by
from vitmix.backbones.grids import whole_patches
from vitmix.errors import UnsupportedModelError

__all__ = ["LOOKS_FOR", "describe", "known_version", "recomputation", "unreadable"]

_ATTENTION = ("sdpa", "eager")
# Where layers are, by model and by version of transformers.
_LAYERS = ("layers", "encoder.layer", "encoder.layers")

_SHARED = "use_shared_relative_position_bias"


@dataclass(frozen=True)
class _Layout:
    """Where a classifier keeps its layers, and what it makes of their last tokens.

    Attributes:
        module: module of transformers that defines the class.
        trunk: attribute of the model in front of the classifier.
        norm: the layer's norm in front of the attention.
        attention: the layer's attention.
        prefix: tokens in front of the image tokens, registers aside.
        pooling: kind of pooling, or None if the configuration's ``use_mean_pooling`` decides.
    """

    module: str
    trunk: str
    norm: str = "layernorm_before"
    attention: str = "attention"
    prefix: int = 1
    pooling: Pooling | None = "class_token"


_CLIP = ("layer_norm1", "self_attn")
_LAYOUTS = {
    "ViTForImageClassification": _Layout("vit.modeling_vit", "vit"),
    "ViTMSNForImageClassification": _Layout("vit_msn.modeling_vit_msn", "vit"),
    "DeiTForImageClassification": _Layout("deit.modeling_deit", "deit", prefix=2),
    "DeiTForImageClassificationWithTeacher": _Layout(
        "deit.modeling_deit", "deit", prefix=2, pooling="distilled"
    ),
    "BeitForImageClassification": _Layout("beit.modeling_beit", "beit", pooling=None),
    "Data2VecVisionForImageClassification": _Layout(
        "data2vec.modeling_data2vec_vision", "data2vec_vision", pooling=None
    ),
    "Dinov2ForImageClassification": _Layout(
        "dinov2.modeling_dinov2", "dinov2", "norm1", pooling="class_and_average"
    ),
    "Dinov2WithRegistersForImageClassification": _Layout(
        "dinov2_with_registers.modeling_dinov2_with_registers",
        "dinov2_with_registers",
        "norm1",
        pooling="class_and_average",
    ),
    "IJepaForImageClassification": _Layout(
        "ijepa.modeling_ijepa", "ijepa", prefix=0, pooling="average"
    ),
    "CLIPForImageClassification": _Layout(
        "clip.modeling_clip", "vision_model", *_CLIP, pooling="average"
    ),
    "MetaClip2ForImageClassification": _Layout(
        "metaclip_2.modeling_metaclip_2", "vision_model", *_CLIP, pooling="average"
    ),
    "SiglipForImageClassification": _Layout(
        "siglip.modeling_siglip", "vision_model", *_CLIP, prefix=0, pooling="average"
    ),
}

LOOKS_FOR = f"transformers {', '.join(_LAYOUTS)}"


def describe(model: nn.Module) -> Backbone | None:
    """Describe an image classifier of transformers; None if the model is something else."""
    for name, layout in _LAYOUTS.items():
        if is_made_by(model, f"transformers.models.{layout.module}", name):
            return _describe(name, layout, model)
    return None


def _describe(name: str, layout: _Layout, model: Any) -> Backbone:
    config = getattr(model.config, "vision_config", model.config)
    pooling = layout.pooling
    if pooling is None:
        pooling = "average" if config.use_mean_pooling else "class_token"
    patch = config.patch_size
    patch = (patch, patch) if isinstance(patch, int) else tuple(patch)
    return Backbone(
        family=f"transformers {name}",
        blocks=tuple(
            Block(
                module=layer,
                entry=getattr(layer, layout.norm),
                attention=getattr(layer, layout.attention),
            )
            for layer in _layers(name, layout, getattr(model, layout.trunk))
        ),
        embed_dim=int(config.hidden_size),
        num_prefix_tokens=layout.prefix + int(getattr(config, "num_register_tokens", 0)),
        class_token=layout.prefix > 0,
        pooling=pooling,
        grid=partial(whole_patches, patch),
        patch=patch,
        recomputes=recomputation(model),
        vertical_reason=_position(config),
        attention_reason=unreadable(config),
        rollout_reason=GIVEN if getattr(config, _SHARED, False) else None,
    )


def _layers(name: str, layout: _Layout, trunk: nn.Module) -> Sequence[Any]:
    for path in _LAYERS:
        try:
            layers: Sequence[Any] = attrgetter(path)(trunk)
        except AttributeError:
            continue
        parts = (layout.norm, layout.attention)
        if all(hasattr(layer, part) for layer in layers for part in parts):
            return layers
    raise UnsupportedModelError(
        f"looked for {' or '.join(_LAYERS)} with {layout.norm} and {layout.attention} in "
        f"{layout.trunk} of {name}, found {[child for child, _ in trunk.named_children()]}; this "
        "version of transformers is not known. The model was not changed."
    )


@contextmanager
def known_version(name: str) -> Iterator[None]:
    """Describe a model inside the context as this version of transformers makes it.

    Raises:
        UnsupportedModelError: a part lies elsewhere.
    """
    try:
        yield
    except AttributeError as error:
        raise UnsupportedModelError(
            f"looked for the parts of {name} where transformers 5.23 has them, found that {error}; "
            "this version of transformers is not known. The model was not changed."
        ) from error


def unreadable(config: Any) -> Reason:
    """Why attention does not pass where it can be read, or None if it does."""
    implementation = getattr(config, "_attn_implementation", "eager")
    if implementation in _ATTENTION:
        return None
    return (
        f"attn_implementation {implementation!r} instead of 'sdpa' or 'eager'; call "
        "model.set_attn_implementation('sdpa')"
    )


def recomputation(model: Any) -> Callable[[], bool]:
    """Asks a model whether gradient checkpointing is on; its name changed in transformers 5."""
    new = "is_activation_checkpointing"
    name = new if hasattr(type(model), new) else "is_gradient_checkpointing"
    return partial(getattr, model, name, False)


def _position(config: Any) -> Reason:
    for option in ("use_relative_position_bias", _SHARED):
        if getattr(config, option, False):
            return (
                f"relative position bias ({option}=True): a token that is put behind the others "
                "has no place in the image to take a bias for"
            )
    return None
