"""Two processes that pair across each other are one process with the whole batch."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import vitmix
from models import FAMILIES, NUM_CLASSES, batch
from vitmix.errors import InputError
from vitmix.processes import alone

pytest.importorskip("timm")
HALF, SEED = 4, 1


class Neighbours(vitmix.CutMix):
    """Each image is blended with its neighbour's: the same plan for a batch and for its halves."""

    def plan(self, batch_size: int, size: Any, **options: Any) -> Any:
        partner = torch.arange(batch_size) ^ 1
        return vitmix.PixelPlan(partner, torch.tensor([[[0.6], [0.9]]]), binary=False)


def horizontal(**options: Any) -> vitmix.HorizontalTokenMixup:
    settings = {"block": 1, "tau": 3.0, "rho": 0.0, "gather": True, "stop_gradient": False}
    return vitmix.HorizontalTokenMixup(**(settings | options))  # type: ignore[arg-type]


METHODS: dict[str, Callable[[], dict[str, Any]]] = {
    "alone": lambda: {"tokens": [horizontal()]},
    "shares": lambda: {"tokens": [horizontal(tau="auto:0.6", rho="auto:0.3")]},
    "class labels": lambda: {"mix": Neighbours(), "tokens": [horizontal(relabel="area")]},
    "aligned": lambda: {
        "mix": Neighbours(),
        "labels": vitmix.TokenAlignedLabels(),
        "tokens": [horizontal(), vitmix.VerticalTokenMixup(block=3)],
    },
    "twice": lambda: {
        "labels": vitmix.TokenAlignedLabels(),
        "tokens": [horizontal(saliency="rollout"), horizontal(block=2, tau=2.5)],
    },
}
RUNS = [(family, method) for family in ("cct", "vit") for method in METHODS]


def build(family: str, method: str) -> vitmix.MixingModel:
    torch.manual_seed(0)
    return vitmix.MixingModel(
        FAMILIES[family](), num_classes=NUM_CLASSES, **METHODS[method]()
    ).train()


def checkpointed(mixing: vitmix.MixingModel) -> vitmix.MixingModel:
    mixing.model.set_grad_checkpointing()  # type: ignore[operator]
    return mixing


def measure(mixing: Any, images: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    for _ in range(2):  # a second step meets thresholds that have moved
        mixing.zero_grad()
        out = mixing(images, labels)
        out.loss().backward()
    inner = getattr(mixing, "module", mixing)
    return {
        "logits": out.logits.detach(),
        "targets": out.targets,
        "stats": {key: value.detach() for key, value in out.stats.items()},
        "gradients": {name: p.grad.clone() for name, p in inner.named_parameters()},
    }


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    images, labels = batch(2 * HALF, SEED)
    mine = images[rank * HALF :][:HALF], labels[rank * HALF :][:HALF]
    found: dict[str, Any] = {}
    for family, method in RUNS:
        found[f"{family}/{method}"] = measure(DistributedDataParallel(build(family, method)), *mine)
    found["vit/checkpointed"] = measure(
        DistributedDataParallel(checkpointed(build("vit", "aligned"))), *mine
    )
    with alone():
        found["own"] = build("cct", "alone")(*mine).targets
    try:
        build("cct", "alone")(images[: HALF + rank], labels[: HALF + rank])
    except InputError as error:
        found["refusal"] = str(error)
    torch.save(found, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("gather")
    mp.spawn(work, args=(str(folder),), nprocs=2)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize(("family", "method"), [*RUNS, ("vit", "checkpointed")])
def test_two_halves_are_one_batch(found: list[dict[str, Any]], family: str, method: str) -> None:
    expected = measure(
        build(family, "aligned" if method == "checkpointed" else method), *batch(2 * HALF, SEED)
    )
    halves = [part[f"{family}/{method}"] for part in found]
    for name in ("logits", "targets"):
        both = torch.cat([half[name] for half in halves])
        torch.testing.assert_close(both, expected[name], atol=1e-5, rtol=1e-5)
    for name, gradient in expected["gradients"].items():
        for half in halves:
            actual = half["gradients"][name]
            torch.testing.assert_close(actual, gradient, atol=1e-6, rtol=1e-4, msg=name)
    stats = {key: value for key, value in expected["stats"].items() if "horizontal" in key}
    assert stats["horizontal_1/mixed_samples"] > 0
    for key, value in stats.items():
        torch.testing.assert_close(halves[0]["stats"][key], value, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("family", "method"), RUNS)
def test_partners_come_from_the_other_process(family: str, method: str) -> None:
    """The comparison above would hold without an exchange if nobody chose a stranger."""
    plans = build(family, method)(*batch(2 * HALF, SEED)).trace.horizontal.values()
    home = torch.arange(2 * HALF) // HALF
    assert any((plan.replace.any(1) & (plan.partner // HALF != home)).any() for plan in plans)


def test_one_process_can_act_alone(found: list[dict[str, Any]]) -> None:
    images, labels = batch(2 * HALF, SEED)
    for rank, part in enumerate(found):
        mine = slice(rank * HALF, (rank + 1) * HALF)
        expected = build("cct", "alone")(images[mine], labels[mine]).targets
        torch.testing.assert_close(part["own"], expected)


def test_uneven_batches_are_refused_everywhere(found: list[dict[str, Any]]) -> None:
    for part in found:
        assert "got batches of 4, 5; leave out the last, uneven batch" in part["refusal"]


def test_random_pairs_are_drawn_in_each_process() -> None:
    with pytest.raises(InputError, match="with gather=True, got 'random'"):
        horizontal(assignment="random")
