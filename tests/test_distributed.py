"""Two processes: gradients are the mean of those of each process's own samples."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import vitmix
from models import FAMILIES, NUM_CLASSES, batch
from test_mixing import METHODS

pytest.importorskip("timm")
RUNS = [
    ("cct", "horizontal"),
    ("cct", "everything"),
    ("vit", "tl-align"),
    ("vit", "vertical"),
    ("vit", "everything"),
]


def build(family: str, method: str, rank: int) -> vitmix.MixingModel:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(rank)
    return vitmix.MixingModel(
        FAMILIES[family](), num_classes=NUM_CLASSES, generator=generator, **METHODS[method]()
    ).train()


def one_process(family: str, method: str, rank: int, hard: bool) -> dict[str, torch.Tensor]:
    mixing = build(family, method, rank)
    gate(mixing, hard)
    mixing(*batch(4, rank)).loss().backward()
    return {name: p.grad for name, p in mixing.named_parameters() if p.grad is not None}


def gate(mixing: vitmix.MixingModel, hard: bool) -> None:
    """Let no sample be easy enough to be mixed: ScoreNet must still get gradients."""
    for stage in mixing.tokens:
        if hard and isinstance(stage, vitmix.HorizontalTokenMixup):
            stage.tau = 0.0


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = {}
    for family, method in RUNS:
        for hard in (False, True):
            mixing = build(family, method, rank)
            gate(mixing, hard and rank == 0)
            parallel = torch.nn.parallel.DistributedDataParallel(mixing)
            parallel(*batch(4, rank)).loss().backward()
            results[f"{family}/{method}/{hard}"] = {
                name: p.grad.clone() for name, p in mixing.named_parameters() if p.grad is not None
            }
            parallel(*batch(4, rank)).loss().backward()  # a second step finds all in order
    compiled = build("vit", "everything", rank)
    compiled.compile(backend="eager")
    parallel = torch.nn.parallel.DistributedDataParallel(compiled)
    parallel(*batch(4, rank)).loss().backward()
    for name, p in compiled.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(p.grad, results["vit/everything/False"][name], msg=name)
    torch.save(results, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def test_gradients_of_two_processes(tmp_path: Path) -> None:
    mp.spawn(work, args=(str(tmp_path),), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for family, method in RUNS:
        for hard in (False, True):
            key = f"{family}/{method}/{hard}"
            alone = [one_process(family, method, rank, hard and rank == 0) for rank in range(2)]
            for name, gradient in found[0][key].items():
                mean = (alone[0][name] + alone[1][name]) / 2
                torch.testing.assert_close(gradient, mean, atol=1e-6, rtol=1e-4, msg=key + name)
                assert torch.equal(gradient, found[1][key][name])
