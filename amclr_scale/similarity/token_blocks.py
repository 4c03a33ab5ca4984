"""Blocks of similarities between samples that are made of tokens: best matches, token by token, a tile at a time.

r, c  samples of a tile's rows and columns    n1, n2  tokens of an image and of a text    D  width

A tile holds the products of (r n1) by (c n2) tokens, as many as `torch_backend.py` has features in one, and at least
those of one pair of samples. Of a forward tile two numbers of each pair of samples are left; backward makes it again,
and turns it into weights: of each token the first of its best matches gets the gradient of that match.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from amclr_scale.similarity.blocks import MASKED, Mask, Statistics, Weights
from amclr_scale.similarity.precision import Form
from amclr_scale.similarity.settings import Settings
from amclr_scale.similarity.torch_backend import LeftOut, Tile, TorchBlocks


def token_tile(shape: tuple[int, int], tokens: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a tile of tokens: whole samples, at least one of each, in a tile of that shape otherwise."""
    rows, columns = (max(1, side // n) * n for side, n in zip(shape, tokens, strict=True))
    return rows, columns


@dataclass(frozen=True)
class Counted:
    """Which tokens of some samples count, and how much in the mean over them.

    Attributes:
        there: (m, n) bool; None: all.
        shares: (m, n), 1 over the number of tokens that count, and 0 for the others.
    """

    there: Tensor | None
    shares: Tensor

    @classmethod
    def of(cls, mask: Tensor, dtype: torch.dtype) -> "Counted":
        """From a mask (m, n) bool, of which every row has a token that counts."""
        shares = mask.to(dtype)
        known = mask.device.type == "cpu" and bool(mask.all())  # elsewhere the look would be a wait
        return cls(None if known else mask, shares / shares.sum(1, keepdim=True))

    def __getitem__(self, rows: slice) -> "Counted":
        return Counted(None if self.there is None else self.there[rows], self.shares[rows])


@dataclass(frozen=True)
class Pairing:
    """Some images (b) and some texts (n), and where positives are among them."""

    images: Counted
    texts: Counted
    diagonal: int | None  # the column of row 0's positive
    mask: Mask | None = None  # (b, n), of samples

    def left_out(self, here: Tile, matrix: Tensor, dim: int) -> Tensor | None:
        """What the sums along `dim` leave out of a tile's matrix (r, c): such a matrix of bool, or None."""
        if self.mask is None:
            return None
        entries = torch.zeros_like(matrix, dtype=torch.bool)
        left_out = LeftOut(self.mask[here.rows, here.columns], here, self.diagonal)
        left_out.of_groups(entries, True)
        return left_out.above_limit(entries, matrix, dim, True, out=entries)


class TokenBlocks(TorchBlocks):
    """Statistics and gradients over tiles of tokens. Images are rows, texts are columns.

    Args:
        tokens: n1, n2.
    """

    def __init__(
        self, settings: Settings, dtype: torch.dtype, form: Form, device: torch.device, tokens: tuple[int, int]
    ):
        super().__init__(settings, dtype, form, device)
        self.tokens = tokens
        self.shape = token_tile(self.shape, tokens)

    def accumulate_pairs(
        self,
        images: Tensor,  # (b n1, D)
        texts: Tensor,  # (n n2, D)
        pairs: Pairing,
        rows: Statistics,  # of the b images
        columns: Statistics,  # of the n texts
        positives: tuple[Tensor, Tensor],  # (b,) each: receive the positives' similarities, image to text and back
    ) -> None:
        """Add the texts to the statistics of the images, by s1, and the images to those of the texts, by s2."""
        for tile in self._tiles(images, texts):
            self._accumulate(tile, pairs, rows, columns, positives)

    def differentiate_pairs(
        self,
        images: Tensor,  # (b n1, D)
        texts: Tensor,  # (n n2, D)
        pairs: Pairing,
        rows: Weights | None,  # of the b images
        columns: Weights | None,  # of the n texts
        positives: tuple[Tensor, Tensor],  # (b,) each: weights of the positives, in place of the formula
        *,
        d_images: Tensor | None,  # (b n1, D)
        d_texts: Tensor | None,  # (n n2, D)
    ) -> None:
        """Add the gradients of these pairs. A direction that is None has that of its positives alone."""
        for tile in self._tiles(images, texts):
            weights = self._weights(tile, pairs, rows, columns, positives)
            self._add_gradients(tile, weights, d_images, d_texts)

    def _accumulate(
        self, tile: Tile, pairs: Pairing, rows: Statistics, columns: Statistics, positives: tuple[Tensor, Tensor]
    ) -> None:
        similarities = self._products(tile, here := self._samples(tile), pairs)
        at_rows, at_columns = pairs.images[here.rows].shares, pairs.texts[here.columns].shares
        best_text, best_image = similarities.amax(3), similarities.amax(1)
        for matrix, side, dim, positive in (
            (_over_images(best_text, at_rows), rows[here.rows], 1, positives[0]),
            (_over_texts(best_image, at_columns), columns[here.columns], 0, positives[1]),
        ):
            if diagonal := here.diagonal(matrix, pairs.diagonal):
                positive[diagonal[0]] = diagonal[1]
            if (left_out := pairs.left_out(here, matrix, dim)) is not None:
                matrix.masked_fill_(left_out, MASKED)
            shift = torch.maximum(matrix.amax(dim), side.shift)
            x = (matrix - shift.unsqueeze(dim)) * side.rate.unsqueeze(dim)
            e = x.exp2()
            side.add(shift, e.sum(dim), x.mul_(e).sum(dim))

    def _weights(
        self,
        tile: Tile,
        pairs: Pairing,
        rows: Weights | None,
        columns: Weights | None,
        positives: tuple[Tensor, Tensor],
    ) -> Tensor:
        """(r n1, c n2), mostly zeros: the gradient of each product."""
        similarities = self._products(tile, here := self._samples(tile), pairs)
        at_rows, at_columns = pairs.images[here.rows].shares, pairs.texts[here.columns].shares
        text_of, image_of = similarities.max(3), similarities.max(1)  # of equal ones the first
        weights = self._buffers(tile)[1].view(similarities.shape).zero_()
        upstream = []
        for matrix, side, dim, positive in (
            (_over_images(text_of.values, at_rows), rows and rows[here.rows], 1, positives[0]),
            (_over_texts(image_of.values, at_columns), columns and columns[here.columns], 0, positives[1]),
        ):
            if side is None:
                matrix.zero_()
            else:
                left_out = pairs.left_out(here, matrix, dim)
                matrix.sub_(side.shift.unsqueeze(dim)).mul_(side.rate.unsqueeze(dim))
                matrix.exp2_().mul_(side.factor.unsqueeze(dim))
                if left_out is not None:
                    matrix.masked_fill_(left_out, 0.0)
            if diagonal := here.diagonal(matrix, pairs.diagonal):
                diagonal[1].copy_(positive[diagonal[0]])
            upstream.append(matrix)
        each = upstream[0][:, None, :] * at_rows[:, :, None]  # (r, n1, c)
        weights.scatter_(3, text_of.indices[..., None], each[..., None])
        each = upstream[1][:, :, None] * at_columns  # (r, c, n2)
        weights.scatter_add_(1, image_of.indices[:, None], each[:, None])
        return weights.flatten(2).flatten(0, 1)

    def _samples(self, tile: Tile) -> Tile:
        """The same tile, counted in samples."""
        n1, n2 = self.tokens
        rows = slice(tile.rows.start // n1, tile.rows.stop // n1)
        return Tile(rows, slice(tile.columns.start // n2, tile.columns.stop // n2), tile.left, tile.right)

    def _products(self, tile: Tile, here: Tile, pairs: Pairing) -> Tensor:
        """(r, n1, c, n2), lowest where a token does not count."""
        n1, n2 = self.tokens
        products = self._similarities(tile, self._buffers(tile)[0]).view(-1, n1, len(tile.right.product) // n2, n2)
        images, texts = pairs.images[here.rows].there, pairs.texts[here.columns].there
        if images is not None:
            products.masked_fill_(~images[:, :, None, None], MASKED)
        if texts is not None:
            products.masked_fill_(~texts, MASKED)
        return products


def _over_images(best: Tensor, shares: Tensor) -> Tensor:
    """The mean over an image's tokens of their best matches: (r, n1, c), which is used up -> (r, c)."""
    return best.mul_(shares[:, :, None]).sum(1)


def _over_texts(best: Tensor, shares: Tensor) -> Tensor:
    """The mean over a text's tokens of their best matches: (r, c, n2), which is used up -> (r, c)."""
    return best.mul_(shares).sum(2)
