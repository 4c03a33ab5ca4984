"""Which samples show the same thing: further views of a sample may be other pictures of its group."""

from collections.abc import Hashable, Iterable

from amclr_scale.data.randomness import Draws


class Groups:
    """Samples by what they say they show.

    Args:
        values: what each sample says, by id; None: nothing, or it has no picture.

    Attributes:
        alone: how many samples with a picture share their group with nobody.
    """

    def __init__(self, values: Iterable[Hashable | None]):
        members: dict[tuple[str, Hashable], list[int]] = {}
        self._group: list[list[int]] = []
        for sample, value in enumerate(values):
            group = members.setdefault(("alone", sample) if value is None else ("group", value), [])
            group.append(sample)
            self._group.append(group)
        self.alone = sum(len(group) == 1 and key[0] == "group" for key, group in members.items())

    def other(self, sample: int, taken: Iterable[int], draws: Draws) -> int:
        """Another sample of the group, each as often as any; one that is not taken yet as long as there are such.

        The sample itself where it is alone.
        """
        others = [one for one in self._group[sample] if one != sample]
        fresh = [one for one in others if one not in set(taken)] or others
        return fresh[draws.below(len(fresh))] if fresh else sample
