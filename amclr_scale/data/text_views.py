"""Which captions the views of a sample show: drawn from (seed, pass, id, view), where there are several.

Word-level changes follow Wei and Zou, "EDA: Easy Data Augmentation Techniques for Boosting Performance on Text
Classification Tasks", EMNLP 2019, arXiv:1901.11196, with a table of synonyms given by the user.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from amclr_scale.config import schema
from amclr_scale.data.decoding import Field, Sample
from amclr_scale.data.randomness import Draws, Purpose
from amclr_scale.errors import UserError

Synonyms = Mapping[str, Sequence[str]]


def load_synonyms(recipe: schema.TextAugmentation) -> Synonyms:
    """The table that a recipe names; empty where it needs none.

    Raises:
        UserError: there is none, or it is not a table of synonyms.
    """
    if not recipe.synonym:
        return {}
    if recipe.synonyms is None:
        raise UserError("data.text_augmentation.synonyms: expected a JSON file, since synonym is not 0, got none")
    try:
        table = json.loads(Path(recipe.synonyms).expanduser().read_text("utf-8"))
        return {str(word).lower(): [str(other) for other in others] for word, others in table.items() if others}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"data.text_augmentation.synonyms: {recipe.synonyms}: expected JSON such as "
            f'{{"couch": ["sofa"]}}, got {error}'
        ) from error


def change_words(caption: str, recipe: schema.TextAugmentation, synonyms: Synonyms, draws: Draws) -> str:
    """Synonyms first, then exchanges, then omissions."""
    words = caption.split()
    for i, word in enumerate(words):
        others = synonyms.get(word.lower())
        if others and draws.chance(recipe.synonym):
            words[i] = others[draws.below(len(others))]
    for i in range(len(words) - 1):
        if draws.chance(recipe.swap):
            words[i], words[i + 1] = words[i + 1], words[i]
    kept = [word for word in words if not draws.chance(recipe.drop)]
    return " ".join(kept or words[draws.below(len(words)) :][:1])


def parse_places(places: str | Sequence[str]) -> list[Field]:
    """The fields that a key of the recipe names: one, or a list."""
    return [Field.parse(place) for place in ([places] if isinstance(places, str) else places)]


class TextViews:
    """The base caption and further ones, for a recipe.

    Raises:
        UserError: a place is not a place, or the table of synonyms is missing.
    """

    def __init__(self, data: schema.Data):
        self.base = parse_places(data.caption)
        self.further = parse_places(data.text_view) if data.text_views else []
        self.views, self.recipe = data.text_views, data.text_augmentation
        self.synonyms = load_synonyms(self.recipe) if data.text_views else {}
        self.needs_paraphrases = any(field.member == "paraphrases" for field in self.further)
        if self.needs_paraphrases and data.paraphrases is None:
            raise UserError("data.paraphrases: expected the folder that amclr-scale shards paraphrase wrote, got none")

    @property
    def changes(self) -> bool:
        """Whether words of further captions are."""
        return bool(self.views) and any((self.recipe.drop, self.recipe.swap, self.recipe.synonym))

    @property
    def members(self) -> frozenset[str]:
        """The members of a sample that captions come from."""
        return frozenset(field.member for field in [*self.base, *self.further])

    def draw(self, sample: Sample, seed: int, number: int, name: int) -> list[str]:
        """The base caption, then one per further view: different from all before it as long as there are such.

        Raises:
            BadSampleError: the sample has no caption at one of the places.
        """
        draws = Draws(seed, Purpose.TEXT, number, name, 0)
        places = [sample.captions(self.base[0])]
        places += [found for field in self.base[1:] if (found := sample.captions(field, optional=True))]
        captions = places[draws.below(len(places)) if len(places) > 1 else 0]  # each place as often as any other
        chosen = [captions[draws.below(len(captions))]]
        every = [caption for field in self.further for caption in sample.captions(field, optional=True)] or captions
        for view in range(1, self.views + 1):
            draws = Draws(seed, Purpose.TEXT, number, name, view)
            fresh = [caption for caption in every if caption not in chosen] or every
            chosen.append(fresh[draws.below(len(fresh))])
        return [chosen[0]] + [
            change_words(caption, self.recipe, self.synonyms, Draws(seed, Purpose.WORDS, number, name, view))
            if self.changes
            else caption
            for view, caption in enumerate(chosen[1:], 1)
        ]


def clean_caption(caption: str, max_words: int = 30) -> str:
    """Clean a caption as ALBEF (Li et al., NeurIPS 2021, arXiv:2107.07651) and the SogCLR repositories do.

    Lower case; , . ' ! ? " ( ) * # : ; ~ left out; - and / become spaces; runs of white space become one space; at
    most `max_words` words.
    """
    caption = caption.lower().translate(str.maketrans("-/", "  ", ",.'!?\"()*#:;~"))
    return " ".join(caption.replace("<person>", "person").split()[:max_words])
