"""Gradients of many micro-batches, summed in fp32 where parameters are bf16 or fp16.

Left alone, each backward adds to `parameter.grad` in the parameter's own type. The sum of n such gradients is rounded n
times, and once it is 256 times larger than what is added, bf16 no longer grows at all: a step would depend on the size
of its micro-batches. Here each gradient is taken out of `parameter.grad` as soon as it is there, added to an fp32 sum,
and freed; at the end the sums go back into `parameter.grad`, rounded once. So 4 bytes per element are held instead of
2, and for no longer than the second pass.

Works between a backward and DeepSpeed's one exchange of gradients (`coalesce_grad_reduction`), at stages 1 to 3: until
then DeepSpeed does not look at `parameter.grad`. A gradient that is not finite stays so in the sum, and a sum that is
too large for fp16 becomes infinite on its way back: the loss scaler sees both. fp32 and float64 are left alone.

On CUDA small gradients wait until there are `AT_ONCE` elements of them, or the backward ends, and are added by two
multi-tensor launches instead of one launch each: it is the host that a GPU waits for with small micro-batches.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from amclr_scale.precision import HALF

AT_ONCE = 2**23  # elements that wait to be added together on CUDA, and are widened together


class GradientSums:
    """`with sums:` around the backward passes of one step, inside the exchange.

    Args:
        parameters: of which those in half precision are summed. They may be partitioned (stage 3).
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self._parameters: list[Any] = [p for p in parameters if p.requires_grad and p.dtype in HALF]
        self._active = False
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []  # (sum, gradient)
        self._elements = 0  # of them
        for parameter in self._parameters:
            parameter.fp32_gradient_sum = None
            parameter.register_post_accumulate_grad_hook(self._take)

    def __enter__(self) -> None:
        self._active = True

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.flush()
        self._active = False
        for parameter in self._parameters:
            total, parameter.fp32_gradient_sum = parameter.fp32_gradient_sum, None
            if total is not None and kind is None:
                parameter.grad = torch.empty_like(parameter)
                parameter.grad.data = total.to(parameter.dtype)  # of the whole shape, which a partitioned one has not

    def _take(self, parameter: Any) -> None:
        """After each backward: what it left in `parameter.grad` moves into the sum."""
        if not self._active:
            return
        gradient, parameter.grad = parameter.grad, None
        if parameter.fp32_gradient_sum is None:
            parameter.fp32_gradient_sum = gradient.float()
        elif not self._may_wait(gradient):
            parameter.fp32_gradient_sum.add_(gradient)
        else:
            self._waiting.append((parameter.fp32_gradient_sum, gradient))
            self._elements += gradient.numel()
            if self._elements > AT_ONCE:
                self.flush()

    def _may_wait(self, gradient: torch.Tensor) -> bool:
        return gradient.is_cuda and gradient.numel() <= AT_ONCE // 8

    @torch.no_grad()
    def flush(self) -> None:
        """Add what waits. To be called after each backward: a sum that waits twice would be added to once."""
        if not self._waiting:
            return
        sums, gradients = (list(each) for each in zip(*self._waiting, strict=True))
        self._waiting, self._elements = [], 0
        widened = [torch.empty_like(total) for total in sums]
        torch._foreach_copy_(widened, gradients)
        torch._foreach_add_(sums, widened)


def held_gradient(parameter: Any) -> torch.Tensor | None:
    """The gradient of a parameter between two backward passes: its fp32 sum where there is one."""
    summed: torch.Tensor | None = getattr(parameter, "fp32_gradient_sum", None)
    return parameter.grad if summed is None else summed
