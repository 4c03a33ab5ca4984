"""Gradients that have no gradient say so."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Tensor | None, ...]]


def first_order_only(backward: Backward) -> Backward:
    """A Function's backward, run without graph; whoever differentiates its results further gets an error.

    torch's once_differentiable does so only where the upstream gradient requires one itself; elsewhere the results
    would be constants, and a gradient penalty silently nothing.
    """

    @wraps(backward)
    def run(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        if not torch.is_grad_enabled():
            return gradients
        return tuple(x if x is None else _Refuse.apply(x.requires_grad_()) for x in gradients)  # type: ignore[no-untyped-call]

    return run


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        raise RuntimeError(
            "second-order gradients: similarities have first-order gradients only; "
            "gradient penalties need a dense definition of the loss"
        )
