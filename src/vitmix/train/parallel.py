"""Several processes: how many, which one this is, and the strategy that joins them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.distributed.tensor import DTensor, distribute_tensor

from vitmix.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from vitmix import MixingModel
    from vitmix.train.config import TrainConfig

__all__ = [
    "Processes",
    "make_plugins",
    "make_strategy",
    "placed_like",
    "require_whole_blocks",
    "shared_folder",
    "tell_folder",
    "whole",
]

# Where the first process tells those that it starts which folder it writes to.
_FOLDER = "VITMIX_RUN_FOLDER"


@dataclass(frozen=True)
class Processes:
    """How many processes train together, and the number of this one.

    Attributes:
        count: processes on all nodes.
        rank: of this one, from 0; the first one writes.
    """

    count: int = 1
    rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    @classmethod
    def of(cls, config: TrainConfig) -> Processes:
        """What the settings and the launcher say.

        Raises:
            InputError: settings that do not go together, or another number than was started.
        """
        count = config.devices * config.nodes
        started = _started_outside()
        if started is not None and started != count:
            raise InputError(
                f"expected --devices x --nodes to be the {started} processes that were started, "
                f"got {config.devices} x {config.nodes}"
            )
        if count == 1:
            if config.strategy == "fsdp":
                raise InputError("expected --devices of at least 2 for --strategy fsdp, got 1")
            return cls()
        if config.nodes > 1 and started is None:
            raise InputError(
                f"expected --nodes {config.nodes} to be started by torchrun or srun on each node, "
                "got a single process; docs/scale.md has complete scripts"
            )
        if config.batch_size % count:
            raise InputError(
                f"expected --batch-size, the images of a step in all processes together, to be a "
                f"multiple of the {count} processes, got {config.batch_size}"
            )
        from lightning.fabric.utilities.rank_zero import rank_zero_only

        return cls(count, int(getattr(rank_zero_only, "rank", 0)))

    def seed(self, seed: int) -> int:
        """A seed of this process's own, made from one for all."""
        return seed + 1_000_003 * self.rank


def _started_outside() -> int | None:
    """Number of processes that torchrun or srun has started; None if neither has."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    if "SLURM_STEP_NUM_TASKS" in os.environ and "SLURM_PROCID" in os.environ:
        return int(os.environ["SLURM_STEP_NUM_TASKS"])
    return None


def make_strategy(config: TrainConfig) -> Any:
    """Lightning's strategy for ``--strategy``."""
    if config.devices * config.nodes == 1:
        return "auto"
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    if config.strategy == "fsdp":
        return ModelParallelStrategy(
            data_parallel_size=config.devices * config.nodes,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,  # files that any number of processes can read
        )
    return DDPStrategy(gradient_as_bucket_view=True)


def make_plugins() -> list[Any]:
    """Under SLURM, keep Lightning from asking for another job: checkpoints and requeuing are ours.

    A job that is asked to stop (SIGTERM) saves and ends; ``--resume`` goes on with it.
    """
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, of which each process may have a shard only."""
    full: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full


def placed_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of a tensor where ``like`` is: on its device, in shards if it is in shards."""
    if isinstance(like, DTensor) and not isinstance(tensor, DTensor):
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor.to(like.device, copy=True)


def require_whole_blocks(mixing: MixingModel, config: TrainConfig) -> None:
    """Refuse stages that run blocks outside of the pass, where shards are not put together.

    Raises:
        InputError: names the stage.
    """
    for stage in mixing.tokens:
        saliency = getattr(stage, "saliency", None)
        if config.strategy == "fsdp" and saliency in ("rollout", "gradient"):
            raise InputError(
                f"expected saliency 'attention' or 'random' with --strategy fsdp, got {saliency!r}:"
                " it needs further passes through blocks; use --strategy ddp"
            )


def shared_folder(config: TrainConfig) -> Path:
    """The run folder, for a process that is not the first one.

    Raises:
        InputError: it cannot be known.
    """
    if config.name is not None:
        return Path(config.out).expanduser() / config.name
    if _FOLDER in os.environ:
        return Path(os.environ[_FOLDER])
    raise InputError(
        "expected --name for processes started by torchrun or srun, so that all know the run "
        "folder; got none"
    )


def tell_folder(folder: Path) -> None:
    """Let the processes that this one starts know the run folder."""
    os.environ[_FOLDER] = str(folder.resolve())
