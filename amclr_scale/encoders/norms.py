"""Normalisation of convolutional towers, and what it does to a tower's independence of ranks and micro-batches.

    group   GroupNorm, per sample: a sample's feature does not depend on who else is in the batch
    sync    BatchNorm with the statistics of all ranks: does not depend on the number of ranks
    frozen  BatchNorm with stored statistics, affine parameters trained: per sample
    batch   BatchNorm with the statistics of one rank's micro-batch: depends on both; what ranks store is averaged where
            the model is measured, saved or exported (rank_buffers.py)

Wu & He, "Group Normalization", ECCV 2018, arXiv:1803.08494. Statistics are taken in float32 or better.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from amclr_scale.errors import UserError
from amclr_scale.precision import HALF

Norm = Literal["group", "batch", "sync", "frozen"]

CHANNELS_PER_GROUP = 8  # one SIMD register of floats: GroupNorm then costs less than BatchNorm on CPU

NOTES = {
    "batch": "model.image.norm: batch: every rank normalises each micro-batch by itself, so results depend on "
    "the number of ranks and on execution.micro_batch_size; what ranks store is averaged to evaluate and save",
    "sync": "model.image.norm: sync: statistics are taken over all ranks, but over one micro-batch at a time: results "
    "do not depend on the number of ranks, but would on execution.micro_batch_size",
}


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm in groups of 8 channels, or one group where 8 does not divide them."""
    return nn.GroupNorm(channels // CHANNELS_PER_GROUP if channels % CHANNELS_PER_GROUP == 0 else 1, channels)


class BatchNorm(_BatchNorm):
    """BatchNorm of one rank's micro-batch, in float32 where the tower computes in half precision.

    DeepSpeed leaves stored statistics in float32 beside half-precision weights, which torch's own refuses.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"input: expected at least (b, C), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        return _in_half(self, input) if input.dtype in HALF else super().forward(input)


def _in_half(norm: _BatchNorm, x: Tensor) -> Tensor:
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1 / float(norm.num_batches_tracked)
    own = norm.training or norm.running_mean is None
    return _in_float32(norm, x, norm.running_mean, norm.running_var, own, momentum)


def _in_float32(
    norm: _BatchNorm, x: Tensor, mean: Tensor | None, variance: Tensor | None, own: bool, momentum: float
) -> Tensor:
    weight, bias = (p if p is None else p.float() for p in (norm.weight, norm.bias))
    return F.batch_norm(x.float(), mean, variance, weight, bias, own, momentum, norm.eps).to(x.dtype)


class FrozenBatchNorm(_BatchNorm):
    """BatchNorm that always uses its stored statistics; weight and bias are trained."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"input: expected at least (b, C), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype in HALF:
            return _in_float32(self, input, self.running_mean, self.running_var, False, 0.0)
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class SyncBatchNorm(nn.SyncBatchNorm):
    """BatchNorm over the samples of all ranks, on CPU and in half precision too (torch's own: CUDA, float32).

    Ranks may bring different numbers of samples. The backward is that of the sum over ranks of the losses.
    """

    def forward(self, input: Tensor) -> Tensor:
        together = self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not together and input.dtype in HALF:
            return _in_half(self, input)
        if not together or (input.is_cuda and input.dtype not in HALF):
            return super().forward(input)
        x = input.float() if input.dtype in HALF else input
        dims = [0, *range(2, x.dim())]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        local = torch.cat([x.sum(dims), x.new_tensor([x.numel() / x.shape[1]])])
        total = _sum_over_ranks(local)
        count, mean = total[-1].detach(), total[:-1] / total[-1].detach()
        centred = x - mean.view(shape)
        variance = _sum_over_ranks(centred.square().sum(dims)) / count
        if self.track_running_stats:
            self._update(mean.detach(), variance.detach() * count / (count - 1))
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale.view(shape) + self.bias.view(shape)).to(input.dtype)

    @torch.no_grad()
    def _update(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.detach().clone()
        dist.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        out = upstream[0].clone()
        dist.all_reduce(out)
        return out


def _sum_over_ranks(x: Tensor) -> Tensor:
    return cast(Tensor, _SumOverRanks.apply(x))  # type: ignore[no-untyped-call]


def has_batch_norm(tower: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in tower.modules())


def convert_batch_norm(tower: nn.Module, norm: Norm, *, pretrained: bool = False) -> nn.Module:
    """Replace every BatchNorm of a tower; weights, biases and stored statistics are carried over.

    Args:
        norm: what to put in its place.
        pretrained: whether the tower's stored statistics mean anything.

    Raises:
        UserError: frozen statistics of a tower with random weights, or a kind of BatchNorm that is unknown here.
    """
    if norm == "frozen" and not pretrained:
        raise UserError(
            "model.image.norm: frozen statistics need trained ones, and model.image.weights is null; "
            "name a file with weights, or choose group, sync or batch"
        )
    return _convert(tower, {"group": _to_group, "sync": _to_sync, "frozen": _to_frozen, "batch": _to_batch}[norm])


def _convert(module: nn.Module, replace: Callable[[_BatchNorm], nn.Module]) -> nn.Module:
    if isinstance(module, _BatchNorm):
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNorm):
            return replace(module)
        if replace is _to_batch:
            return module  # a library's own kind: kept as it is
        if type(module).__name__ == "BatchNormAct2d":  # timm's, with an activation inside
            return nn.Sequential(replace(module), cast(nn.Module, module.drop), cast(nn.Module, module.act))
        raise UserError(
            f"model.image.norm: this tower has {type(module).__name__}, which can only be kept: choose batch"
        )
    for name, child in module.named_children():
        setattr(module, name, _convert(child, replace))
    return module


def _to_group(norm: _BatchNorm) -> nn.Module:
    new = group_norm(norm.num_features)
    new.weight, new.bias = norm.weight, norm.bias
    return new


def _to_sync(norm: _BatchNorm) -> nn.Module:
    return _carry_over(norm, SyncBatchNorm(norm.num_features, norm.eps, norm.momentum or 0.1))


def _to_batch(norm: _BatchNorm) -> nn.Module:
    return _carry_over(norm, BatchNorm(norm.num_features, norm.eps, norm.momentum))


def _to_frozen(norm: _BatchNorm) -> nn.Module:
    return _carry_over(norm, FrozenBatchNorm(norm.num_features, norm.eps))


def _carry_over(old: _BatchNorm, new: _BatchNorm) -> _BatchNorm:
    new.weight, new.bias = old.weight, old.bias
    new.running_mean, new.running_var, new.num_batches_tracked = (
        old.running_mean,
        old.running_var,
        old.num_batches_tracked,
    )
    return new


@contextlib.contextmanager
def keep_statistics(module: nn.Module) -> Iterator[None]:
    """Inside it, BatchNorm normalises as ever and leaves its stored statistics alone.

    For a second forward of the same samples in one step: recomputation, or the second pass of a gradient cache.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.num_batches_tracked is not None]
    before = [(m, m.momentum, m.num_batches_tracked.clone()) for m in norms if m.num_batches_tracked is not None]
    try:
        for m in norms:
            m.momentum = 0.0
        yield
    finally:
        for m, momentum, batches in before:
            m.momentum = momentum
            assert m.num_batches_tracked is not None
            m.num_batches_tracked.copy_(batches)
