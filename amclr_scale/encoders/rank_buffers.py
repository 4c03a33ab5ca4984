"""One set of buffers for all ranks, where each has its own: BatchNorm's statistics of the samples that a rank has seen.

With `model.image.norm: batch` every rank normalises by itself, and its stored statistics drift from the others'. A
model that is measured, saved or exported has the mean over ranks of them. All ranks bring equally many samples, so that
no rank counts for more; the mean of moving averages is the moving average of the means. Buffers that all ranks have
alike keep every bit, and counters are rank 0's. Training goes on with each rank's own.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from amclr_scale.distributed.collectives import all_sum, broadcast, group, world_size
from amclr_scale.encoders.weights import saved_parts


def mean_of(copies: Sequence[Tensor]) -> Tensor:
    """The ranks' copies of a buffer, in rank order, as one."""
    first = copies[0]
    if not first.is_floating_point():
        return first
    apart = torch.stack([copy.double() - first.double() for copy in copies])
    return (first.double() + apart.mean(0)).to(first.dtype)


@torch.no_grad()
def averaged_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that `state_dict` names, one set on all ranks. All ranks call it together."""
    buffers = saved_parts(model)[1]
    if world_size() == 1:
        return buffers
    everyone = group()
    found = {}
    for name, buffer in buffers.items():
        first = broadcast(buffer, 0, tuple(buffer.shape), everyone).view(buffer.shape)
        found[name] = first
        if buffer.is_floating_point():
            apart = all_sum(buffer.double() - first.double()) / world_size()
            found[name] = (first.double() + apart).to(buffer.dtype)
    return found


@contextmanager
def one_set_of_buffers(model: nn.Module) -> Iterator[None]:
    """Inside it, all ranks compute with the same buffers; afterwards each has its own again. All ranks enter it."""
    if world_size() == 1:
        yield
        return
    own = saved_parts(model)[1]
    before = {name: buffer.clone() for name, buffer in own.items()}
    _put(own, averaged_buffers(model))
    try:
        yield
    finally:
        _put(own, before)


@torch.no_grad()
def _put(buffers: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, buffer in buffers.items():
        buffer.copy_(values[name])
