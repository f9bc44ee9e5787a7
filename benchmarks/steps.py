"""Time whole training steps side by side: what does mixing cost on top of the plain step?

The variants take turns in one process, so that a machine whose speed drifts is fair to all of
them. Printed are medians and the median of the ratio round by round, with its quartiles: of seconds
on the clock, and of processor time, which other programs on the machine disturb less.
``plain-again`` is the plain step once more: what its ratio is off from 1 is noise. A variant with
``+compiled`` behind it is compiled in one graph.

    python benchmarks/steps.py --model deit_small_patch16_224 --batch-size 8 \
        --variants plain,tl-align
    python benchmarks/steps.py --model cct_7_3x1_32 --batch-size 32 \
        --variants plain,tokenmixup-h,tokenmixup-v
    python benchmarks/steps.py --model deit_tiny_patch16_224 --batch-size 16 \
        --variants plain,plain+compiled,tl-align,tl-align+compiled
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import vitmix
from vitmix.models import create_model

NUM_CLASSES = 100
Step = Callable[[], None]


def stages(variant: str) -> dict[str, object] | None:
    """Arguments of ``MixingModel`` for a variant; None for the plain step."""
    box = vitmix.CutMix(align=True)
    horizontal = vitmix.HorizontalTokenMixup(block=2, tau=float("inf"), rho=0.005)
    vertical = vitmix.VerticalTokenMixup(block=2, kappa=3)
    table: dict[str, dict[str, object] | None] = {
        "plain": None,
        "plain-again": None,
        "cutmix": {"mix": vitmix.CutMix()},
        "tokenmix": {"mix": vitmix.TokenMix()},
        "transmix": {"mix": box, "labels": vitmix.AttentionLabels()},
        "tl-align": {"mix": box, "labels": vitmix.TokenAlignedLabels()},
        "tokenmixup-h": {"tokens": [horizontal]},
        "tokenmixup-v": {"tokens": [vertical]},
        "tokenmixup": {"tokens": [horizontal, vertical]},
        "everything": {
            "mix": vitmix.TokenMix(),
            "labels": vitmix.TokenAlignedLabels(),
            "tokens": [horizontal, vertical],
        },
    }
    if variant not in table:
        raise SystemExit(f"expected a variant of {', '.join(table)}, got {variant!r}")
    return table[variant]


def make_step(variant: str, name: str, batch: int, size: int, device: str, bf16: bool) -> Step:
    """Make a function that does one whole training step."""
    torch.manual_seed(0)
    variant, *compiled = variant.split("+")
    if compiled not in ([], ["compiled"]):
        raise SystemExit(f"expected nothing or 'compiled' behind '+', got {'+'.join(compiled)!r}")
    model = create_model(name, num_classes=NUM_CLASSES, img_size=size).to(device).train()
    images = torch.randn(batch, 3, size, size, device=device)
    targets = torch.randint(NUM_CLASSES, (batch,), device=device)
    arguments = stages(variant)
    mixing = None
    if arguments is not None:
        mixing = vitmix.MixingModel(model, num_classes=NUM_CLASSES, **arguments)  # type: ignore[arg-type]
    trained = model if mixing is None else mixing
    if compiled:
        trained.compile(fullgraph=True)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-5)

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
            if mixing is None:
                loss = torch.nn.functional.cross_entropy(model(images), targets)
            else:
                loss = mixing(images, targets).loss()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def compare(steps: dict[str, Step], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each step in each round, clock and processor; the order turns every round."""
    for step in steps.values():
        step()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for turn in range(rounds):
        names = list(steps) if turn % 2 == 0 else list(reversed(steps))
        for name in names:
            clock, processor = time.perf_counter(), time.process_time()
            steps[name]()
            seconds[name].append((time.perf_counter() - clock, time.process_time() - processor))
    return seconds


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="cct_7_3x1_32")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--variants", default="plain,tl-align,tokenmixup-h,tokenmixup-v,tokenmixup")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--json", type=Path, help="write the seconds of every round here")
    options = parser.parse_args()
    variants = options.variants.split(",")
    size = int(options.model.rsplit("_", 1)[1])
    steps = {
        variant: make_step(
            variant, options.model, options.batch_size, size, options.device, options.bf16
        )
        for variant in variants
    }
    seconds = compare(steps, options.rounds)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{options.model}, batch {options.batch_size}, {options.device} ({machine})")
    print(f"{'variant':22}{'ms':>10}{'clock: ratio, quartiles':>27}{'processor':>25}")
    base = seconds[variants[0]]
    for variant in variants:
        line = f"{variant:22}{statistics.median(s for s, _ in seconds[variant]) * 1e3:10.1f}"
        for kind in (0, 1):
            pairs = zip(seconds[variant], base, strict=True)
            ratios = [mine[kind] / plain[kind] for mine, plain in pairs]
            low, middle, high = statistics.quantiles(ratios, n=4)
            line += f"{middle:11.3f} {low:7.3f} {high:6.3f}"
        print(line)
    if options.json:
        found = {"settings": {k: str(v) for k, v in vars(options).items()}, "machine": machine}
        options.json.write_text(json.dumps({**found, "seconds": seconds}, indent=1))


if __name__ == "__main__":
    main()
