"""Retrieval by tokens: best matches of patches and words, as FILIP scores pairs, beside that by pooled features.

n_r, M  images of this rank, texts over all ranks    n1, n2  tokens of an image and of a text    D  embedding width

The score from an image to a text is the mean over patches of each one's best word, that from a text to an image the
mean over words of each one's best patch (similarity/token_contrast.py). Each rank holds the tokens of its images and of
all texts; products of tokens are made a tile at a time.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from amclr_scale.evaluation.retrieval import Ranks, ranked
from amclr_scale.evaluation.shares import gather_rows

AT_ONCE = 2**22  # products of tokens in a tile


@dataclass(frozen=True)
class TokenScores:
    """`Scores` of tokens, with masks of those that count."""

    image: Tensor  # (n_r, n1, D)
    image_mask: Tensor  # (n_r, n1) bool
    text: Tensor  # (M, n2, D)
    text_mask: Tensor  # (M, n2) bool

    def of_pairs(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Both scores (k,)."""
        n1, n2 = self.image.shape[1], self.text.shape[1]
        found = [
            _scores(
                torch.bmm(self.image[i], self.text[j].transpose(1, 2))[:, :, None],
                self.image_mask[i], self.text_mask[j][:, None],
            )
            for i, j in zip(*(x.split(max(1, AT_ONCE // (n1 * n2))) for x in (images, texts)), strict=True)
        ]  # fmt: skip
        nothing = self.image.new_empty(0, 1)  # where a rank has no images
        by_image, by_text = (torch.cat([nothing, *(part[side] for part in found)])[:, 0] for side in (0, 1))
        return by_image, by_text

    def of_tile(self, images: slice, texts: slice) -> tuple[Tensor, Tensor]:
        """Both scores (r, c)."""
        image, text = self.image[images], self.text[texts]
        products = image.flatten(0, 1) @ text.flatten(0, 1).T
        products = products.view(*image.shape[:2], *text.shape[:2])  # (r, n1, c, n2)
        return _scores(products, self.image_mask[images], self.text_mask[texts])


def _scores(products: Tensor, image_mask: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
    """(r, c) from image to text and back, of products (r, n1, c, n2), which are used up.

    Args:
        image_mask: (r, n1).
        text_mask: (c, n2), or (r, c, n2).
    """
    text_mask = text_mask if text_mask.dim() == 3 else text_mask[None]
    products.masked_fill_(~image_mask[:, :, None, None], -2.0)  # below every inner product of unit vectors
    products.masked_fill_(~text_mask[:, None], -2.0)
    of_image, of_text = (x / x.sum(-1, keepdim=True) for x in (image_mask.to(products), text_mask.to(products)))
    return (products.amax(3) * of_image[:, :, None]).sum(1), (products.amax(1) * of_text).sum(2)


def token_retrieval(
    image: tuple[Tensor, Tensor], text: tuple[Tensor, Tensor], *, image_of_text: Tensor,
    caption_groups: Tensor | None = None, at_once: int = AT_ONCE,
) -> Ranks:  # fmt: skip
    """Rank everything against everything, as `retrieval` does. All ranks call it together.

    Args:
        image: tokens (n_r, n1, D), unit length, and which of them count (n_r, n1), of this rank's images.
        text: tokens (m_r, n2, D) and (m_r, n2), of this rank's texts.
        image_of_text, caption_groups: as of `retrieval`.
        at_once: products of tokens in a tile.
    """
    scores = TokenScores(*image, *(gather_rows(x) for x in text))
    n1, n2 = image[0].shape[1], text[0].shape[1]
    rows = max(1, int((at_once / (n1 * n2)) ** 0.5))
    tile = rows, max(1, at_once // (rows * n1 * n2))
    return ranked(scores, image[0], image_of_text=image_of_text, caption_groups=caption_groups, tile=tile)
