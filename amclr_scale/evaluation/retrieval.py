"""Retrieval both ways: where in the ranking of all candidates is the right one?

n_r, m_r  images, texts on this rank    N, M  over all ranks    D  embedding width

    image to text (TR): an image's rank is that of the best of its captions among all M texts
    text to image (IR): a text's rank is that of its image among all N images
    R@k: share of ranks <= k        R@mean: mean of R@1, R@5, R@10        overall R@mean: mean of TR's and IR's

Conventions, so that numbers can be compared:

- A rank is 1 + the number of rivals that do not score lower: ties count against the model. Scores nearer than
  rounding (1e-6 in float32) are ties, and so is whatever is compared with a score that is no number. Rivals are all
  candidates that are not right.
- Copies of a caption that belong to different images (`caption_groups`) are one text: from image to text, a copy of an
  image's own caption is no rival. From text to image all other images are, as everywhere; the *filtered* rank leaves
  out the images that carry the same caption. Without copies the two are the same number.

The similarity matrix is passed over once, in tiles; each rank holds its images and all texts.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from amclr_scale.distributed.collectives import rank
from amclr_scale.evaluation.chance import guessed
from amclr_scale.evaluation.numbers import Number, mean_of, number
from amclr_scale.evaluation.shares import gather_rows, sum_over_ranks
from amclr_scale.metrics.scores import RETRIEVAL
from amclr_scale.precision import full_float32

KS = (1, 5, 10)
TILE = {"cpu": (512, 1024), "cuda": (4096, 16384)}  # on CPU it stays in the cache between product and counting


def tie(dtype: torch.dtype) -> float:
    """Scores that are no further apart count as equal."""
    return 1e-12 if dtype == torch.float64 else 1e-6


@dataclass(frozen=True)
class Ranks:
    """Where the right answers are, 1 = first; the same on every rank."""

    image_to_text: Tensor  # (N,) int64
    text_to_image: Tensor  # (M,) int64
    text_to_image_filtered: Tensor  # (M,) int64
    image_of_text: Tensor  # (M,) int64
    copies: Tensor  # (M,) int64, how many other images have the same caption
    rivals_of_image: Tensor  # (N,) int64, texts that are wrong for it

    def numbers(self) -> dict[str, Number]:
        """R@k both ways, their means, and what guessing gives. Intervals resample images with all their captions."""
        N, images = len(self.image_to_text), self.image_of_text
        captions, others = torch.bincount(images, minlength=N), torch.tensor([N - 1])
        numbers = _direction("image_to_text", self.image_to_text, None, captions, self.rivals_of_image)
        numbers |= _direction("text_to_image", self.text_to_image, images, None, others)
        numbers["R@mean"] = mean_of(numbers["image_to_text_R@mean"], numbers["text_to_image_R@mean"])
        if self.copies.any():
            found, wrong = self.text_to_image_filtered, N - 1 - self.copies
            numbers |= _direction("text_to_image_filtered", found, images, None, wrong)
        return numbers

    def plain(self) -> dict[str, float]:
        """Medians, sizes and the number of captions that several images share."""
        return {
            "image_to_text_median_rank": float(self.image_to_text.double().quantile(0.5)),
            "text_to_image_median_rank": float(self.text_to_image.double().quantile(0.5)),
            "images": len(self.image_to_text),
            "texts": len(self.text_to_image),
            "shared_captions": int((self.copies > 0).sum()),
        }


def names() -> tuple[set[str], set[str]]:
    """What `Ranks.numbers` are called, the filtered ones too, which are there if images share captions; and medians."""
    columns = [column for column, score in RETRIEVAL.scores.items() if score.ranked or column == "R@mean"]
    both = ("image_to_text", "text_to_image")
    numbers = {f"{row}_{column}" for row in (*both, "text_to_image_filtered") for column in columns}
    return numbers | {"R@mean"}, {f"{row}_median_rank" for row in both}


def _direction(
    name: str, ranks: Tensor, clusters: Tensor | None, right: Tensor | None, wrong: Tensor
) -> dict[str, Number]:
    """Every number of one direction."""
    numbers: dict[str, Number] = {}
    for column, score in RETRIEVAL.scores.items():
        if score.ranked:
            values = score.values(ranks).double()
            numbers[f"{name}_{column}"] = number(values, clusters=clusters, chance=guessed(score, right, wrong))
        elif column == "R@mean":
            numbers[f"{name}_{column}"] = mean_of(*(numbers[f"{name}_R@{k}"] for k in KS))
    return numbers


class Scores(Protocol):
    """How a rank's images (n_r) and all texts (M) compare: a score from image to text, and one from text to image."""

    def of_pairs(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Both scores (k,) of some pairs, given by their rows (k,)."""

    def of_tile(self, images: slice, texts: slice) -> tuple[Tensor, Tensor]:
        """Both scores (r, c) of some images with some texts."""


@dataclass(frozen=True)
class InnerProducts:
    """Scores of unit vectors, the same both ways."""

    image: Tensor  # (n_r, D)
    text: Tensor  # (M, D)

    def of_pairs(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Both scores (k,)."""
        score = (self.image[images] * self.text[texts]).sum(1)
        return score, score

    def of_tile(self, images: slice, texts: slice) -> tuple[Tensor, Tensor]:
        """Both scores (r, c)."""
        scores = self.image[images] @ self.text[texts].T
        return scores, scores


def retrieval(
    image: Tensor,
    text: Tensor,
    *,
    image_of_text: Tensor,
    caption_groups: Tensor | None = None,
    tile: tuple[int, int] | None = None,
) -> Ranks:
    """Rank everything against everything. All ranks call it together.

    Args:
        image: (n_r, D), unit length: this rank's images. Images are numbered in rank order, 0 ... N - 1.
        text: (m_r, D), unit length: this rank's texts; on any rank, also on another one than their images.
        image_of_text: (m_r,) int64, the number of each text's image.
        caption_groups: (m_r,) int64: texts with the same number are the same caption; None: all differ.
        tile: images and texts compared at once; None: what suits the device.

    Raises:
        ValueError: an image without texts, or a text of an image that does not exist.
    """
    scores = InnerProducts(image, gather_rows(text))
    tile = tile or TILE["cuda" if image.is_cuda else "cpu"]
    return ranked(scores, image, image_of_text=image_of_text, caption_groups=caption_groups, tile=tile)


@torch.no_grad()
def ranked(
    scores: Scores, image: Tensor, *, image_of_text: Tensor, caption_groups: Tensor | None, tile: tuple[int, int]
) -> Ranks:
    """The same, by any scores.

    Args:
        image: (n_r, ...), of the type and on the device of scores.
    """
    owners = gather_rows(image_of_text)
    texts = len(owners)
    groups = torch.arange(texts, device=owners.device) if caption_groups is None else gather_rows(caption_groups)
    counts = gather_rows(torch.tensor([len(image)], device=image.device)).tolist()
    first, N = sum(counts[: rank()]), sum(counts)
    _check(owners, N)
    right = _RightAnswers(owners, groups, N)

    tolerance = tie(image.dtype)
    mine = ((owners >= first) & (owners < first + len(image))).nonzero()[:, 0]
    with full_float32():  # TF32's rounding is larger than what counts as a tie
        of_image, of_text = scores.of_pairs(owners[mine] - first, mine)
    own = torch.zeros(texts, dtype=image.dtype, device=image.device)
    own[mine] = of_text
    text_limit = sum_over_ranks(own) - tolerance  # (M,): each text's image is on exactly one rank
    best = torch.full((len(image),), -torch.inf, dtype=image.dtype, device=image.device)
    image_limit = best.scatter_reduce(0, owners[mine] - first, of_image - tolerance, "amax")  # (n_r,)

    ahead_of_image = torch.zeros(len(image), dtype=torch.int64, device=image.device)
    ahead_of_text = torch.zeros(2, texts, dtype=torch.int64, device=image.device)  # all, filtered
    rivals = torch.zeros(len(image), dtype=torch.int64, device=image.device)
    rows, columns = tile
    with full_float32():  # TF32's rounding is larger than what counts as a tie
        for top in range(0, len(image), rows):
            high = slice(top, min(top + rows, len(image)))
            pairs = right.of_images(first + high.start, first + high.stop)
            rivals[high] = texts - torch.bincount(pairs.image, minlength=high.stop - high.start)
            for left in range(0, texts, columns):
                wide = slice(left, left + columns)
                by_image, by_text = scores.of_tile(high, wide)
                # false of a score that is nan
                under_image, under_text = by_image < image_limit[high, None], by_text < text_limit[wide]
                ahead_of_image[high] += by_image.shape[1] - under_image.sum(1)
                ahead_of_text[:, wide] += by_text.shape[0] - under_text.sum(0)
                inside = (pairs.text >= left) & (pairs.text < left + columns)
                i, j, is_own = pairs.image[inside], pairs.text[inside], pairs.own[inside]
                ahead_of_image[high].index_add_(0, i, (~under_image[i, j - left]).long(), alpha=-1)
                counted = (~under_text[i, j - left]).long()
                ahead_of_text[0].index_add_(0, j, counted * is_own, alpha=-1)
                ahead_of_text[1].index_add_(0, j, counted, alpha=-1)
    ahead_of_text = sum_over_ranks(ahead_of_text)
    return Ranks(
        image_to_text=gather_rows(1 + ahead_of_image).cpu(),
        text_to_image=(1 + ahead_of_text[0]).cpu(),
        text_to_image_filtered=(1 + ahead_of_text[1]).cpu(),
        image_of_text=owners.cpu(),
        copies=right.copies.cpu(),
        rivals_of_image=gather_rows(rivals).cpu(),
    )


def _check(owners: Tensor, N: int) -> None:
    if len(owners) and not 0 <= int(owners.min()) <= int(owners.max()) < N:
        low, high = int(owners.min()), int(owners.max())
        raise ValueError(f"image_of_text: expected numbers from 0 to {N - 1}, got {low} to {high}")
    without = torch.bincount(owners, minlength=N) == 0
    if without.any():
        raise ValueError(
            f"image_of_text: {int(without.sum())} of {N} images have no text, the first is image "
            f"{int(without.nonzero()[0])}; give every image a caption, or leave it out"
        )


@dataclass(frozen=True)
class _Pairs:
    image: Tensor  # (p,) row in a block of images
    text: Tensor  # (p,) number of a text that is right for it
    own: Tensor  # (p,) bool: the text is its own; otherwise a copy of one of its own


class _RightAnswers:
    """Which texts are right for which images: its own, and copies of these."""

    def __init__(self, owners: Tensor, groups: Tensor, N: int):
        self.owners = owners
        _, self.groups = torch.unique(groups, return_inverse=True)
        self.texts_of_image, self.image_starts = _lists(owners, N)
        self.texts_of_group, self.group_starts = _lists(self.groups, int(self.groups.max()) + 1 if len(groups) else 0)
        pairs = torch.unique(torch.stack([self.groups, owners]), dim=1)  # a caption, and an image that has it
        images = torch.bincount(pairs[0], minlength=len(self.group_starts) - 1)
        self.copies = images[self.groups] - 1  # (M,) other images with this caption

    def of_images(self, start: int, stop: int) -> _Pairs:
        """The right pairs of images start ... stop - 1, each once; rows count from `start`."""
        own = self.texts_of_image[int(self.image_starts[start]) : int(self.image_starts[stop])]
        rows = self.owners[own] - start
        if not bool(self.copies[own].any()):
            return _Pairs(rows, own, torch.ones_like(own, dtype=torch.bool))
        group = self.groups[own]
        sizes = self.group_starts[group + 1] - self.group_starts[group]
        row = rows.repeat_interleave(sizes)
        step = torch.arange(len(row), device=own.device) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        text = self.texts_of_group[self.group_starts[group].repeat_interleave(sizes) + step]
        pair = torch.unique(torch.stack([row, text]), dim=1)  # an image may have the same caption twice
        return _Pairs(pair[0], pair[1], self.owners[pair[1]] == pair[0] + start)


def _lists(keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Positions sorted by key, and where each key's positions start: (n,), (count + 1,)."""
    sizes = torch.bincount(keys, minlength=count)
    return keys.argsort(stable=True), torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
