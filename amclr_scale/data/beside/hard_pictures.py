"""Pictures that a sample's caption does not show, though they look like it: hard negatives, in members of the sample.

Drawn, and augmented as the base view is, from (seed, pass, id, which one): the same on any number of ranks and workers.
A sample that has fewer of them than are asked for has no more, which is said, not papered over; one that is damaged
makes the sample one that cannot be used, as a damaged image of its own does.
"""

from PIL import Image

from amclr_scale.config import schema
from amclr_scale.data.decoding import Sample, decode
from amclr_scale.data.image_views import reduction_for
from amclr_scale.data.randomness import Draws, Purpose


class HardPictures:
    """The wrong pictures of a recipe: `data.image_negatives` of each sample, from members `data.image_negative`."""

    def __init__(self, data: schema.Data):
        self.count, self.size, self.recipe = data.image_negatives, data.image_size, data.augmentation
        named = [data.image_negative] if isinstance(data.image_negative, str) else data.image_negative
        self.members = tuple(name.lower() for name in named) if self.count else ()

    def there(self, sample: Sample) -> list[str]:
        """Which of the members a sample has."""
        return [name for name in self.members if name in sample.members]

    def draw(self, sample: Sample, seed: int, number: int, name: int) -> list[tuple[Image.Image, Draws] | None]:
        """So many decoded pictures, each of another member, with what their views draw from; None: there are no more.

        Args:
            number: of a pass.
            name: of the sample.

        Raises:
            BadSampleError: one cannot be read.
        """
        left, chosen = self.there(sample), list[tuple[Image.Image, Draws] | None]()
        for which in range(self.count):
            draws = Draws(seed, Purpose.NEGATIVE_IMAGE, number, name, which)
            if not left:
                chosen.append(None)
                continue
            opened = sample.image(left.pop(draws.below(len(left))))
            chosen.append((decode(opened, reduction_for(opened, self.size, [self.recipe])), draws))
        return chosen
