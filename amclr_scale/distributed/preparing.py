"""How far this rank is with what takes long before ranks meet: the others wait for one that gets on. Imports no torch.

Whoever fetches, unpacks or reads many files says so here, by a count that grows; a rank that hangs counts no further.
"""

from dataclasses import dataclass, field


@dataclass
class Work:
    """What is being done, and how much of each kind has been done so far."""

    what: str = ""
    done: dict[str, int] = field(default_factory=dict)

    def advance(self, what: str, by: int = 1) -> None:
        """Some more is done.

        Args:
            what: in words for people, such as `shards indexed`.
        """
        self.done[what] = self.done.get(what, 0) + by
        self.what = what

    def words(self) -> str:
        """`12,000 shards indexed`; "" where nothing has been done."""
        return f"{self.done[self.what]:,} {self.what}" if self.what else ""


HERE = Work()  # this process's
advance = HERE.advance
