"""A tensor on a shelf comes back as it was put there."""

import tempfile
from pathlib import Path

import pytest
import torch

from moa.experts.cotraining import DiskTensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_was_put_last_comes_back(dtype: torch.dtype) -> None:
    first, second = torch.randn(3, 5, dtype=dtype), torch.full((2,), torch.nan, dtype=dtype)
    shelf = DiskTensor(first.t().requires_grad_())
    kept = first.t().clone()
    first.add_(1)
    shelf.take().zero_()   # both are copies
    assert torch.equal(shelf.take(), kept)
    shelf.put(second)
    assert shelf.take().isnan().all() and shelf.take().dtype == dtype and shelf.take().shape == second.shape


def test_it_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    shelf = DiskTensor(torch.ones(1000))
    assert not list(tmp_path.iterdir())
    assert torch.equal(shelf.take(), torch.ones(1000))
