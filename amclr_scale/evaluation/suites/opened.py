"""A data set of a suite, opened by its kind: what it is made of, and how it is measured."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from amclr_scale.config.schema import Data, Evaluation
from amclr_scale.data.reading import Reading, reading_of, square_view
from amclr_scale.evaluation.encode import Encode
from amclr_scale.evaluation.numbers import Number
from amclr_scale.evaluation.suites.catalogue import DataSet
from amclr_scale.evaluation.suites.files import Files

# Numbers with their items (see numbers.py), and numbers without: sizes, what has no items.
Measured = tuple[dict[str, Number], dict[str, float]]


@dataclass(frozen=True)
class Place:
    """A data set that was found.

    Attributes:
        path: its file or folder.
        root: the folder of --data.
        reading: how the model reads pictures and captions, where it is not as `data` and `options` say.
    """

    one: DataSet
    path: Path
    root: Path
    data: Data
    options: Evaluation
    own_reading: Reading | None
    rank: int
    world_size: int

    @property
    def reading(self) -> Reading:
        """How the model reads pictures and captions."""
        return reading_for(self.data, self.options, self.own_reading)


def reading_for(data: Data, options: Evaluation, own: Reading | None) -> Reading:
    """How a model reads pictures and captions.

    Args:
        own: its own way, where it has one; `evaluation.resize=squash` changes how that makes a square.
    """
    squash = options.resize == "squash"
    if own is None:
        return reading_of(data, squash=squash)
    return replace(own, view=square_view(data.image_size, squash=True)) if squash else own


@dataclass(frozen=True)
class Opened:
    """A data set, ready to be measured. All ranks measure it together.

    Attributes:
        files: all that its numbers depend on.
        items: how many samples it has.
        encoded: images and texts that this rank encodes.
        measure: a model -> numbers.
        words: what is worth saying beside the numbers, such as the first prompts.
    """

    files: Files
    items: int
    encoded: int
    measure: Callable[[Encode], Measured]
    words: str = ""
