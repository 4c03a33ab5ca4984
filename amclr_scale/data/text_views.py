"""Which caption a view of a sample shows: drawn from (seed, pass, id, view), where there are several."""

from amclr_scale.data.decoding import Field, Sample
from amclr_scale.data.randomness import Draws, Purpose


def draw_captions(sample: Sample, base: Field, further: Field | None, views: int, name: tuple[int, ...]) -> list[str]:
    """The base caption and `views` further ones, which differ from it and from one another as long as there are any.

    Args:
        base: where the base caption is; of a list, one is drawn.
        further: where further captions are.
        name: of the visit: (seed, pass, id).

    Raises:
        BadSampleError: the sample has no caption there.
    """
    captions = sample.captions(base)
    seed, *visit = name
    chosen = [captions[Draws(seed, Purpose.TEXT, *visit, 0).below(len(captions))]]
    for view in range(1, views + 1):
        every = sample.captions(further or base)
        fresh = [caption for caption in every if caption not in chosen] or every
        chosen.append(fresh[Draws(seed, Purpose.TEXT, *visit, view).below(len(fresh))])
    return chosen
