"""Which samples show the same thing: further views of a sample may be other pictures of its group."""

from collections.abc import Hashable, Iterable

from amclr_scale.data.randomness import Draws, Purpose
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
        self._group: list[list[int]] = []
        for sample, value in enumerate(values):
            group = members.setdefault(("alone", sample) if value is None else ("group", value), [])
            group.append(sample)
            self._group.append(group)
        self.alone = sum(len(group) == 1 and key[0] == "group" for key, group in members.items())
        self.silent = sum(key[0] == "alone" for key in members)

    def checked(self, place: str) -> str:
        """What the log should say of samples without others, whose field is `place`.

        Raises:
            UserError: all are.
        """
        total, alone, silent = len(self._group), self.alone, self.silent
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
        used = {sample, *taken}
        fresh = [one for one in self._group[sample] if one not in used]
        fresh = fresh or [one for one in self._group[sample] if one != sample]
        return fresh[draws.below(len(fresh))] if fresh else sample
