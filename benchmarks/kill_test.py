"""Kill a training run at random moments, go on each time, compare with a run left alone.

    python benchmarks/kill_test.py --kills 20

Every kill is a SIGKILL: no handler, no last words, in the middle of a write as well as of a step.
The run mixes with everything at once (blocks, horizontal and vertical tokens, aligned labels),
augments, averages weights and checkpoints every few steps. The last checkpoints must hold the same
bytes: weights, optimiser, schedule, average, generators, place in the data; and the logs the same
rows. Exit status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

METHOD = """\
mix: {name: tokenmix, mask: block}
labels: aligned
tokens:
  - {name: horizontal, block: 1, tau: inf, rho: 0.01}
  - {name: vertical, block: 1, kappa: 3}
"""
EPOCH = re.compile(r"epoch +(\d+)/")
# Settings and times differ between two runs in any case.
VOID = ("config", "seconds", "started")


def command(out: Path, method: Path, epochs: int) -> list[str]:
    """A small run: six steps an epoch, a checkpoint every four."""
    return [
        sys.executable, "-m", "vitmix.cli", "train", "--name", "run", "--out", str(out),
        "--method", str(method), "--epochs", str(epochs), "--train-limit", "100",
        "--img-size", "16", "--batch-size", "16", "--checkpoint-steps", "4", "--model-ema",
        "--aa", "rand-m9-mstd0.5", "--reprob", "0.3", "--log-interval", "3", "--threads", "1",
        "--device", "cpu",
    ]  # fmt: skip


def differences(one: Any, other: Any, place: str = "") -> Iterator[str]:
    """Where two checkpoints are not the same, bit for bit."""
    if isinstance(one, torch.Tensor):
        if not torch.equal(one, other):
            yield place
    elif isinstance(one, dict):
        for key in one.keys() | other.keys():
            if key in VOID:
                continue
            if key in one and key in other:
                yield from differences(one[key], other[key], f"{place}/{key}")
            else:
                yield f"{place}/{key}"
    elif isinstance(one, (list, tuple)):
        if len(one) != len(other):
            yield place
        for index, pair in enumerate(zip(one, other, strict=False)):
            yield from differences(*pair, f"{place}/{index}")
    elif one != other:
        yield f"{place}: {one} and {other}"


def run_alone(arguments: list[str]) -> float:
    """Run to the end; returns the seconds up to the end of the first epoch."""
    began = time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    first = next(time.perf_counter() - began for line in process.stdout if EPOCH.match(line))
    process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with status {process.returncode}")
    return first


def kill_often(out: Path, start: list[str], kills: int, epochs: int, first: float) -> Iterator[int]:
    """Start, kill and go on until nothing is left; yields the epochs that were seen to end.

    A process is killed some epochs after its start, up to twice its share of what is left, and a
    random time later. Without an epoch, that time is up to that of a start: kills fall on reading,
    setting up, steps, validation and writing.
    """
    run = out / "run"
    done = 0
    for left in range(kills, -1, -1):
        began = (run / "config.yaml").is_file()
        process = subprocess.Popen(
            [*start[:4], "--resume", str(run)] if began else start,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        target = done + random.randint(0, 2 * (epochs - done) // (left + 1)) if left else epochs + 1
        wait = random.uniform(0, first if target == done else first / 8)
        while done < target and (line := process.stdout.readline()):
            if seen := EPOCH.match(line):
                done = int(seen[1])
        if left:
            time.sleep(wait)
            process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode not in (0, -signal.SIGKILL):
            raise SystemExit(f"the run ended with status {process.returncode}")
        if process.returncode == 0 and left:
            raise SystemExit(f"the run ended with {left} kills to come; raise --epochs")
        yield done


def main() -> int:
    """Run the test; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    random.seed(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        method = root / "everything.yaml"
        method.write_text(METHOD)
        first = run_alone(command(root / "alone", method, options.epochs))
        print(f"left alone: the first epoch ended after {first:.1f} s")
        start = command(root / "killed", method, options.epochs)
        lives = kill_often(root / "killed", start, options.kills, options.epochs, first)
        for number, done in enumerate(lives, 1):
            what = f"kill {number:2}" if number <= options.kills else "the end"
            print(f"{what}: in epoch {min(done + 1, options.epochs)}/{options.epochs}", flush=True)
        runs = [root / name / "run" for name in ("alone", "killed")]
        contents = [torch.load(run / "last.ckpt", weights_only=True) for run in runs]
        found = list(differences(*contents))
        if len({(run / "metrics.csv").read_text() for run in runs}) > 1:
            found.append("metrics.csv")
    for place in found:
        print(f"differs: {place}")
    print(f"{options.kills} kills, {'NOT the same' if found else 'the same to the last bit'}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
