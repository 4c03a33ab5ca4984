"""Learning rates as functions of samples seen, so that runs of different batch size follow one curve."""

import math

from amclr_scale.config.schema import Optimizer


def learning_rate(optimizer: Optimizer, samples: float, total_samples: float) -> float:
    """The learning rate at `samples` of `total_samples`: linear warm-up from 0, then cosine to `min_lr`, or constant.

    A step of B samples uses the value in its middle, `samples_seen + B / 2`: neither its first step nor its last one
    is lost to a rate of zero, and the sum of all steps does not depend on B to first order.
    """
    if samples < optimizer.warmup_samples:
        return optimizer.lr * samples / optimizer.warmup_samples
    if optimizer.schedule == "constant":
        return optimizer.lr
    done = (samples - optimizer.warmup_samples) / max(1.0, total_samples - optimizer.warmup_samples)
    return optimizer.min_lr + (optimizer.lr - optimizer.min_lr) * (1 + math.cos(math.pi * min(1.0, done))) / 2
