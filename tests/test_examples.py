"""The examples run as they are written, for a few steps."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
LOOPS = ["plain_pytorch", "home_made", "lightning_module", "huggingface_trainer", "timm_script"]


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.filterwarnings("ignore")
def test_loops_train(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip({"huggingface_trainer": "accelerate"}.get(name, "lightning"))
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    example = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    assert 0.0 <= example["main"](1, 3) <= 1.0
