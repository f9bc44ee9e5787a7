"""Two processes: gradients are those of one process that sees the same samples.

All cases run in one pair of processes, which each note what went wrong with a case; the tests look
at the notes.
"""

from __future__ import annotations

import functools
import os
import re
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from filelock import FileLock
from torch.nn.parallel import DistributedDataParallel

import vitmix
from contract import (
    BROADLY,
    IN_DEPTH,
    blocks_of,
    contract,
    horizontal,
    images_of,
    make,
    refusal,
    vertical,
    wrap,
)

pytest.importorskip("timm")
pytest.importorskip("transformers")
pytest.importorskip("torchvision")

SIZE = 4  # samples a process
Gradients = dict[str, torch.Tensor | None]
Notes = dict[tuple[str, str, str], str]  # what went wrong, by machinery, family and method

OUTSIDE_HOOKS = (
    "saliency by rollout or gradient, where blocks are sharded on their own: blocks are run a "
    "second time, and FSDP does not gather their weights for that"
)
FSDP_FAILURES = {
    ("vit-pytorch-mean", "everything"): "torch cannot shard the model's class token of no elements"
} | {
    (family, method): OUTSIDE_HOOKS
    for family in ("cct", "vit")
    for method in ("horizontal-rollout", "horizontal-gradient")
}


def gradients(
    step: Callable[..., Any], mixing: vitmix.MixingModel, family: str, rank: int
) -> Gradients:
    """Gradients of one step on the samples of a process, with its own draws."""
    mixing.generator.manual_seed(rank)  # type: ignore[union-attr]
    mixing.zero_grad()
    torch.manual_seed(rank)
    step(*images_of(family, SIZE, rank)).loss().backward()
    return taken(mixing)


def taken(mixing: vitmix.MixingModel) -> Gradients:
    found: Gradients = {}
    for name, parameter in mixing.named_parameters():
        gradient: Any = parameter.grad
        found[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return found


def mean_over_processes(family: str, build: Callable[[int], vitmix.MixingModel]) -> Gradients:
    """The mean of what each process would find alone."""
    mixings = [build(rank) for rank in range(2)]
    first, second = (gradients(mixing, mixing, family, rank) for rank, mixing in enumerate(mixings))
    return {
        name: None if value is None else (value + second[name]) / 2 for name, value in first.items()
    }


@functools.cache
def expected_of(family: str, method: str) -> Gradients:
    return mean_over_processes(family, lambda rank: make(family, method).train())


def require_equal(found: Gradients, expected: Gradients) -> None:
    for name, gradient in expected.items():
        observed = found[name]
        if gradient is None:  # FSDP gives zeros to what it shards with parameters that are used
            assert observed is None or not observed.any(), name
        else:
            assert observed is not None, name
            torch.testing.assert_close(observed, gradient, atol=1e-5, rtol=1e-4, msg=name)


def parallel(mixing: vitmix.MixingModel, expected: Gradients) -> DistributedDataParallel:
    """Only models with parameters that they never use themselves need them to be looked for."""
    unused = any(gradient is None for gradient in expected.values())
    return DistributedDataParallel(mixing, find_unused_parameters=unused)


def require_steps(mixing: vitmix.MixingModel, expected: Gradients, family: str, rank: int) -> None:
    wrapped = parallel(mixing, expected)
    for _ in range(2):  # the second step finds parameters that the first left out
        require_equal(gradients(wrapped, mixing, family, rank), expected)


def data_parallel(family: str, method: str, rank: int) -> None:
    require_steps(make(family, method).train(), expected_of(family, method), family, rank)


def no_easy_sample(family: str, method: str, rank: int) -> None:
    """Nothing is mixed in one of the processes: ScoreNet still gets its gradients."""

    def gated(rank: int) -> vitmix.MixingModel:
        mixing = make(family, method).train()
        for stage in mixing.tokens:
            if rank == 0 and isinstance(stage, vitmix.HorizontalTokenMixup):
                stage.tau = 0.0
        return mixing

    require_steps(gated(rank), mean_over_processes(family, gated), family, rank)


def compiled(family: str, method: str, rank: int) -> None:
    mixing = make(family, method).train()
    mixing.compile(backend="eager")
    expected = expected_of(family, method)
    require_equal(gradients(parallel(mixing, expected), mixing, family, rank), expected)


def sharded(family: str, method: str, rank: int) -> None:
    """Each block on its own, and the rest."""
    from torch.distributed.fsdp import fully_shard

    mixing = make(family, method).train()
    for block in mixing.backbone.blocks:
        fully_shard(block.module)
    fully_shard(mixing)
    require_equal(gradients(mixing, mixing, family, rank), expected_of(family, method))


def halves(family: str, method: str, rank: int) -> None:
    """Exactly one process with all samples, where no pair crosses the halves.

    First and last samples are paired, so a half is a first and a last quarter; no sample is easy.
    """

    def build() -> vitmix.MixingModel:
        at = blocks_of(family)
        tokens: list[vitmix.TokenStage] = [horizontal(block=at.horizontal, tau=0.0)]
        if refusal(family, "vertical") is None:
            tokens.append(vertical(at.vertical))
        aligned = vitmix.TokenAlignedLabels()
        mix = vitmix.CutMix(pairing="flip")
        mixing = wrap(family, mix=mix, labels=aligned, tokens=tokens).train()
        for module in mixing.modules():
            if re.search("drop|stochastic|batchnorm", type(module).__name__, re.IGNORECASE):
                module.eval()  # draws and statistics differ between halves and whole
        return mixing

    images, targets = images_of(family, 2 * SIZE)
    whole = build()
    whole(images, targets).loss().backward()
    expected = taken(whole)
    own = torch.tensor([[0, 1, 6, 7], [2, 3, 4, 5]][rank])
    mixing = build()
    wrapped = parallel(mixing, expected)
    wrapped(images[own], targets[own]).loss().backward()
    require_equal(taken(mixing), expected)


Run = Callable[[str, str, int], None]
# Thresholds that follow the samples seen are those of a process; `test_gather` tells more.
CASES = [*BROADLY, *(case for case in IN_DEPTH if case[1] != "horizontal-shares")]
COMPILED = [("vit", "everything")]
HARD = [("cct", "horizontal"), ("cct", "everything"), ("vit", "everything")]
MACHINERY: dict[str, tuple[Run, list[tuple[str, str]]]] = {
    "parallel": (data_parallel, CASES),
    "halves": (halves, BROADLY),
    "hard": (no_easy_sample, HARD),
    "compiled": (compiled, COMPILED),
    "sharded": (sharded, CASES),
}


def note_of(run: Run, family: str, method: str, rank: int) -> str:
    try:
        run(family, method, rank)
    except Exception:
        return traceback.format_exc()
    return ""


def work(rank: int, folder: str, families: set[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    notes: Notes = {}
    for machinery, (run, cases) in MACHINERY.items():
        for family, method in (case for case in cases if case[0] in families):
            notes[machinery, family, method] = note_of(run, family, method, rank)
    torch.save(notes, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def notes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Notes:
    """Notes of both processes; with pytest-xdist, one worker makes them for all."""
    items = [item for item in request.session.items if "notes" in item.fixturenames]  # type: ignore[attr-defined]
    families = {item.callspec.params["family"] for item in items}  # type: ignore[attr-defined]
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with FileLock(folder / "two-processes.lock"):
        found = folder / "two-processes"
        if not found.exists():
            found.mkdir()
            mp.spawn(work, args=(str(found), families), nprocs=2)
    first, second = (torch.load(found / f"{rank}.pt", weights_only=True) for rank in range(2))
    return {case: first[case] or second[case] for case in first}


@contract("DDP", CASES)
def test_data_parallel(family: str, method: str, notes: Notes) -> None:
    assert not notes["parallel", family, method]


@contract("DDP = one process")
def test_halves_equal_one_process(family: str, method: str, notes: Notes) -> None:
    assert not notes["halves", family, method]


@pytest.mark.parametrize(("family", "method"), HARD)
def test_a_process_without_easy_samples(family: str, method: str, notes: Notes) -> None:
    assert not notes["hard", family, method]


@pytest.mark.parametrize(("family", "method"), COMPILED)
def test_a_compiled_step(family: str, method: str, notes: Notes) -> None:
    assert not notes["compiled", family, method]


@contract("FSDP2", CASES, known=FSDP_FAILURES)
def test_fully_sharded(family: str, method: str, notes: Notes) -> None:
    assert not notes["sharded", family, method]
