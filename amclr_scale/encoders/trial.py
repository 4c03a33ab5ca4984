"""One forward of a tower without memory and without arithmetic: does it take this input, and what does it give?

Floating-point tensors have shapes only (the meta device), so a tower of billions of parameters is tried in a moment;
integers are real, so that a position beyond the end of a table of positions is found where it is looked up.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_map_only

_LOOK_UPS = (torch.ops.aten.embedding.default,)
_REAL = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


class _RealIntegers(TorchDispatchMode):
    """What is made of integers alone is computed; what has a part without memory has none."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled in here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _LOOK_UPS and not args[1].is_meta and args[1].numel():
            largest, smallest, rows = int(args[1].max()), int(args[1].min()), args[0].shape[0]
            if largest >= rows or smallest < 0:
                raise IndexError(f"number {largest if largest >= rows else smallest} in a table of {rows} rows")
        if tree_any(_is_meta, (args, kwargs)):
            moved, named = tree_map_only(Tensor, _to_meta, (args, kwargs))
            return func(*moved, **named)
        where = kwargs.get("device")
        if where is not None and torch.device(where).type == "meta":
            out = func(*args, **kwargs)
            if isinstance(out, Tensor) and out.dtype in _REAL:
                return func(*args, **{**kwargs, "device": "cpu"})
            return out
        return func(*args, **kwargs)


def _is_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def _to_meta(x: Tensor) -> Tensor:
    return x if x.is_meta else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


class UntriedError(Exception):
    """A tower that looks at numbers which a trial has not got, and has no memory of its own to compute them with."""


def trial(tower: nn.Module, *inputs: Tensor) -> Any:
    """What the tower gives for these inputs: tensors of which only the shapes mean something. It is left as it was.

    A tower that looks at floating-point numbers on its way runs with its real weights instead.

    Args:
        inputs: real.

    Raises:
        UntriedError: it would have to run, and it has no weights.
        Exception: whatever the tower raises about the inputs; IndexError where a table has too few rows.
    """
    training = [module for module in tower.modules() if module.training]
    parts = {name: _to_meta(p.detach()) for name, p in tower.named_parameters()}
    parts |= {name: _to_meta(b) for name, b in tower.named_buffers() if b.is_floating_point()}
    tower.eval()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            try:
                with _RealIntegers():  # type: ignore[no-untyped-call]
                    return functional_call(tower, parts, inputs)
            except NotImplementedError as error:
                if any(p.is_meta for p in tower.parameters()):
                    raise UntriedError(str(error)) from error
                return tower(*inputs)
    finally:
        for module in training:
            module.training = True


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number of 1 .. most that fits, where all below one that fits do; 0: none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
