"""The keys of `execution` that the search decides, and a configuration with other values of them."""

from collections.abc import Callable
from typing import Any

from amclr_scale.config.schema import Config

# What the search decides, as keys of execution.
KEYS = (
    "zero_stage", "offload", "recompute_image", "recompute_text", "micro_batch_size", "kept_micro_batches",
    "similarity.gather", "similarity.chunk",
)  # fmt: skip


def changed(config: Config, **settings: Any) -> Config:
    """The configuration with these keys of `execution`; `similarity.gather` and the like are keys too. Not checked."""
    own = {key: value for key, value in settings.items() if "." not in key}
    inner = {key.partition(".")[2]: value for key, value in settings.items() if "." in key}
    execution = config.execution
    if inner:
        own["similarity"] = execution.similarity.model_copy(update=inner)
    return config.model_copy(update={"execution": execution.model_copy(update=own)})


def with_batch(config: Config, global_batch_size: int) -> Config:
    """The configuration with another global batch size. Not checked."""
    return config.model_copy(update={"train": config.train.model_copy(update={"global_batch_size": global_batch_size})})


def settings_of(config: Config) -> dict[str, Any]:
    """The keys that the search decides, with their values."""
    execution = config.execution
    return {
        key: getattr(execution.similarity, key.partition(".")[2]) if "." in key else getattr(execution, key)
        for key in KEYS
    }


def largest_number(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number between `low`, which is taken to fit, and `high` that fits."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
