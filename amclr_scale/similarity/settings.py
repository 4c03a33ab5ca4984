"""How similarities are computed on this machine. None of it changes an answer beyond rounding.

    configure(chunk=1024)             for the process, once, at the start
    with using(gather="ring"): ...    for a block of code

An objective's forward reads the settings once and its backward, which may run in another thread, uses the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from amclr_scale.config.backends import SIMILARITY_BACKENDS

Gather = Literal["all", "ring"]
Precision = Literal["auto", "fp32", "split", "bf16"]
RunPrecision = Literal["fp32", "tf32", "amp_bf16", "bf16", "fp16"]
Distribution = Literal["auto", "reduce_scatter", "column_sums", "two_blocks"]


@dataclass(frozen=True)
class Settings:
    """The `execution.similarity` part of a configuration."""

    chunk: Literal["auto"] | int = "auto"
    """Rows of similarities alive at once; `contrast`, `pairwise` and `top_k` use tiles of chunk x chunk."""

    gather: Gather = "all"
    """`all`: every rank holds all keys, memory O(B D). `ring`: keys travel from rank to rank, memory O(b D)."""

    backend: str = "auto"
    """Who computes a block: `torch` everywhere; `triton`, fused kernels, on CUDA; or one that was added. `auto`: triton
    where it can."""

    precision: Precision = "auto"
    """Of the operands of matrix products (`precision.py`): `fp32`; `bf16`, rounded; `split`, three bfloat16 products
    for one. `auto`: the features' own on CUDA; for float32 features, `fp32` in a run of fp32 or tf32,
    else `split`."""

    run_precision: RunPrecision = "fp32"
    """Of the towers that make the features. Read by `precision="auto"` only: towers hand out float32 rows always."""

    distribution: Distribution = "auto"
    """Who computes what on several ranks, in products of 2 b B D operations per rank and step:
    `reduce_scatter` 4, reduces B x D key gradients; `column_sums` 5 and `two_blocks` 6, no feature gradient crosses
    ranks. `auto` follows the rule in `distribution.py`."""

    cache_bytes: int = 0
    """Memory that may hold blocks of similarities from forward to backward, which then need not be made again."""

    def __post_init__(self) -> None:
        if self.chunk != "auto" and (isinstance(self.chunk, bool) or not isinstance(self.chunk, int) or self.chunk < 1):
            raise ValueError(f"chunk: expected 'auto' or a positive number of rows, got {self.chunk!r}")
        for name, kind in (
            ("gather", get_args(Gather)), ("backend", ("auto", *sorted(SIMILARITY_BACKENDS))),
            ("precision", get_args(Precision)), ("run_precision", get_args(RunPrecision)),
            ("distribution", get_args(Distribution)),
        ):  # fmt: skip
            if getattr(self, name) not in kind:
                raise ValueError(f"{name}: expected one of {', '.join(kind)}, got {getattr(self, name)!r}")
        if isinstance(self.cache_bytes, bool) or not isinstance(self.cache_bytes, int) or self.cache_bytes < 0:
            raise ValueError(f"cache_bytes: expected a number of bytes, 0 or more, got {self.cache_bytes!r}")


class _Process:
    settings = Settings()


_block: ContextVar[Settings | None] = ContextVar("amclr_scale_similarity_settings", default=None)


def current() -> Settings:
    """The settings in force here."""
    return _block.get() or _Process.settings


def configure(**changes: Any) -> Settings:
    """Change the settings of the process; returns them.

    Raises:
        ValueError: no such setting, or a value it cannot have.
    """
    _Process.settings = _changed(_Process.settings, changes)
    return _Process.settings


@contextmanager
def using(**changes: Any) -> Iterator[Settings]:
    """Change the settings inside a `with` block of this thread (or task)."""
    token = _block.set(_changed(current(), changes))
    try:
        yield current()
    finally:
        _block.reset(token)


def _changed(settings: Settings, changes: dict[str, Any]) -> Settings:
    known = [field.name for field in fields(Settings)]
    for name in changes:
        if name not in known:
            raise ValueError(f"{name}: no such similarity setting; there are {', '.join(known)}")
    return replace(settings, **changes)
