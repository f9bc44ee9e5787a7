"""Checkpoints of the released codes, into models of this package and of timm.

Compact Transformers (SHI-Labs) and TokenMixup's CCT use the names of :class:`vitmix.models.CCT`;
TokenMixup's ViT has names of its own. TokenMixup keeps ScoreNet inside the block in front of which
it mixes. Query, key and value, one matrix here, are three in its ViT, and in its CCT at the block
of vertical mixing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitmix.backbones.base import is_made_by
from vitmix.errors import InputError, UnsupportedModelError
from vitmix.mixing import MixingModel
from vitmix.models.cct import CCT
from vitmix.tokens import HorizontalTokenMixup
from vitmix.weights import listed, read_weights

__all__ = ["LoadedWeights", "fitted_positions", "load_released"]

_State = dict[str, Tensor]
_THIRD = re.compile(r"(.+\.)(query|key|value)(\.weight|\.bias)")


@dataclass(frozen=True)
class LoadedWeights:
    """What went where.

    Attributes:
        names: name in the model given, by name in the checkpoint; query, key and value that became
            one matrix share a name.
        left_out: names in the checkpoint that went nowhere: ScoreNet's, for a model that has none.
        untouched: names in the model given that the checkpoint has nothing for: ScoreNet's.
        part: the entry of the checkpoint that was read, such as ``"state_dict_ema"``; empty if its
            weights were not wrapped.
    """

    names: dict[str, str]
    left_out: tuple[str, ...]
    untouched: tuple[str, ...]
    part: str


@dataclass(frozen=True)
class _Layout:
    """How a released model names its weights.

    Attributes:
        rename: name here by released name.
        scorenet: matches a ScoreNet weight: its block, and its name in ``ScoreNet`` without
            ``scorenet_prefix``.
        scorenet_prefix: see there.
        classifier: module of the model that gives logits.
        positions: name of the position embedding here.
        resize: position embedding for this model from one for images of another size.
    """

    rename: Callable[[str], str]
    scorenet: re.Pattern[str]
    scorenet_prefix: str
    classifier: str
    positions: str
    resize: Callable[[Any, Tensor], Tensor]


def load_released(
    model: nn.Module,
    source: str | Path | Mapping[str, Any],
    *,
    ema: bool = True,
    resize_positions: bool = False,
) -> LoadedWeights:
    """Load a checkpoint of Compact Transformers or TokenMixup.

    Args:
        model: a :class:`vitmix.models.CCT` or a ``VisionTransformer`` of timm, or a
            :class:`vitmix.MixingModel` around one, whose ``HorizontalTokenMixup`` then takes
            ScoreNet's weights too. Weights by the model's own names are taken as well.
        source: a file (``.safetensors`` or of ``torch.save``), or what it holds; see
            :func:`vitmix.weights.read_weights`.
        ema: prefer averaged weights where there are any, as timm does.
        resize_positions: fit the position embedding of another image size by interpolation, as the
            released code does (bilinear for CCT; timm's bicubic for ViT). Grids are taken to be
            square there.

    Returns:
        What went where. Nothing is left out or untouched but ScoreNet.

    Raises:
        UnsupportedModelError: another kind of model.
        InputError: weights that are missing, unknown or of another shape, classes included; nothing
            was changed then.

    Example:
        >>> from vitmix.models import create_model
        >>> model = create_model("cct_2_3x2_32", num_classes=10)
        >>> released = {f"module.{name}": value for name, value in model.state_dict().items()}
        >>> loaded = load_released(model, {"state_dict": released, "epoch": 300})
        >>> loaded.part, loaded.left_out
        ('state_dict', ())
    """
    network = model.model if isinstance(model, MixingModel) else model
    layout = _layout_of(network)
    weights = read_weights(source, ema=ema)
    inside = "model." if isinstance(model, MixingModel) else ""

    states: dict[str, _State] = {inside: {}}
    names: dict[str, str] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    scorenets: dict[int, dict[str, str]] = {}  # by block: released name by name in ScoreNet
    for released, value in weights.state.items():
        score = layout.scorenet.fullmatch(released)
        if score:
            name = layout.scorenet_prefix + score[2]
            scorenets.setdefault(int(score[1]), {})[name] = released
            continue
        here = layout.rename(released)
        third = _THIRD.fullmatch(here)
        if third:
            here = f"{third[1]}qkv{third[3]}"
            thirds.setdefault(here, {})[third[2]] = value
        else:
            states[inside][here] = value
        names[released] = inside + here
    for here, parts in thirds.items():
        states[inside][here] = _joined(here, parts)

    if resize_positions and layout.positions in states[inside]:
        states[inside][layout.positions] = layout.resize(network, states[inside][layout.positions])

    homes = _homes(model, scorenets)
    for block, prefix in homes.items():
        states[prefix] = {name: weights.state[old] for name, old in scorenets[block].items()}
        names |= {old: prefix + name for name, old in scorenets[block].items()}
    targets = {prefix: model.get_submodule(prefix.rstrip(".")) for prefix in states}
    origins = {here: released for released, here in names.items()}
    for prefix, state in states.items():
        _require_fit(prefix, targets[prefix], state, layout, origins)
    for prefix, state in states.items():
        targets[prefix].load_state_dict(state)

    reached = {prefix + name for prefix, state in states.items() for name in state}
    return LoadedWeights(
        names,
        left_out=tuple(name for name in weights.state if name not in names),
        untouched=tuple(name for name in model.state_dict() if name not in reached),
        part=weights.part,
    )


def _layout_of(network: nn.Module) -> _Layout:
    if isinstance(network, CCT):
        return _CCT
    if is_made_by(network, "timm.models.vision_transformer", "VisionTransformer"):
        return _VIT
    raise UnsupportedModelError(
        "looked for a vitmix.models.CCT or timm's VisionTransformer to load a released checkpoint "
        f"into, found {type(network).__name__}. The model was not changed."
    )


def _joined(here: str, parts: dict[str, Tensor]) -> Tensor:
    absent = [part for part in ("query", "key", "value") if part not in parts]
    if absent:
        raise InputError(f"expected query, key and value for {here}, got no {', '.join(absent)}")
    return torch.cat([parts["query"], parts["key"], parts["value"]])


def _homes(model: nn.Module, scorenets: dict[int, dict[str, str]]) -> dict[int, str]:
    """Where the ScoreNet of each block goes: nowhere without horizontal mixing."""
    if not isinstance(model, MixingModel):
        return {}
    depth = model.backbone.depth
    homes = {
        stage.block % depth: f"tokens.{index}.scorenet."
        for index, stage in enumerate(model.tokens)
        if isinstance(stage, HorizontalTokenMixup)
    }
    for block in scorenets:
        if homes and block not in homes:
            raise InputError(
                f"expected HorizontalTokenMixup(block={block}), for which the checkpoint has a "
                f"ScoreNet, got block {', '.join(map(str, homes))}; to do without that ScoreNet, "
                "load into the model before it is wrapped"
            )
    return {block: homes[block] for block in scorenets if block in homes}


def _require_fit(
    prefix: str, module: nn.Module, state: _State, layout: _Layout, origins: dict[str, str]
) -> None:
    expected = module.state_dict()
    missing = sorted(prefix + name for name in expected.keys() - state.keys())
    unknown = sorted(origins[prefix + name] for name in state.keys() - expected.keys())
    if missing or unknown:
        faults = [f"without {listed(missing)}"] * bool(missing)
        faults += [f"with unknown {listed(unknown)}"] * bool(unknown)
        raise InputError(
            f"expected the weights of this {type(module).__name__}, got a checkpoint "
            f"{' and '.join(faults)}; build the model that it was made from. Nothing was loaded."
        )
    differing = {
        name: f"{prefix}{name} {tuple(value.shape)} for {tuple(expected[name].shape)}"
        for name, value in state.items()
        if value.shape != expected[name].shape
    }
    if not differing:
        return
    advice = "build the model that it was made from"
    if differing.keys() <= {f"{layout.classifier}.weight", f"{layout.classifier}.bias"}:
        advice = f"build the model with num_classes={len(state[next(iter(differing))])}"
    elif differing.keys() == {layout.positions}:
        advice = "build the model with that image size, or pass resize_positions=True"
    found = listed(list(differing.values()))
    raise InputError(
        f"expected weights of the model's shapes, got {found}; {advice}. Nothing was loaded."
    )


def _square_grid(tokens: int) -> tuple[int, int]:
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise InputError(
            f"expected positions of a square grid to resize, got {tokens}; build the model with "
            "the image size of the checkpoint"
        )
    return side, side


def fitted_positions(model: CCT, positions: Tensor) -> Tensor:
    """A CCT's position embedding ``(1, N, D)`` from one for square images of another size.

    Raises:
        InputError: positions of another grid than a square one.
    """
    own = model.classifier.positional_emb
    if own is not None and not own.requires_grad:
        return own.detach()  # sines are known for every size
    old, new = _square_grid(positions.shape[1]), model.grid_size(model.img_size)
    if old == new:
        return positions
    image = positions.float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=new, mode="bilinear")
    return image.flatten(2).transpose(1, 2).to(positions.dtype)


def _resize_vit(model: Any, positions: Tensor) -> Tensor:
    from timm.layers import resample_abs_pos_embed

    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    old = _square_grid(positions.shape[1] - prefix)
    resized: Tensor = resample_abs_pos_embed(
        positions, list(model.patch_embed.grid_size), list(old), num_prefix_tokens=prefix
    )
    return resized


_VIT_NAMES = {
    "transformer.embeddings.position_embeddings": "pos_embed",
    "transformer.embeddings.cls_token": "cls_token",
    "transformer.embeddings.patch_embeddings": "patch_embed.proj",
    "transformer.encoder.encoder_norm": "norm",
    "transformer.encoder.layer": "blocks",
    "attention_norm": "norm1",
    "ffn_norm": "norm2",
    "ffn": "mlp",
    "attn.out": "attn.proj",
}


def _vit_name(released: str) -> str:
    if released.startswith("transformer."):
        for old, new in _VIT_NAMES.items():
            released = released.replace(old, new)
    return released


_CCT = _Layout(
    rename=str,
    scorenet=re.compile(r"classifier\.blocks\.(\d+)\.small_h_(.+)"),
    scorenet_prefix="",
    classifier="classifier.fc",
    positions="classifier.positional_emb",
    resize=fitted_positions,
)
_VIT = _Layout(
    rename=_vit_name,
    scorenet=re.compile(r"transformer\.encoder\.layer\.(\d+)\.scorenet\.(.+)"),
    scorenet_prefix="fc.",
    classifier="head",
    positions="pos_embed",
    resize=_resize_vit,
)
