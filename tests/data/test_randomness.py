"""Draws are what their names say, for ever."""

import numpy as np

from amclr_scale.data.randomness import Draws, Purpose, mix, permutation, random_words


def test_the_numbers_never_change():
    """They are part of every recipe: a change here changes every run, so it must be meant."""
    assert mix(0, Purpose.IMAGE, 3, 12345, 1) == 0x1F615D76CAB168FB
    assert permutation(10, 0, Purpose.SHARD_ORDER, 0).tolist() == [6, 3, 1, 5, 4, 0, 8, 2, 7, 9]


def test_one_by_one_is_all_at_once():
    draws = Draws(7, 2, -1)
    assert [draws.bits() for _ in range(50)] == random_words(50, 7, 2, -1).tolist()


def test_neighbouring_names_have_nothing_in_common():
    """Means, correlations and bit flips of names that differ by one."""
    first = np.array([Draws(0, Purpose.IMAGE, epoch, i).uniform() for epoch in range(2) for i in range(20000)])
    assert abs(first.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(first[:20000], first[20000:])[0, 1]) < 0.02
    flips = np.mean([(mix(0, i) ^ mix(0, i + 1)).bit_count() for i in range(2000)])
    assert 31 < flips < 33


def test_permutations_are_uniform():
    """Each of the 24 permutations of four comes up about equally often."""
    found = [tuple(permutation(4, 0, n).tolist()) for n in range(24000)]
    counts = np.unique(found, axis=0, return_counts=True)[1]
    chi_squared = ((counts - 1000) ** 2 / 1000).sum()
    assert len(counts) == 24
    assert chi_squared < 49.7  # 0.1 % of uniform ones are above, with 23 degrees of freedom


def test_below_stays_below():
    draws = Draws(1)
    found = {draws.below(3) for _ in range(200)}
    assert found == {0, 1, 2}
