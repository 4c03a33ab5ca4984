"""What is measured on a split, by name. A new evaluator is a function of an `EncodedSplit` and an entry in EVALUATORS.

It runs where `evaluation.evaluators` names it; those in ALWAYS run wherever a split has what they need. All ranks call
an evaluator together. Words, unit and direction of its numbers stand in metrics/scores.py, or in a group that it adds
there; tests/commands/additions/evaluator.py is one.
"""

from collections.abc import Callable
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from amclr_scale.config.schema import Evaluation
from amclr_scale.evaluation import composition as wrong_captions
from amclr_scale.evaluation import geometry as sphere
from amclr_scale.evaluation.encode import Encode, encode_images, encode_texts
from amclr_scale.evaluation.image_files import ImageFiles
from amclr_scale.evaluation.numbers import Number
from amclr_scale.evaluation.retrieval import names as retrieval_names
from amclr_scale.evaluation.retrieval import retrieval as rank_both_ways
from amclr_scale.evaluation.shares import gather_rows, share
from amclr_scale.evaluation.splits import Split, Task
from amclr_scale.evaluation.tokens.retrieval import token_retrieval as by_tokens
from amclr_scale.evaluation.zero_shot import accuracies, accuracy_names, class_ranks, ensemble, prompts
from amclr_scale.metrics.scores import GEOMETRY

Classifiers = dict[tuple[str, ...], Tensor]
# Numbers with their items (see numbers.py), and numbers without: sizes, medians, what has no items.
Measured = tuple[dict[str, Number], dict[str, float]]
NOTHING: Measured = ({}, {})


class EncodedSplit:
    """A split seen through a model: what evaluators share is encoded once, when the first of them asks.

    Args:
        encode: the model, or anything that is called like it.
        classifiers: encoded classes by name and templates; splits mostly share them.
    """

    def __init__(self, encode: Encode, task: Task, options: Evaluation, classifiers: Classifiers):
        self.encode, self.task, self.options, self._classifiers = encode, task, options, classifiers
        self.split = task.split
        self.rows = share(task.split.num_samples)  # this rank's samples

    @cached_property
    def image(self) -> Tensor:
        """(n_r, D), unit length: this rank's images."""
        (image,) = encode_images(self.encode, self.split, self.options.batch_size)
        return image

    @cached_property
    def gallery(self) -> tuple[list[str], Tensor, Tensor, Tensor]:
        """See `gallery`."""
        return gallery(self.split)

    @cached_property
    def text(self) -> Tensor:
        """(m_r, D), unit length: this rank's share of all captions."""
        return self.encoded(self.gallery[0])

    @cached_property
    def caption(self) -> Tensor:
        """(n_r, D): the first caption of each of this rank's samples."""
        starts = [0, *accumulate(len(captions) for captions in self.split.caption_lists)][:-1]
        return gather_rows(self.text)[torch.tensor(starts, device=self.text.device)][self.rows.start : self.rows.stop]

    @cached_property
    def labels(self) -> Tensor | None:
        """(n_r,) int64: this rank's classes; None: the split has none."""
        return self.task.labels[self.rows.start : self.rows.stop] if self.task.class_names else None

    @cached_property
    def classes(self) -> Tensor:
        """(K, D), unit length: all classes, from their names in the task's templates."""
        key = (*self.task.class_names, *self.task.templates)
        if key not in self._classifiers:
            filled = prompts(self.task.class_names, self.task.templates)
            self._classifiers[key] = ensemble(gather_rows(self.encoded(filled)), len(self.task.templates))
        return self._classifiers[key]

    def encoded(self, texts: list[str]) -> Tensor:
        """(m_r, D), unit length: this rank's share of some texts. All ranks call it together."""
        (text,) = encode_texts(self.encode, self.split.reading.tokenizer, texts, self.options.batch_size)
        return text

    def tokens(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Tokens and which of them count, of this rank's images (n_r, n1, D) and of its share of all captions.

        Raises:
            UserError: the model gives none.
        """
        size, names = self.options.batch_size, ("tokens", "token_mask")
        image = encode_images(self.encode, self.split, size, [f"image_{name}" for name in names], tokens=True)
        text = encode_texts(
            self.encode, self.split.reading.tokenizer, self.gallery[0], size, [f"text_{name}" for name in names],
            tokens=True,
        )  # fmt: skip
        return (image[0], image[1]), (text[0], text[1])


def retrieval(seen: EncodedSplit) -> Measured:
    """Recall both ways, where there are captions."""
    if not seen.task.retrieval:
        return NOTHING
    image = seen.image
    texts, owners, groups, keep = seen.gallery
    mine = share(len(texts))
    ranks = rank_both_ways(
        image[keep[seen.rows.start : seen.rows.stop].to(image.device)],
        seen.text,
        image_of_text=owners[mine.start : mine.stop].to(image.device),
        caption_groups=groups[mine.start : mine.stop].to(image.device),
    )
    return ranks.numbers(), ranks.plain()


def token_retrieval(seen: EncodedSplit) -> Measured:
    """Recall both ways by best matches of patches and words, where there are captions; see `tokens/retrieval.py`."""
    if not seen.task.retrieval:
        return NOTHING
    image, text = seen.tokens()
    texts, owners, groups, keep = seen.gallery
    mine, kept = share(len(texts)), keep[seen.rows.start : seen.rows.stop].to(image[0].device)
    ranks = by_tokens(
        (image[0][kept], image[1][kept]),
        text,
        image_of_text=owners[mine.start : mine.stop].to(image[0].device),
        caption_groups=groups[mine.start : mine.stop].to(image[0].device),
    )
    return {f"token_{name}": one for name, one in ranks.numbers().items()}, {}


def geometry(seen: EncodedSplit) -> Measured:
    """How embeddings lie on the sphere, where `evaluation.geometry` asks for it and there are two pairs at least."""
    if not seen.options.geometry or not _has_geometry(seen.task):
        return NOTHING
    return {}, sphere.geometry(seen.image, seen.caption, seen.labels)


def _has_geometry(task: Task) -> bool:
    return task.retrieval and task.split.num_samples > 1


def composition(seen: EncodedSplit) -> Measured:
    """Captions against wrong ones, where annotations have some."""
    split = seen.split
    if not isinstance(split, ImageFiles) or not any(item.negatives for item in split.items):
        return NOTHING
    listed = [
        (row, kind, text) for row, item in enumerate(split.items) for kind, ts in item.negatives.items() for text in ts
    ]
    kinds = sorted({kind for _, kind, _ in listed})
    mine = share(len(listed))
    image, caption = seen.image, seen.caption
    wrong = seen.encoded([text for _, _, text in listed])
    rows = torch.tensor(
        [(row, kinds.index(kind)) for row, kind, _ in listed[mine.start : mine.stop]], dtype=torch.int64
    )
    rows = rows.view(-1, 2).to(image.device)
    return wrong_captions.composition(
        image, caption, wrong, sample_of_wrong=rows[:, 0], kind_of_wrong=rows[:, 1], kinds=kinds
    ), {}


def zero_shot(seen: EncodedSplit) -> Measured:
    """Classification by the names of classes, where there are some."""
    if seen.labels is None:
        return NOTHING
    places = class_ranks(seen.image, seen.classes, seen.labels)
    return accuracies(places, seen.task.labels, len(seen.task.class_names)), {}


EVALUATORS: dict[str, Callable[[EncodedSplit], Measured]] = {
    "retrieval": retrieval,
    "geometry": geometry,
    "composition": composition,
    "zero_shot": zero_shot,
}
ALWAYS = tuple(EVALUATORS)
EVALUATORS["token_retrieval"] = token_retrieval
_OURS = frozenset(EVALUATORS)


def numbers_of(task: Task, options: Evaluation) -> set[str] | None:
    """What a split's numbers will be called, those that scores describe, before anything is encoded.

    None: that is not known, for an evaluator of the user's own is asked for.
    """
    if set(options.evaluators) - _OURS:
        return None
    found: set[str] = set()
    if task.retrieval:
        ranked, plain = retrieval_names()
        found |= ranked | plain
        if "token_retrieval" in options.evaluators:
            found |= {f"token_{name}" for name in ranked}
        if options.geometry and _has_geometry(task):
            both = [name for name in GEOMETRY.scores if name.startswith("*_")]
            found |= {"alignment", "modality_gap", "cross_uniformity"}
            found |= {name.replace("*", side) for name in both for side in ("image", "text")}
            found |= {"image_tolerance"} if task.class_names else set()
    if isinstance(task.split, ImageFiles):
        found |= {f"composition_{kind}" for item in task.split.items for kind in item.negatives}
    return found | (accuracy_names(len(task.class_names)) if task.class_names else set())


def gallery(split: Split) -> tuple[list[str], Tensor, Tensor, Tensor]:
    """All texts, the image of each, which of them are the same caption, and which samples stand for an image.

    Samples that show the same image count as one, with the captions of all of them; the first one's pixels are used.
    """
    _, numbers = torch.unique(split.image_ids, return_inverse=True)
    first = torch.full((int(numbers.max()) + 1,), split.num_samples)
    first = first.scatter_reduce(0, numbers, torch.arange(split.num_samples), "amin")
    keep = torch.zeros(split.num_samples, dtype=torch.bool)
    keep[first] = True
    place = keep.cumsum(0) - 1  # of an image among those kept
    texts = [caption for captions in split.caption_lists for caption in captions]
    owners = [int(place[first[numbers[s]]]) for s, captions in enumerate(split.caption_lists) for _ in captions]
    seen: dict[str, int] = {}
    groups = [seen.setdefault(caption, len(seen)) for caption in texts]
    return texts, torch.tensor(owners), torch.tensor(groups), keep
