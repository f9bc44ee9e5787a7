"""Triton's kernels against PyTorch, in Triton's interpreter: no GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import vitmix.functional as vf
from vitmix.errors import InputError

SCRIPT = """
import torch
import vitmix.functional.saliency as saliency
from vitmix.functional.triton_kernels import column_means

saliency._triton_is_asked_for = lambda query: asked
torch.manual_seed(0)
for batch, heads, queries, keys, channels, prefix, dtype, weighted in (
    (2, 3, 37, 37, 20, 0, torch.float32, False),
    (1, 1, 1, 5, 8, 0, torch.float32, False),
    (2, 2, 70, 70, 64, 3, torch.float32, False),
    (3, 2, 65, 129, 16, 0, torch.float32, True),
    (2, 2, 33, 33, 128, 0, torch.float32, False),
    (2, 2, 40, 40, 136, 0, torch.float32, False),
    (2, 2, 40, 40, 32, 1, torch.float16, True),
):
    packed = 3 * torch.randn(batch, max(queries, keys), 2, heads, channels)
    query, key = packed.to(dtype).permute(2, 0, 3, 1, 4)
    query, key = query[:, :, :queries], key[:, :, :keys]
    weights = torch.rand(batch, queries - prefix) if weighted else None
    options = dict(num_prefix_tokens=prefix, class_token=False, num_keys=keys)
    options["query_weights"] = weights
    asked = False
    expected = saliency.query_key_saliency(query, key, **options)
    asked = True
    found = saliency.query_key_saliency(query, key, **options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    same = torch.equal(found, expected)
    assert same == (channels > 128), "the kernels ran where they should not, or did not run"
"""


def test_kernels_give_the_means_of_the_reference() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_kernels_are_asked_for_by_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.rand(1, 2, 4, 8)
    expected = vf.query_key_saliency(query, query)
    monkeypatch.setenv("VITMIX_KERNELS", "triton")
    assert torch.equal(vf.query_key_saliency(query, query), expected)  # on the CPU nothing changes
    monkeypatch.setenv("VITMIX_KERNELS", "cuda")
    with pytest.raises(InputError, match="torch or triton, got 'cuda'"):
        vf.query_key_saliency(query, query)
