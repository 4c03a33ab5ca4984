"""What a run computes in, by the names of `execution.precision`.

    name       weights of the model    products in the towers              beside them
    fp32       float32                 float32
    tf32       float32                 operands rounded to TF32's 10 bits  CUDA alone, compute capability 8.0 and later
    amp_bf16   float32                 bfloat16, by torch.autocast         open_clip's default
    bf16       bfloat16                bfloat16                            fp32 masters, which ZeRO keeps
    fp16       float16                 float16                             fp32 masters, and a scaled loss

Similarities, log-sums, objectives and what they train compute in float32 or better, whatever the towers do.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

DTYPES = {
    "fp32": torch.float32, "tf32": torch.float32, "amp_bf16": torch.float32, "bf16": torch.bfloat16,
    "fp16": torch.float16,
}  # fmt: skip
HALF = (torch.bfloat16, torch.float16)

PRODUCTS = {"fp32": "fp32", "tf32": "tf32", "amp_bf16": "bf16", "bf16": "bf16", "fp16": "fp16"}
"""In which precision a device multiplies matrices."""

TF32_SINCE = (8, 0)  # compute capability


@contextmanager
def products_of(precision: str, device: torch.device) -> Iterator[None]:
    """Inside it products are made as `precision` says; for a type of its own, the operands' type says it already.

    amp_bf16: autocast without its cache of cast weights. Every weight of a tower is used once in a forward, so that the
    cache would save nothing and hold 2 bytes of each until the forward ends; and where a weight is used more than once,
    the gradients of its uses are added in float32 rather than in bfloat16.

    The backward of what ran inside needs this for tf32 alone: autocast's casts are part of the graph.
    """
    if precision == "amp_bf16":
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            yield
    elif precision == "tf32":
        backends: tuple[Any, ...] = torch.backends.cuda.matmul, torch.backends.cudnn
        before = [backend.allow_tf32 for backend in backends]
        try:
            for backend in backends:
                backend.allow_tf32 = True
            yield
        finally:
            for backend, allowed in zip(backends, before, strict=True):
                backend.allow_tf32 = allowed
    else:
        yield


@contextmanager
def full_float32() -> Iterator[None]:
    """Inside it, products of float32 are of float32: no TF32 on CUDA, no bfloat16 on CPUs."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def has_tf32(device: torch.device) -> bool:
    """Whether a device multiplies in TF32."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= TF32_SINCE
