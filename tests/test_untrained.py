"""A ScoreNet that is left out of the optimiser is noticed, and nothing else is."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

import vitmix
from models import NUM_CLASSES, batch, make_cct

Parameters = Callable[[vitmix.MixingModel], Iterable[torch.nn.Parameter]]
PASSES = 6


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitmix.untrained.PASSES", PASSES)


def of_the_model(mixing: vitmix.MixingModel) -> Iterable[torch.nn.Parameter]:
    return mixing.model.parameters()


def of_all(mixing: vitmix.MixingModel) -> Iterable[torch.nn.Parameter]:
    return mixing.parameters()


def make(**options: Any) -> vitmix.MixingModel:
    torch.manual_seed(0)
    stages = [vitmix.HorizontalTokenMixup(**{"block": 1, **options})]
    return vitmix.MixingModel(make_cct(), tokens=stages, num_classes=NUM_CLASSES).train()


def train(
    mixing: vitmix.MixingModel,
    parameters: Parameters,
    *,
    passes: int = 2 * PASSES + 2,
    accumulate: int = 1,
    optimiser: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    **options: Any,
) -> list[str]:
    """Warnings of a training of some passes."""
    made = optimiser(parameters(mixing), lr=1e-3, **options)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for step in range(1, passes + 1):
            mixing(*batch(2)).loss().backward()
            if step % accumulate == 0:
                made.step()
                made.zero_grad()
    return [str(each.message) for each in found if each.category is UserWarning]


@pytest.mark.parametrize("fused", [False, True])
def test_left_out(fused: bool) -> None:
    (message,) = train(make(), of_the_model, fused=fused)
    assert "HorizontalTokenMixup(block=1)" in message
    assert f"{PASSES} training passes" in message
    assert "mixing.parameters()" in message


def test_not_before_enough_passes() -> None:
    assert not train(make(), of_the_model, passes=PASSES)


def test_left_out_while_gradients_are_accumulated() -> None:
    assert train(make(), of_the_model, accumulate=8)


class Old(torch.optim.SGD):
    """Changes ``parameter.data``, which has a version of its own."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(parameter.grad, alpha=group["lr"])


@pytest.mark.parametrize(
    "options",
    [{}, {"fused": True}, {"foreach": True}, {"accumulate": 8}, {"optimiser": Old}],
    ids=str,
)
def test_trained(options: dict[str, Any]) -> None:
    assert not train(make(), of_all, **options)


def test_trained_without_a_new_version() -> None:
    """Versions say that the model has changed and ScoreNet has not; values know better."""
    mixing = make()

    def change(*_: object) -> None:
        mixing.tokens[0].scorenet.fc.bias.data.add_(0.1)

    mixing.register_forward_hook(change)
    assert not train(mixing, of_the_model)


def test_frozen() -> None:
    mixing = make()
    mixing.tokens.requires_grad_(False)
    assert not train(mixing, of_the_model)


def test_frozen_later() -> None:
    mixing = make()
    train(mixing, of_the_model, passes=2)
    mixing.tokens.requires_grad_(False)
    assert not train(mixing, of_the_model)


def test_not_asked_which_samples_are_easy() -> None:
    assert not train(make(tau=math.inf), of_the_model)


def test_a_model_that_is_not_trained() -> None:
    mixing = make()
    mixing.model.requires_grad_(False)
    assert not train(mixing, lambda mixing: [torch.nn.Parameter(torch.ones(1))])


def test_passes_without_gradients_do_not_count() -> None:
    mixing = make()
    with torch.no_grad():
        for _ in range(2 * PASSES):
            mixing(*batch(2))
    assert not train(mixing, of_the_model, passes=PASSES)
