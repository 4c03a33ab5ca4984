"""Random numbers that are a function of what they are for: the same on every rank, worker, platform and version.

A draw is named by integers, such as (seed, purpose, epoch, id, view). The name is hashed to 64 bits, and the k-th
number of that name is splitmix64 of (hash + k):

    Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.

Library generators promise neither the same permutation in the next release nor a cheap start, and a recipe that is
resumed next year needs the first while one start per image needs the second. All arithmetic is exact, modulo 2**64.
"""

import enum

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


class Purpose(enum.IntEnum):
    """What a draw is for. The values are part of the recipe: changing one changes every run."""

    SHARD_ORDER = 1
    SAMPLE_ORDER = 2
    IMAGE = 3
    TEXT = 4
    REPLACEMENT = 5
    WORDS = 6
    GROUP = 7
    NEGATIVE = 8
    NEGATIVE_IMAGE = 9
    COMMUNITY_ORDER = 10
    COMMUNITIES = 11


def _finalise(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def mix(*words: int) -> int:
    """One 64-bit hash of some integers; their order matters."""
    state = 0
    for word in words:
        state = _finalise(((state ^ (word & _MASK)) + _GOLDEN) & _MASK)
    return state


class Draws:
    """The endless sequence of random numbers that belongs to a name."""

    def __init__(self, *name: int):
        self._state = mix(*name)

    def bits(self) -> int:
        """The next 64 bits."""
        self._state = (self._state + _GOLDEN) & _MASK
        return _finalise(self._state)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """Uniform in [low, high)."""
        return low + (high - low) * ((self.bits() >> 11) * 2.0**-53)

    def below(self, n: int) -> int:
        """Uniform in 0 .. n - 1 (bias below n / 2**64)."""
        return (self.bits() * n) >> 64

    def chance(self, probability: float) -> bool:
        """True with that probability."""
        return self.uniform() < probability


def _all_finalised(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def random_words(n: int, *name: int) -> NDArray[np.uint64]:
    """The first n numbers of `Draws(*name)`, at once: (n,) uint64."""
    return _all_finalised(np.uint64(mix(*name)) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(_GOLDEN))


class ManyDraws:
    """`Draws` of many names at once.

    Args:
        name: as of one; some of its integers are (n,) arrays.
    """

    def __init__(self, *name: int | NDArray[np.int64]):
        self._state: NDArray[np.uint64] = np.zeros(1, np.uint64)
        for word in name:
            bits = np.uint64(word & _MASK) if isinstance(word, int) else word.astype(np.uint64)
            self._state = _all_finalised((self._state ^ bits) + np.uint64(_GOLDEN))

    def below(self, n: NDArray[np.int64], number: int | NDArray[np.int64] = 1) -> NDArray[np.int64]:
        """What the `number`-th call of `below(n)` gives, of each name.

        Args:
            n: (n,), below 2**32.
            number: from 1.
        """
        words = _all_finalised(self._state + np.asarray(number, np.uint64) * np.uint64(_GOLDEN))
        # The upper half of a product of 128 bits, from two of 64.
        half, limits = np.uint64(32), n.astype(np.uint64)
        lower = ((words & np.uint64(0xFFFFFFFF)) * limits) >> half
        found: NDArray[np.int64] = (((words >> half) * limits + lower) >> half).astype(np.int64)
        return found


def permutation(n: int, *name: int) -> NDArray[np.int64]:
    """A uniform permutation of 0 .. n - 1: the ranks of n random words (ties broken by position)."""
    return np.argsort(random_words(n, *name), kind="stable").astype(np.int64)
