"""Which captions of an annotation file become samples, and which of those look like cells that were empty."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from amclr_scale.data.ingestion import Records, Reject

# What pandas and Python write for nothing once it is a text; an empty cell is no caption to begin with.
_OF_NOTHING = frozenset(("nan", "none", "null", "n/a", "na", "<na>"))


def limit_captions(found: Records, most: int, clean: Callable[[str], str]) -> None:
    """Make rejects of captions that training would not read (`data.max_caption_characters`).

    Args:
        most: characters of a caption, as it is stored.
        clean: makes a caption what is stored.
    """
    records, found.records = found.records, []
    for record in records:
        lengths = [len(clean(caption)) for caption in record.captions]
        if max(lengths) <= most:
            found.records.append(record)
            continue
        kept = tuple(text for text, length in zip(record.captions, lengths, strict=True) if length <= most)
        long = [
            f"{length:,} characters: more than --max-caption-characters={most:,}" for length in lengths if length > most
        ]
        if kept:
            found.records.append(replace(record, captions=kept))
            found.rejects += [Reject(record.row, "huge caption", words, record.image, True) for words in long]
        else:
            found.rejects.append(Reject(record.row, "huge caption", "; ".join(long), record.image))


def words_of_nothing(found: Records) -> str:
    """How many captions are no more than such a word; "" where none is. A caption may be one, so they are kept."""
    texts = Counter(text for one in found.records for text in one.captions if text.lower() in _OF_NOTHING)
    if not texts:
        return ""
    counts = ", ".join(f"{number:,} {text!r}" for text, number in texts.most_common())
    return (
        f"captions that may stand for nothing, and are kept: {counts}; if they do, empty those cells, or take them out"
    )
