"""Courses as functions of samples seen, so that runs of different batch size follow one curve."""

import math

from amclr_scale.config.schema import Momentum, Optimizer


def peak_learning_rate(optimizer: Optimizer, global_batch_size: int) -> float:
    """`optimizer.lr`, scaled to the batch size as `lr_rule` says."""
    ratio = global_batch_size / optimizer.lr_reference_batch
    return optimizer.lr * {"none": 1.0, "sqrt": math.sqrt(ratio), "linear": ratio}[optimizer.lr_rule]


def learning_rate(optimizer: Optimizer, samples: float, total_samples: float, global_batch_size: int) -> float:
    """The learning rate at `samples` of `total_samples`: linear warm-up from 0, then cosine, steps, flat or flattening.

    The inverse square root is that of Zhai et al., "Scaling Vision Transformers", CVPR 2022, arXiv:2106.04560; a
    constant rate with a cooldown, linear or by 1 - sqrt(s), that of Haegele et al., "Scaling Laws and Compute-Optimal
    Training Beyond Fixed Training Durations", NeurIPS 2024, arXiv:2405.18392.

    A step of B samples uses the value in its middle, `samples_seen + B / 2`: neither its first step nor its last one
    is lost to a rate of zero, and the sum over all samples does not depend on B to first order.
    """
    peak = peak_learning_rate(optimizer, global_batch_size)
    if samples < optimizer.warmup_samples:
        return peak * samples / optimizer.warmup_samples
    match optimizer.schedule:
        case "constant":
            return _cooled(optimizer, peak, samples, total_samples)
        case "inverse_sqrt":
            timescale = optimizer.timescale_samples or optimizer.warmup_samples
            rate = peak / math.sqrt(1 + (samples - optimizer.warmup_samples) / timescale)
            return _cooled(optimizer, max(rate, optimizer.min_lr), samples, total_samples)
        case "step":
            return peak * optimizer.step_factor ** sum(samples >= at for at in optimizer.step_samples)
        case "cosine":
            done = (samples - optimizer.warmup_samples) / max(1.0, total_samples - optimizer.warmup_samples)
            return optimizer.min_lr + (peak - optimizer.min_lr) * (1 + math.cos(math.pi * min(1.0, done))) / 2


def _cooled(optimizer: Optimizer, rate: float, samples: float, total_samples: float) -> float:
    """What a rate is within the cooldown at the end of the run."""
    begin = max(optimizer.warmup_samples, total_samples - optimizer.cooldown_samples)
    if samples <= begin or not optimizer.cooldown_samples:
        return rate
    done = min(1.0, (samples - begin) / max(1.0, total_samples - begin))
    share = 1 - (done if optimizer.cooldown_shape == "linear" else math.sqrt(done))
    return optimizer.min_lr + (rate - optimizer.min_lr) * share


def averaging_decay(momentum: Momentum, done: float) -> float:
    """The decay m of the moving average of the weights, at a share `done` of the run."""
    if momentum.decay_schedule == "constant" or momentum.start_decay is None:
        return momentum.decay
    return momentum.decay - (momentum.decay - momentum.start_decay) * (1 + math.cos(math.pi * min(1.0, done))) / 2
