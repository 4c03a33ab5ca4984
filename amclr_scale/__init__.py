"""Distributed large-batch contrastive learning: write the recipe once, run it on a laptop or on 64 nodes."""

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from amclr_scale.engine.own_loop import GradientCache
    from amclr_scale.trained.model import load

__all__ = ["GradientCache", "load"]


def __getattr__(name: str) -> Any:
    """What is imported when it is asked for: checking a configuration needs no torch."""
    if name == "load":
        from amclr_scale.trained.model import load

        return load
    if name == "GradientCache":
        from amclr_scale.engine.own_loop import GradientCache

        return GradientCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
