"""What mixing leaves alone in all plain families. See also `test_contract`."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vitmix
from contract import hooks, make
from models import batch
from more_models import MORE_FAMILIES, logits_of, unsettle

pytest.importorskip("timm")
pytest.importorskip("transformers")
pytest.importorskip("torchvision")


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_following_shares_changes_nothing_else(family: str) -> None:
    """Logits and gradients are those of the plain model on the mixed images."""
    mixing = make(family, "tl-align")
    unsettle(mixing.model)
    plain = copy.deepcopy(mixing.model).train()
    torch.manual_seed(1)  # stochastic depth
    out = mixing.train()(*batch())
    torch.manual_seed(1)
    logits = logits_of(plain(out.trace.images))
    torch.testing.assert_close(out.logits, logits, atol=1e-4, rtol=1e-4)
    out.loss().backward()
    vitmix.functional.soft_cross_entropy(logits, out.targets).backward()
    for (name, found), expected in zip(
        mixing.model.named_parameters(), plain.parameters(), strict=True
    ):
        torch.testing.assert_close(found.grad, expected.grad, atol=1e-3, rtol=1e-3, msg=name)


class Kernels(TorchDispatchMode):
    """Counts fused attention, softmaxes that would stand for it in pieces, and (T, T) products."""

    def __init__(self, tokens: int = 0) -> None:
        super().__init__()
        self.counts = Counter[str]()
        self._tokens = tokens

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for kernel in ("scaled_dot_product", "_softmax"):
            self.counts[kernel] += kernel in str(func)
        result = func(*args, **(kwargs or {}))
        if "bmm" in str(func) and result.shape[-2:] == (self._tokens, self._tokens):
            self.counts["square"] += 1
        return result


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_fused_attention_stays_on(family: str) -> None:
    """Following shares calls the kernels that the model alone calls, and makes no matrix more."""
    mixing = make(family, "tl-align").train()
    images, targets = batch()
    rows, columns = mixing.backbone.grid((images.shape[2], images.shape[3]))
    tokens = mixing.backbone.num_prefix_tokens + rows * columns
    with Kernels(tokens) as plain:
        mixing.model(images)
    with Kernels(tokens) as mixed:
        mixing(images, targets)
    assert sum(plain.counts.values()) >= mixing.backbone.depth
    # Reads its one row of attention, or makes weights of the scores.
    pools = mixing.backbone.pooling in ("attention", "attention_all", "sequence")
    more = mixed.counts.pop("_softmax", 0) - plain.counts.pop("_softmax", 0)
    assert 0 <= more <= pools
    assert mixed.counts.pop("square", 0) <= plain.counts.pop("square", 0)
    assert mixed.counts == plain.counts


def test_reentrant_checkpointing_is_refused() -> None:
    mixing = make("hf-vit", "vertical").train()
    model: Any = mixing.model
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(vitmix.UnsupportedModelError, match="use_reentrant=False"):
        mixing(*batch())
    assert hooks(model) == 0
