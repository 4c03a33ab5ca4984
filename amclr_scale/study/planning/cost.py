"""What a cell costs: operations and memory, from its configuration alone.

Useful operations count every sample once, forward and backward: 3 x the forward of both towers with all views, and
8 B D per anchor for each B x B matrix of similarities (2 D in forward, 6 D in backward, for each of B keys). What a
gradient cache or recomputation does again is a choice of execution and not counted: it appears in hours.
"""

from functools import lru_cache
from typing import Literal

from amclr_scale.config.schema import Config


def views(config: Config) -> int:
    """omega: further views per modality that the objective contrasts."""
    return int(config.objective.get("omega") or 0)


def matrices(config: Config) -> int:
    """B x B matrices of similarities per step: all pairings of views, and in xAmCLR those inside each modality."""
    omega = views(config)
    return (1 + omega) ** 2 + (2 * omega if config.objective["name"].startswith("xamclr") else 0)


def encoder_cost(config: Config) -> float:
    """Forward passes of both towers per sample, relative to one view of each."""
    return (2 + config.data.image_views + config.data.text_views) / 2


def encoder_flops(config: Config) -> float:
    """Useful operations of both towers per sample, all of its views."""
    data = config.data.model_copy(update={"image_views": 0, "text_views": 0})  # traced once for all arms
    image, text = _forward(Config(data=data, model=config.model).model_dump_json())
    return 3 * (image * (1 + config.data.image_views) + text * (1 + config.data.text_views))


@lru_cache(maxsize=32)
def _forward(config: str) -> tuple[float, float]:
    from amclr_scale.memory.towers import trace  # seconds of imports, which only this needs

    parsed = Config.model_validate_json(config)
    return trace(parsed, "image").flops, trace(parsed, "text").flops


def pairwise_flops(config: Config) -> float:
    """Useful operations of the similarities per sample."""
    group = config.objective.get("group_size") or config.train.global_batch_size
    return 8.0 * matrices(config) * group * config.model.embedding_width


def peak_gib(config: Config, *, ranks: int, num_samples: int, device: Literal["cpu", "cuda"]) -> float:
    """Predicted peak memory per rank.

    Args:
        config: with its `execution`.
        ranks: W.
        num_samples: N.
        device: where it will run.
    """
    import torch

    from amclr_scale.memory.account import account

    found = account(config, world_size=ranks, num_samples=num_samples, device=torch.device(device))
    return float(found.peak_bytes) / 2**30
