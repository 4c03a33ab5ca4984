"""Shapes of the Triton kernels' tiles: a table by what a card holds, and what was measured on this machine.

A table's shapes compile and run everywhere they are used; `python tools/tune_similarity.py --save` measures others on
this card and writes the best into `tuned_file()`, which the next process reads. A run measures nothing itself: it would
wait, and choose by chance between shapes that are equally fast.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch

from amclr_scale.similarity.precision import Form
from amclr_scale.similarity.settings import Settings

Kernel = Literal["accumulate", "accumulate_columns", "weights", "sigmoid"]
Memory = Literal["interpreter", "small", "medium", "large"]  # shared memory of a multiprocessor: 99, 163, 227 KiB


@dataclass(frozen=True)
class Tile:
    """What a kernel is compiled for."""

    BM: int  # rows
    BN: int  # columns
    BK: int  # of the operands' width at a time
    warps: int
    stages: int  # of loads under way
    group: int = 8  # tiles down before the next column of them, for the cache's sake
    per_processor: int = 1  # programs that a multiprocessor holds, where it matters


WIDTH_MULTIPLE = 64  # of operands: any BK in the table divides it
INTERPRETED = Tile(BM=16, BN=32, BK=16, warps=1, stages=1, group=2)
GIVEN: dict[Kernel, Tile] = {  # similarities that a library product made, read along rows or along columns
    "accumulate": Tile(BM=16, BN=128, BK=16, warps=4, stages=1, per_processor=8),
    "accumulate_columns": Tile(BM=64, BN=32, BK=16, warps=4, stages=1, per_processor=8),
    "weights": Tile(BM=16, BN=128, BK=16, warps=4, stages=1),
    "sigmoid": Tile(BM=16, BN=128, BK=16, warps=4, stages=1),
}
NARROW: dict[Memory, dict[Kernel, Tile]] = {
    "interpreter": {
        "accumulate": INTERPRETED,
        "weights": replace(INTERPRETED, BM=32, BN=16),
        "sigmoid": replace(INTERPRETED, BM=32, BN=16),
    },
    "small": {
        "accumulate": Tile(BM=128, BN=128, BK=32, warps=8, stages=3),
        "weights": Tile(BM=128, BN=128, BK=32, warps=8, stages=3),
        "sigmoid": Tile(BM=128, BN=64, BK=32, warps=8, stages=3),
    },
    "medium": {
        "accumulate": Tile(BM=128, BN=128, BK=64, warps=8, stages=3),
        "weights": Tile(BM=128, BN=128, BK=64, warps=8, stages=3),
        "sigmoid": Tile(BM=128, BN=64, BK=64, warps=8, stages=3),
    },
    # Measured on an H100: 605 and 364 TFLOP/s at D = 512.
    "large": {
        "accumulate": Tile(BM=128, BN=256, BK=64, warps=8, stages=4),
        "weights": Tile(BM=128, BN=128, BK=64, warps=4, stages=3, per_processor=2),
        "sigmoid": Tile(BM=128, BN=128, BK=64, warps=8, stages=3),
    },
}


MEMORY: dict[tuple[int, int], Memory] = {(8, 0): "medium", (9, 0): "large", (10, 0): "large", (10, 3): "large"}
"""By compute capability; others have less."""
SPANS: dict[Form, tuple[int, int]] = {  # rows and columns; at most 256 MiB
    "bf16": (8192, 16384), "fp16": (8192, 16384), "split": (8192, 8192), "fp32": (4096, 4096), "fp64": (4096, 4096),
}  # fmt: skip


def span_shape(settings: Settings, form: Form) -> tuple[int, int]:
    """Rows and columns of weights (16-bit operands) or similarities that are in memory at once."""
    if settings.chunk != "auto":
        return settings.chunk, settings.chunk
    return SPANS[form]


def span_bytes(form: Form) -> int:
    """Memory per entry of a span, all its buffers together."""
    return {"bf16": 2, "fp16": 2, "split": 4, "fp32": 8, "fp64": 16}[form]


def memory_of(device: torch.device) -> Memory:
    """Which of the table's columns holds for a device."""
    if device.type != "cuda":
        return "interpreter"
    capability = torch.cuda.get_device_capability(device)
    return MEMORY.get(capability, "small")


def tile_of(kernel: Kernel, form: Form, width: int, device: torch.device, *, masked: bool = False) -> Tile:
    """The shape for operands of this width (P of `precision.py`); with a mask there are fewer registers left."""
    if form in ("fp32", "fp64"):
        return GIVEN[kernel]
    if masked or (kernel == "weights" and form == "split"):
        kernel = "sigmoid"  # they, too, make two things per entry, and need as many registers
    return _TRIED.get(kernel) or _narrow(kernel, width, device)


@lru_cache(maxsize=64)
def _narrow(kernel: Kernel, width: int, device: torch.device) -> Tile:
    memory = memory_of(device)
    if memory != "interpreter" and (found := _tuned().get(key(kernel, width, device))):
        return found
    return NARROW[memory][kernel]


_TRIED: dict[Kernel, Tile] = {}


@contextmanager
def trying(tiles: dict[Kernel, Tile]) -> Iterator[None]:
    """Use these shapes for 16-bit operands, in this process."""
    _TRIED.update(tiles)
    try:
        yield
    finally:
        _TRIED.clear()


def key(kernel: Kernel, width: int, device: torch.device) -> str:
    """What a measured shape was measured for; widths from 1,536 up are alike."""
    import triton

    return f"{torch.cuda.get_device_name(device)}, triton {triton.__version__}, {kernel}, {min(width, 1536)}"


def tuned_file() -> Path:
    """Where shapes are kept that were measured on this machine."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "amclr_scale" / "triton_tiles.json"


def save(found: dict[str, Tile]) -> Path:
    """Add measured shapes to those of this machine."""
    file = tuned_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    everything = _tuned() | found
    whole = file.with_suffix(f".{os.getpid()}")  # written beside and moved: another process never reads a half
    whole.write_text(json.dumps({name: asdict(tile) for name, tile in everything.items()}, indent=1) + "\n")
    whole.replace(file)
    _tuned.cache_clear()
    _narrow.cache_clear()
    return file


@lru_cache(maxsize=1)
def _tuned() -> dict[str, Tile]:
    file = tuned_file()
    if not file.exists():
        return {}
    return {name: Tile(**numbers) for name, numbers in json.loads(file.read_text()).items()}
