"""Extra passes leave nothing behind."""

from __future__ import annotations

import pytest
import torch

from vitmix.aside import aside


def test_autocast_keeps_none_of_its_casts() -> None:
    """Those made without a graph would be taken for the step's own (PyTorch 2.6)."""
    layer, x = torch.nn.Linear(4, 4), torch.rand(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad(), aside([layer], x.device):
            assert not torch.is_autocast_cache_enabled()
            layer(x)
        assert torch.is_autocast_cache_enabled()
        layer(x).float().sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("enabled", [True, False])
def test_the_cache_is_as_before_after_an_error(enabled: bool) -> None:
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(enabled)
    try:
        with pytest.raises(ValueError, match="inside"), aside([], torch.device("cpu")):
            raise ValueError("inside")
        assert torch.is_autocast_cache_enabled() is enabled
    finally:
        torch.set_autocast_cache_enabled(before)


def test_random_numbers_and_running_statistics_stay() -> None:
    norm = torch.nn.BatchNorm1d(3)
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    with aside([norm], torch.device("cpu")):
        norm(torch.rand(5, 3))
    assert torch.equal(torch.rand(2), expected)
    assert not norm.running_mean.any()  # type: ignore[union-attr]
    assert norm.num_batches_tracked == 0
