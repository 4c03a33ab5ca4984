"""A rank without a device of its own is told so before any process waits for another."""

from unittest import mock

import pytest
import torch

from amclr_scale.distributed.launcher import RankInfo
from amclr_scale.distributed.process_group import keep_float32, start
from amclr_scale.errors import UserError


def test_more_ranks_than_devices(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    visible = mock.patch.multiple(torch.cuda, is_available=lambda: True, device_count=lambda: 1)
    with (
        visible,
        pytest.raises(UserError, match=r"^CUDA_VISIBLE_DEVICES: .* 8 ranks .* got 1 for local rank 3; .*gpus-per-node"),
    ):
        start(RankInfo(rank=3, local_rank=3, world_size=8, local_world_size=8))
    assert not torch.distributed.is_initialized()


def test_float32_stays_float32(monkeypatch):
    """torch lets convolutions round to TF32 unless it is told not to."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    keep_float32()
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
