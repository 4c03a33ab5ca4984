"""What kernels of a CPU or of CUDA allocate and how they lay it out, for traces on the meta device: it does otherwise.

Only what shows in memory: one kernel where the meta device takes an operation apart, and layouts, because autograd
copies a gradient whose layout is not that of its weight.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import product
from typing import Any, ClassVar
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from amclr_scale.precision import HALF


@contextmanager
def kernels_of(device: str) -> Iterator[None]:
    """What a device does otherwise than the meta device.

    Attention by one kernel, as both devices have it: that of a CPU stands for all, for each keeps its output and one
    number per row for the backward. GroupNorm on a CPU reads channels last; elsewhere its input is copied.

    Under autocast norms of a CPU read bfloat16 as it is. Those of CUDA make it float32 first, and so does what else
    `WIDENED` names.

    They are put in the functions' places, rather than by a mode, because recomputation inside a backward runs outside
    of such modes.
    """
    plain = F.scaled_dot_product_attention

    def fused(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if enable_gqa or (dropout_p > 0 and device == "cpu"):
            return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if torch.is_autocast_enabled("cpu"):  # which the kernel below is too deep for
            query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
        mask = attn_mask
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -torch.inf)
        elif mask is not None:
            mask = mask.to(query.dtype)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out: Tensor = kernel(query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale)[0]
        return out

    plain_norm = F.group_norm

    def group_norm(
        input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Tensor:
        if device != "cpu" or not _channels_last(input):
            input = _wide(input) if device == "cuda" else input
            return plain_norm(input, num_groups, weight, bias, eps)
        out: Tensor = _GroupNorm.apply(input, weight, bias, num_groups, eps)  # type: ignore[no-untyped-call]
        return out

    with (
        mock.patch.object(F, "scaled_dot_product_attention", fused),
        mock.patch.object(F, "group_norm", group_norm),
        _widening() if device == "cuda" else nullcontext(),
        _Layouts(),
    ):
        yield


# What CUDA's autocast computes in float32 and a CPU's does not, and what may be large in a tower.
WIDENED = ("layer_norm", "rms_norm", "softmax", "log_softmax", "softplus", "pow", "rsqrt", "exp", "cumsum")


@contextmanager
def _widening() -> Iterator[None]:
    with ExitStack() as patches:
        for owner, name in product((F, torch, Tensor), WIDENED):
            if hasattr(owner, name):
                patches.enter_context(mock.patch.object(owner, name, _widened(getattr(owner, name))))
        yield


def _widened(function: Callable[..., Any]) -> Callable[..., Any]:
    def wide(*args: Any, **kwargs: Any) -> Any:
        return function(*map(_wide, args), **{name: _wide(value) for name, value in kwargs.items()})

    return wide


def _wide(x: Any) -> Any:
    half = isinstance(x, Tensor) and x.dtype in HALF and torch.is_autocast_enabled("cpu")
    return x.float() if half else x


class _GroupNorm(torch.autograd.Function):
    """As on a CPU: the kernels get input and gradient as they are, where other devices copy both first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float) -> Tensor:
        ctx.sizes = *x.shape[:2], x.shape[2:].numel(), groups
        out, mean, rstd = torch.ops.aten.native_group_norm(x, weight, bias, *ctx.sizes, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        whole: Tensor = out
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, mean, rstd = ctx.saved_tensors
        kernel, wanted = torch.ops.aten.native_group_norm_backward, ctx.needs_input_grad[:3]
        return *kernel(gradient, x, mean, rstd, weight, *ctx.sizes, wanted), None, None


class _Layouts(TorchDispatchMode):
    """Convolutions lay out their results as real kernels do, on CPU and CUDA alike; meta ones forget it. GroupNorm too.

    Where pixels of the input are channels last, so are those of the output and all gradients. Autograd then copies the
    gradient of a weight into the weight's own layout, and that copy is memory.

    And to a tower that asks whether a mask is all true, and so needless, the answer is no: texts are padded.
    """

    _ruled_by: ClassVar = {  # the arguments whose layout decides
        torch.ops.aten.convolution.default: slice(0, 2),
        torch.ops.aten.convolution_backward.default: slice(1, 3),
        torch.ops.aten.native_group_norm.default: slice(0, 1),
        torch.ops.aten.native_group_norm_backward.default: slice(1, 2),
    }

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled in here, and torch's guard against it takes longer than this mode

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype is torch.bool and _is_empty(args[0]):
            return False
        out = func(*args, **(kwargs or {}))
        if func not in self._ruled_by or not any(map(_channels_last, args[self._ruled_by[func]])):
            return out
        return tuple(map(_as_channels_last, out)) if isinstance(out, tuple | list) else _as_channels_last(out)


def _is_empty(x: Tensor) -> bool:
    return x.is_meta or isinstance(x, FakeTensor)


def _channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _as_channels_last(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.dim() != 4 else torch.empty_like(x, memory_format=torch.channels_last)
