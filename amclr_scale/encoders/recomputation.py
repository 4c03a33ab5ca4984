"""Activation recomputation: keep a block's input in forward, run the block again in backward.

Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, arXiv:1604.06174.

A block is an element of a tower's stack: a residual block, a transformer layer. The second run draws the same
dropout (the random state is stored with the input) and does not touch BatchNorm's stored statistics again, so
gradients are the same to the last bit.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from amclr_scale.encoders.norms import keep_statistics

Recomputation = Literal["none", "full"] | int


class _Recomputed:
    """Mixed in front of a block's class. The call itself is wrapped, so ZeRO's hooks run in the second pass too."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call: Callable[..., Any] = super().__call__  # type: ignore[misc]
        if not torch.is_grad_enabled():
            return call(*args, **kwargs)
        return checkpoint(call, *args, use_reentrant=False, context_fn=self._contexts, **kwargs)

    def _contexts(self) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        assert isinstance(self, nn.Module)
        return contextlib.nullcontext(), _second_run(self)


@contextlib.contextmanager
def _second_run(block: nn.Module) -> Iterator[None]:
    """Leave nothing behind that the first run has left already.

    torch ends the second run by an exception as soon as it has what it needs, so hooks after the modules on the way are
    skipped. ZeRO's stage 3 keeps the modules it is inside of on a stack and would never leave these: the next step's
    parameters would be taken for theirs. (Running to the end instead would give up parameters that backward is about
    to use.)
    """
    zero = sys.modules.get("deepspeed.runtime.zero.parameter_offload")
    inside: list[nn.Module] = getattr(zero, "FWD_MODULE_STACK", [])
    depth = len(inside)
    try:
        with keep_statistics(block):
            yield
    finally:
        del inside[depth:]


def blocks(tower: nn.Module) -> list[nn.Module]:
    """The blocks of a tower's stacks, from its input to its output.

    A block is a module with parts of its own that sits in a Sequential or a ModuleList. It may have blocks inside;
    those are not listed.
    """
    found: list[nn.Module] = []
    stack = isinstance(tower, nn.Sequential | nn.ModuleList)
    for child in tower.children():
        container = isinstance(child, nn.Sequential | nn.ModuleList)
        if stack and not container and any(True for _ in child.children()) and any(True for _ in child.parameters()):
            found.append(child)
        else:
            found.extend(blocks(child))
    return found


def recomputed_share(tower: nn.Module, recomputation: Recomputation) -> float:
    """The share of a tower's blocks that backward runs again."""
    total = len(blocks(tower))
    every = {"none": total + 1, "full": 1}[recomputation] if isinstance(recomputation, str) else recomputation
    return total // every / total if total else 0.0


def set_recomputation(tower: nn.Module, recomputation: Recomputation) -> int:
    """Recompute none, all, or every k-th block of a tower. Returns how many are.

    Names of parameters do not change. May be called again.

    Raises:
        ValueError: k is less than 1, or more than the tower has blocks.
    """
    stack = blocks(tower)
    k = {"none": len(stack) + 1, "full": 1}.get(recomputation, 0) if isinstance(recomputation, str) else recomputation
    if k < 1 or (k > len(stack) and recomputation != "none"):
        raise ValueError(
            f"recomputation: expected none, full or a number of blocks up to {len(stack)}, got {recomputation!r}"
        )
    chosen = range(k - 1, len(stack), k)
    for index, block in enumerate(stack):
        plain = type(block)
        if issubclass(plain, _Recomputed):
            plain = plain.__mro__[2]
        block.__class__ = type(plain.__name__, (_Recomputed, plain), {}) if index in chosen else plain
    return len(chosen)
