"""A step never waits for the device, but for the assignment.

On the meta device tensors have no values: whatever asks for one (``item``, ``nonzero``, a copy to
the host) fails there. The assignment is one operator, and knows what shape comes out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vitmix
from models import NUM_CLASSES, SIZE, make_cct, make_vit
from staged_models import make_swin

MODELS = {
    "cct": make_cct,
    "vit": make_vit,
    "swin": lambda: make_swin("swin_tiny_patch4_window7_224", SIZE),
}


class Calls(TorchDispatchMode):
    """Counts operators, and copies from the host that wait until they are done."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.waiting: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.count[str(func.overloadpacket)] += 1
        taken = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = {t.device.type for t in tree_leaves(result) if isinstance(t, Tensor)}
        if taken == {"cpu"} and made == {"meta"} and not kwargs.get("non_blocking"):
            self.waiting.append(str(func))
        return result


def horizontal(**options: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"tokens": [vitmix.HorizontalTokenMixup(block=1, **options)]}


def everything() -> dict[str, Any]:
    stages = [vitmix.HorizontalTokenMixup(block=1), vitmix.ManifoldMixup(block=1)]
    return {"mix": vitmix.TokenMix(), "labels": vitmix.TokenAlignedLabels(), "tokens": stages}


def taught() -> dict[str, Any]:
    return {"mix": vitmix.TokenMix(), "labels": vitmix.TeacherLabels(make_vit().to("meta"))}


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "mixup": lambda: {"mix": vitmix.Mixup()},
    "cutmix": lambda: {"mix": vitmix.CutMix(draw="element")},
    "transmix": lambda: {"mix": vitmix.CutMix(), "labels": vitmix.AttentionLabels()},
    "teacher": taught,
    "horizontal": horizontal(),
    "horizontal auto": horizontal(tau="auto:0.5", rho="auto:0.3"),
    "horizontal grouped": horizontal(assignment="grouped:4"),
    "horizontal gradient": horizontal(saliency="gradient"),
    "horizontal random": horizontal(saliency="random", assignment="random", relabel="area"),
    "vertical": lambda: {"tokens": [vitmix.VerticalTokenMixup(block=1)]},
    "everything": everything,
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", MODELS)
def test_a_step_waits_for_nothing_but_the_assignment(family: str, case: str) -> None:
    if (family, case) == ("swin", "vertical"):
        pytest.skip("no vertical mixing within windows")
    mixing = vitmix.MixingModel(MODELS[family](), num_classes=NUM_CLASSES, **CASES[case]())
    mixing.to("meta").train()
    images = torch.randn(8, 3, SIZE, SIZE, device="meta")
    targets = torch.randint(NUM_CLASSES, (8,), device="meta")
    with Calls() as calls:
        mixing(images, targets).loss().backward()
    paired = case == "everything" or (case.startswith("horizontal") and "random" not in case)
    assert calls.count["vitmix.optimal_partners"] == paired
    assert not calls.waiting


def test_what_waits_is_seen() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ones(2, device="meta").sum().item()
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ones(2, device="meta").cpu()
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ones(2, device="meta").nonzero()
    with Calls() as calls:
        torch.arange(3).to("meta", non_blocking=True)
        assert not calls.waiting
        torch.arange(3).to("meta")
    assert calls.waiting
