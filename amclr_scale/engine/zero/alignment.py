"""Where parameters lie in memory: GPU kernels read 16 bytes at a time, and fall back to slow ones where they cannot.

ZeRO lays the parameters of an optimizer group end to end in one flat buffer (stage 3: all groups in one). A parameter
of one element at its front then moves every other one 2 bytes off, and matrix products and LayerNorms of bf16 towers
run at a third of their speed. So groups are ordered by the largest power of two that divides each size: as every
parameter's size is then a multiple of what all that follow need, each one starts at a multiple of that power, up to 128
bytes in half precision. A size with no factor of 8 has rows that no such kernel could read anyway.
"""

import logging
from collections.abc import Iterable
from typing import Any

from torch import nn

LINE = 64  # elements: 128 bytes in half precision
KERNEL_BYTES = 16  # of the widest load of a GPU's thread

log = logging.getLogger(__name__)


def numel(parameter: Any) -> int:
    """Elements of the whole parameter; at stage 3 it may hold none of them just now."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def granularity(parameter: nn.Parameter) -> int:
    """The largest power of two, up to LINE, that divides a parameter's number of elements."""
    n = numel(parameter)
    return min(LINE, n & -n)


def aligned_order(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """The same parameters in an order in which, end to end, each starts at a multiple of its granularity."""
    return sorted(parameters, key=granularity, reverse=True)


def misaligned(named_parameters: Iterable[tuple[str, Any]], world_size: int) -> list[str]:
    """Names of the parameters of at least 8 elements that do not start at a multiple of 16 bytes.

    At stage 3 that is where parameters are read from: on one rank the flat buffer; on several every gathered one has
    memory of its own, which the allocator aligns.
    """
    found = []
    for name, parameter in named_parameters:
        place = parameter
        if hasattr(parameter, "ds_tensor"):
            if world_size > 1:
                continue
            place = parameter.ds_tensor
        if numel(parameter) >= 8 and place.data_ptr() % KERNEL_BYTES:
            found.append(name)
    return found


def report_misaligned(model: nn.Module, world_size: int) -> None:
    """A line for those who debug: the first parameter that will be slow to read, and how many there are."""
    found = misaligned(model.named_parameters(), world_size)
    if found:
        log.debug(
            "%d parameters do not start at a multiple of %d bytes, the first is %s", len(found), KERNEL_BYTES, found[0]
        )
