"""Where ZeRO put each parameter: the flat fp32 tensors that a rank's optimizer steps, and the pieces in them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A part of one parameter inside a flat tensor."""

    parameter: int  # index into Shard.shapes
    offset: int  # of the part in the flattened parameter
    start: int  # of the part in the flat tensor
    numel: int


@dataclass(frozen=True)
class Shard:
    """What lies in one flat tensor. `shapes` is the same on every rank, `pieces` are this rank's."""

    shapes: tuple[torch.Size, ...]
    pieces: tuple[Piece, ...]


def shards_of(zero: Any, stage: int) -> Iterator[tuple[Tensor, list[torch.nn.Parameter], Shard]]:
    """The flat fp32 tensors that this rank's optimizer steps at stages 1 to 3, and what lies in each.

    Yields:
        A flat tensor, the parameters of its group (the same on every rank), and the pieces of them that lie in it.
    """
    return _shards_of_stage_3(zero) if stage == 3 else _shards_of_stages_1_and_2(zero)


def _shards_of_stages_1_and_2(zero: Any) -> Iterator[tuple[Tensor, list[torch.nn.Parameter], Shard]]:
    for parameters, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        pieces = []
        for index, parameter in enumerate(parameters):
            if parameter._hp_mapping is not None:  # None: no part of it is on this rank
                here, there = parameter._hp_mapping.hp_fragment_address, parameter._hp_mapping.lp_fragment_address
                pieces.append(Piece(index, there.start, here.start, here.numel))
        yield flat, list(parameters), Shard(tuple(p.shape for p in parameters), tuple(pieces))


def _shards_of_stage_3(zero: Any) -> Iterator[tuple[Tensor, list[torch.nn.Parameter], Shard]]:
    rank = dist.get_rank()
    for parameters, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        pieces = []
        for index, parameter in enumerate(parameters):
            _, start, part = zero.grad_position[zero.get_param_id(parameter)]
            numel = min(part, parameter.ds_numel - rank * part)  # the last parts are padded
            if numel > 0:
                pieces.append(Piece(index, rank * part, start, numel))
        yield flat, list(parameters), Shard(tuple(p.ds_shape for p in parameters), tuple(pieces))
