"""What our own operations are, in integers, so that every executor gives the same bytes on every device.

Blur and noise have no reference to the last bit: a float32 convolution may be summed in any order, and logarithms and
cosines end differently on CPUs and GPUs. Here their weights and their distribution are tables of integers, made on the
host, and what is left for an executor is to add, to shift and to look up.
"""

import math
from functools import cache, lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from amclr_scale.data.augmentation.plans import Box, centred_box

BLUR_BITS = 23  # so many and the 8 of a level stay within 31
NOISE_BITS = 16  # four places in the table from a word of 64


def blur_weights(deviation: float) -> tuple[int, int, int]:
    """(of the centre, of each of four edges, of each of four corners) of a Gaussian on 3 x 3 pixels.

    They sum to 2**BLUR_BITS. A blur is the weighted sum over 2**BLUR_BITS, half rounded up. Beyond the border lie the
    pixels before it, as in a mirror on the outermost ones (a single pixel mirrors itself). What rounding the weights
    changes is a 3,000th of a grey level: a last bit, where the sum lies that close to a half.

    Args:
        deviation: in pixels.
    """
    side = math.exp(-0.5 / deviation**2)
    unit = 2**BLUR_BITS / (1 + 2 * side) ** 2
    edge, corner = round(unit * side), round(unit * side * side)
    return 2**BLUR_BITS - 4 * edge - 4 * corner, edge, corner


@cache
def _quantiles() -> NDArray[np.float64]:
    """(2**NOISE_BITS,): those of the standard normal distribution in the middle of steps of equal probability.

    Scaled to a variance of one, of which the cut tails would take 0.006%: no value is beyond 4.4.
    """
    normal, half = NormalDist(), 2 ** (NOISE_BITS - 1)
    upper = np.array([normal.inv_cdf(0.5 + (step + 0.5) / (2 * half)) for step in range(half)])
    both = np.concatenate([-upper[::-1], upper])
    return np.asarray(both / np.sqrt(np.mean(both * both)))


@lru_cache(maxsize=64)
def noise_table(deviation: float) -> NDArray[np.int16]:
    """(2**NOISE_BITS,): grey levels to add, all equally likely, by 16 random bits.

    They are Gaussian with that standard deviation (in units of the full range), rounded. The random bits of channel c
    at row y and column x are the k-th 16, from the lowest, of the words of the operation's seed one after another, with
    k = (y * width + x) * 3 + c. Sums are clamped to 0 .. 255.
    """
    return np.clip(np.rint(255 * deviation * _quantiles()), -255, 255).astype(np.int16)


def central_box(side: int, stays: float) -> Box:
    """The pixels that a central crop leaves of side x side."""
    return centred_box(side, side, int(stays), int(stays))
