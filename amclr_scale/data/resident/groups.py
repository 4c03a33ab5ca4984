"""Which samples show the same thing: further views of a sample may be other pictures of its group."""

from collections.abc import Hashable, Iterable
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from amclr_scale.data.randomness import Draws, ManyDraws, Purpose
from amclr_scale.errors import UserError


class Groups:
    """Samples by what they say they show.

    Args:
        values: what each sample says, by id; None: nothing, or it has no picture.

    Attributes:
        alone: how many samples with a picture share their group with nobody.
        silent: how many say nothing, or have no picture.
    """

    def __init__(self, values: Iterable[Hashable | None]):
        members: dict[tuple[str, Hashable], list[int]] = {}
        for sample, value in enumerate(values):
            members.setdefault(("alone", sample) if value is None else ("group", value), []).append(sample)
        self.alone = sum(len(group) == 1 and key[0] == "group" for key, group in members.items())
        self.silent = sum(key[0] == "alone" for key in members)
        # Group after group, each by id; of every sample, where its group begins, how many that has, its place there.
        self._members = np.fromiter(chain.from_iterable(members.values()), np.int64)
        sizes = np.fromiter(map(len, members.values()), np.int64, len(members))
        firsts = np.cumsum(sizes) - sizes
        self._first, self._size, self._place = (np.empty_like(self._members) for _ in range(3))
        self._first[self._members], self._size[self._members] = np.repeat(firsts, sizes), np.repeat(sizes, sizes)
        self._place[self._members] = np.arange(len(self._members)) - np.repeat(firsts, sizes)

    def checked(self, place: str) -> str:
        """What the log should say of samples without others, whose field is `place`.

        Raises:
            UserError: all are.
        """
        total, alone, silent = len(self._members), self.alone, self.silent
        if alone + silent == total:
            raise UserError(
                f"data.image_group: expected a place where several samples have the same, got {place}: of {total:,}, "
                f"{silent:,} have nothing there, or no picture, and {alone:,} what no other has"
            )
        others = f", and {silent:,} have nothing there, or no picture" if silent else ""
        return (
            f"data: {alone:,} of {total:,} samples are alone in their data.image_group{others}; their further views "
            "are of their own image"
        )

    def sources(self, sample: int, further: int, seed: int, number: int) -> list[int]:
        """The sample, and for each of its further views the one whose picture that shows.

        Args:
            further: V.
            number: of a pass.
        """
        found = [sample]
        for view in range(1, 1 + further):
            found.append(self.other(sample, found, Draws(seed, Purpose.GROUP, number, sample, view)))
        return found

    def other(self, sample: int, taken: Iterable[int], draws: Draws) -> int:
        """Another sample of the group, each as often as any; one that is not taken yet as long as there are such.

        The sample itself where it is alone.
        """
        used = sorted({int(self._place[one]) for one in {sample, *taken}})
        size = int(self._size[sample])
        if len(used) == size:  # all are taken
            used = [int(self._place[sample])]
        if len(used) == size:
            return sample
        place = draws.below(size - len(used))
        for one in used:
            place += place >= one
        return int(self._members[self._first[sample] + place])

    def all_sources(
        self, samples: NDArray[np.int64], further: int, seed: int, numbers: NDArray[np.int64]
    ) -> list[NDArray[np.int64]]:
        """`sources` of many samples at once: (n,) for each view.

        Args:
            numbers: (n,), of passes.
        """
        found, own = [samples], self._place[samples]
        first, size, places = self._first[samples], self._size[samples], own[:, None]
        for view in range(1, 1 + further):
            used = np.sort(places, 1)
            once = np.diff(used, axis=1, prepend=-1) > 0  # a place is taken twice where all were
            full = once.sum(1) == size
            used[full], once[full] = own[full, None], np.arange(view) == 0
            fresh = size - once.sum(1)
            place = ManyDraws(seed, Purpose.GROUP, numbers, samples, view).below(fresh)
            for taken, counts in zip(used.T, once.T, strict=True):
                place += counts & (place >= taken)
            place = np.where(fresh > 0, place, own)
            found.append(self._members[first + place])
            places = np.concatenate([places, place[:, None]], 1)
        return found
