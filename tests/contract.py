"""The contract of ``MixingModel``: families, methods, who refuses what; and cells of a table of it.

A family joins by an entry in ``models.FAMILIES``, ``more_models.MORE_FAMILIES`` or
``staged_models.STAGED``; what it refuses goes into ``REFUSED``. All contract tests then run on it;
``make contract`` writes their outcomes to `docs/contract.md`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import vitmix
from models import FAMILIES, NUM_CLASSES, SIZE, batch, make_cct
from more_models import BACKBONES, MORE_FAMILIES, POSITION_BIASED
from staged_models import STAGED, images_for

EVERY_FAMILY: dict[str, Callable[[], nn.Module]] = {
    **FAMILIES,
    **MORE_FAMILIES,
    **{name: staged.make for name, staged in STAGED.items()},
}


class Blocks(NamedTuple):
    """Where token stages act."""

    horizontal: int = 1
    vertical: int = 2
    manifold: int = 3


PLAIN = Blocks()


def blocks_of(family: str) -> Blocks:
    if family not in STAGED:
        return PLAIN
    staged = STAGED[family]
    return Blocks(staged.block, staged.vertical or 1, staged.block)


def images_of(family: str, size: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of the size that a family takes, and their classes."""
    return images_for(family, size, seed) if family in STAGED else batch(size, seed)


def side_of(family: str) -> int:
    return STAGED[family].side if family in STAGED else SIZE


def horizontal(**options: Any) -> vitmix.HorizontalTokenMixup:
    return vitmix.HorizontalTokenMixup(**{"block": 1, "tau": math.inf, "rho": 1e-4, **options})


def teacher() -> nn.Module:
    """The same one each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make_cct()


def vertical(block: int) -> vitmix.VerticalTokenMixup:
    return vitmix.VerticalTokenMixup(block=block, kappa=3)


def all_but_vertical(at: Blocks = PLAIN) -> dict[str, Any]:
    return {
        "mix": vitmix.OneOf([vitmix.Mixup(), vitmix.TokenMix()], draw="element"),
        "labels": vitmix.TokenAlignedLabels(),
        "tokens": [horizontal(block=at.horizontal), vitmix.ManifoldMixup(block=at.manifold)],
    }


def everything(at: Blocks = PLAIN) -> dict[str, Any]:
    parts = all_but_vertical(at)
    return {**parts, "tokens": [*parts["tokens"], vertical(at.vertical)]}


def only_horizontal(**options: Any) -> Callable[..., dict[str, Any]]:
    return lambda at=PLAIN: {"tokens": [horizontal(block=at.horizontal, **options)]}


METHODS: dict[str, Callable[..., dict[str, Any]]] = {
    "none": lambda at=None: {},
    "mixup": lambda at=None: {"mix": vitmix.Mixup(0.8)},
    "cutmix": lambda at=None: {"mix": vitmix.CutMix()},
    "tokenmix": lambda at=None: {"mix": vitmix.TokenMix()},
    "tokenmix-teacher": lambda at=None: {
        "mix": vitmix.TokenMix(),
        "labels": vitmix.TeacherLabels(teacher()),
    },
    "transmix": lambda at=None: {"mix": vitmix.CutMix(), "labels": vitmix.AttentionLabels()},
    "tl-align": lambda at=None: {"mix": vitmix.CutMix(), "labels": vitmix.TokenAlignedLabels()},
    "manifold": lambda at=None: {
        "tokens": [vitmix.ManifoldMixup(**({} if at in (None, PLAIN) else {"block": at.manifold}))]
    },
    "horizontal": only_horizontal(),
    "horizontal-shares": only_horizontal(tau="auto:0.6", rho="auto:0.3"),
    "horizontal-rollout": lambda at=PLAIN: {
        "tokens": [horizontal(block=at.horizontal - 1, saliency="rollout")]
    },
    "horizontal-gradient": only_horizontal(saliency="gradient"),
    "vertical": lambda at=PLAIN: {"tokens": [vertical(at.vertical)]},
    "everything": everything,
    "all-but-vertical": all_but_vertical,
}
# Columns of the table of methods. Those left out act in front of a model or behind it, as CutMix.
OUTSIDE = ("none", "mixup", "tokenmix", "tokenmix-teacher")
VARIANTS = ("horizontal-shares", "all-but-vertical")
COLUMNS = [method for method in METHODS if method not in (*OUTSIDE, *VARIANTS)]

# Attention within windows, or with fewer keys than tokens.
WINDOWED = [name for name, staged in STAGED.items() if staged.vertical is None]

# Of those, the ones where whole attention lies in the blocks that a rollout is asked for.
ROLLED_OUT = ("csatv2", "efficientformer", "fastvit", "iformer", "volo")

# Families, the methods that they refuse, and what the refusal says.
REFUSED: list[tuple[Iterable[str], Iterable[str], str]] = [
    (POSITION_BIASED, ("vertical", "everything"), "found (rotary|relative) position"),
    (WINDOWED, ("vertical", "everything"), "The model was not changed"),
    (
        (
            *(family for family in WINDOWED if family not in ROLLED_OUT),
            *("vit-pytorch", "vit-pytorch-mean", "vit-pytorch-simple"),
        ),
        ("horizontal-rollout",),
        "for a rollout",
    ),
    (("parallel-attentions",), ("horizontal-rollout",), "for one attention"),
    (
        (
            *("naflex-rope", "eva-rope", "eva-mixed-rope", "eva-grouped", "eva-post-norm"),
            *("relpos-shared", "deepseek", "gemma4", "qwen3", "qwen3-merged", "hf-beit-eager"),
        ),
        ("horizontal-rollout",),
        "further tensors",
    ),
]


def refusal(family: str, method: str) -> str | None:
    """What a family's refusal of a method says; None if it takes the method."""
    for families, methods, words in REFUSED:
        if family in families and method in methods:
            return words
    return None


def strongest(family: str) -> str:
    """The method with the most stages that a family takes."""
    order = ("everything", "all-but-vertical", "tl-align", "cutmix")
    return next(method for method in order if refusal(family, method) is None)


def wrap(
    family: str, seed: int = 0, model: nn.Module | None = None, **options: Any
) -> vitmix.MixingModel:
    """A mixing model of a family, with its own generator."""
    torch.manual_seed(seed)
    model = EVERY_FAMILY[family]() if model is None else model
    if family in BACKBONES:
        options["backbone"] = BACKBONES[family](model)
    return vitmix.MixingModel(
        model,
        num_classes=NUM_CLASSES,
        label_smoothing=0.1,
        generator=torch.Generator().manual_seed(seed),
        **options,
    )


def make(family: str, method: str, seed: int = 0) -> vitmix.MixingModel:
    """A family with a method."""
    return wrap(family, seed, **METHODS[method](blocks_of(family)))


def hooks(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


# --- the table

TABLES: dict[str, list[str]] = {"Methods": COLUMNS, "Training machinery": []}
Cases = Iterable[tuple[str, str]]
BROADLY: list[tuple[str, str]] = [(family, strongest(family)) for family in EVERY_FAMILY]
IN_DEPTH: list[tuple[str, str]] = [
    *(("cct", method) for method in (*OUTSIDE, "horizontal-shares")),
    *(
        (family, method)
        for family in ("cct", "vit")
        for method in COLUMNS
        if method != "everything"
    ),
]


def contract(
    column: str,
    cases: Cases = BROADLY,
    *,
    known: Mapping[tuple[str, str], str] | None = None,
) -> Any:
    """Run a test on families with methods, and enter the outcomes into a column of the machinery.

    Args:
        column: its heading.
        cases: family and method; by default each family with its strongest method.
        known: reason why a case fails, for those that do; a case that no longer fails is an error.
    """
    TABLES["Training machinery"].append(column)
    return pytest.mark.parametrize(
        ("family", "method"),
        [
            cell("Training machinery", column, *case, reason=(known or {}).get(case))
            for case in cases
        ],
    )


def cell(table: str, column: str, family: str, method: str, reason: str | None = None) -> Any:
    """A case whose outcome goes into a cell."""
    marks = [pytest.mark.contract(table=table, row=family, column=column)]
    if reason is not None:
        marks.append(pytest.mark.xfail(reason=reason, strict=True))
    return pytest.param(family, method, id=f"{family}-{method}", marks=marks)
