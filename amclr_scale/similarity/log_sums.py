"""Forward and backward of `contrast`: log-sums of both directions, streamed over blocks of keys.

b  anchors of this rank    B = b W  keys, over all ranks    M  extra keys    D  width

Forward makes each block of similarities once and adds it to the statistics of its rows (image anchors) and its columns
(text anchors). Every rank holds b rows, so the columns' statistics are partial: ranks exchange them, 3 B numbers.

Backward has arbitrary upstream gradients per anchor, so it makes the blocks again, once it has gathered three numbers
of every column (`Weights`). With S' the block and W' its weights, `reduce_scatter` takes both W' keys and W'^T anchors
from it; the other distributions take W' keys only, and do the same for the text anchors against all images.

The weight of a positive collects everything that depends on s_ii: its share p_ii of the log-sum, the -1 of a centred
one, and the upstream gradient of the positive itself. They nearly cancel once pairs are aligned, so they are added in
float64 before the matrix products, not after.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from amclr_scale.distributed.collectives import Group, all_gather, exchange, group
from amclr_scale.distributed.first_order import first_order_only
from amclr_scale.similarity.backends import blocks_for
from amclr_scale.similarity.blocks import Blocks, Mask, Statistics, TileCache, Weights
from amclr_scale.similarity.keys import ExtraKeys, GatheredKeys, Keys, keys_of
from amclr_scale.similarity.masks import Masks
from amclr_scale.similarity.settings import Distribution, Settings

LOG2_E = math.log2(math.e)
PIECE = 65_536  # extra keys that come from the host at a time


@dataclass(frozen=True)
class Plan:
    """What forward decided, for backward to do likewise."""

    ranks: Group
    settings: Settings
    distribution: Distribution  # not "auto"
    dtype: torch.dtype  # of similarities and sums
    exclude_positive: bool
    centred: bool
    masks: Masks
    batch_negatives: bool
    extra_texts: ExtraKeys | None  # of image anchors
    extra_images: ExtraKeys | None
    will_differentiate: bool
    gradient_width: int | None = None  # columns of the features that have a gradient, the first ones; None: all

    def blocks(self, image: Tensor, text: Tensor) -> Blocks:
        """The backend for these features."""
        extra = [keys.rows for keys in (self.extra_texts, self.extra_images) if keys is not None]
        return blocks_for(self.settings, self.dtype, image, text, *extra)

    def keys(self, local: Tensor, gathered: Tensor | None = None) -> Keys:
        if gathered is not None:
            return GatheredKeys(gathered, self.ranks)
        return keys_of(local, self.ranks, self.settings.gather)


class LogSums(torch.autograd.Function):
    """(plan, image, text (b, D), temperatures of image and text anchors (b,)) -> log-sums of image and text anchors,
    positives, expectations of image and text anchors: (b,) each.
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, *inputs: Tensor) -> tuple[Tensor, ...]:
        image, text, image_t, text_t = inputs
        masks = plan.masks
        cache = TileCache(plan.settings.cache_bytes if plan.will_differentiate else 0)
        with torch.autocast(image.device.type, enabled=False):
            positive = torch.empty_like(image_t, memory_format=torch.contiguous_format)
            images, texts = Statistics.empty(LOG2_E / image_t), Statistics.empty(LOG2_E / text_t)
            text_keys = plan.keys(text) if plan.batch_negatives else None
            stream = _Stream(plan, plan.blocks(image, text), cache)
            if text_keys is None:
                positive = (image.to(plan.dtype) * text.to(plan.dtype)).sum(1)
                for side in () if plan.exclude_positive else (images, texts):
                    side.add(positive, torch.ones_like(positive), torch.zeros_like(positive))
            elif plan.distribution == "two_blocks":
                stream.accumulate(image, text_keys, images, mask=masks.images, positive=positive)
                stream.accumulate(text, plan.keys(image), texts, mask=masks.texts)
            else:
                columns = Statistics.empty(all_gather(texts.rate, plan.ranks))
                stream.accumulate(image, text_keys, images, columns, mask=masks.images, positive=positive)
                merge(columns, texts, plan.ranks)
            stream.accumulate_extra(image, plan.extra_texts, images, masks.extra_texts)
            stream.accumulate_extra(text, plan.extra_images, texts, masks.extra_images)

            centre = positive if plan.centred else torch.zeros_like(positive)
            image_offset, text_offset = (images.shift - centre) / image_t, (texts.shift - centre) / text_t
            image_sum, text_sum = image_offset + images.mass.log(), text_offset + texts.mass.log()
            image_expected = expected_of(images, image_offset)
            text_expected = expected_of(texts, text_offset)

        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(image_expected, text_expected)
        gathered = text_keys.rows if isinstance(text_keys, GatheredKeys) and plan.will_differentiate else None
        extra = (keys.rows if keys else None for keys in (plan.extra_texts, plan.extra_images))  # a change is noticed
        ctx.save_for_backward(*inputs, *extra, gathered, positive, image_expected, text_expected,
                              images.shift, images.mass, texts.shift, texts.mass, *cache.tiles)  # fmt: skip
        return image_sum, text_sum, positive, image_expected, text_expected

    @staticmethod
    @first_order_only
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        d_image_sum, d_text_sum, d_positive = upstream[:3]
        image, text, image_t, text_t, _, _, gathered, positive, *rest = ctx.saved_tensors
        image_expected, text_expected, image_shift, image_mass, text_shift, text_mass, *tiles = rest
        need_image, need_text, need_image_t, need_text_t = ctx.needs_input_grad[1:5]

        with torch.autocast(image.device.type, enabled=False):
            how: dict[str, Any] = {
                "dtype": plan.dtype, "exclude_positive": plan.exclude_positive, "centred": plan.centred,
            }  # fmt: skip
            images, image_positive = side_weights(d_image_sum, image_shift, image_mass, image_t, positive, **how)
            texts, text_positive = side_weights(d_text_sum, text_shift, text_mass, text_t, positive, **how)
            total = image_positive + text_positive + (0 if d_positive is None else d_positive)

            stream = _Stream(
                plan,
                plan.blocks(image, text),
                TileCache(tiles=tiles),
                total.to(plan.dtype),
            )
            width = plan.gradient_width
            d_image = torch.zeros_like(image[:, :width], dtype=plan.dtype) if need_image else None
            d_text: Tensor | None = None
            together = need_text and plan.distribution == "reduce_scatter"
            if not plan.batch_negatives:
                weight = total.to(plan.dtype)[:, None]
                d_text = weight * image[:, :width].to(plan.dtype) if need_text else None
                if d_image is not None:
                    d_image += weight * text[:, :width].to(plan.dtype)
            elif need_image or together:
                text_keys = plan.keys(text, gathered)
                stream.differentiate(
                    image, text_keys, images, texts, mask=plan.masks.images, d_anchors=d_image, also_keys=together
                )
                d_text = text_keys.gradient
            if need_text and not together and plan.batch_negatives:
                if plan.distribution == "column_sums" or not need_image:
                    stream.cache = TileCache()  # the tiles in it are those of the pass above
                d_text = torch.zeros_like(text[:, :width], dtype=plan.dtype)
                stream.differentiate(text, plan.keys(image), texts, images, mask=plan.masks.texts, d_anchors=d_text)
            stream.differentiate_extra(image, plan.extra_texts, images, plan.masks.extra_texts, d_image)
            stream.differentiate_extra(text, plan.extra_images, texts, plan.masks.extra_images, d_text)

        return (
            None,
            None if d_image is None else _as_wide(d_image, image),
            None if d_text is None else _as_wide(d_text, text),
            -d_image_sum * image_expected / image_t if need_image_t and d_image_sum is not None else None,
            -d_text_sum * text_expected / text_t if need_text_t and d_text_sum is not None else None,
        )


@dataclass
class _Stream:
    """Passes over all blocks of keys."""

    plan: Plan
    blocks: Blocks
    cache: TileCache
    positive_weight: Tensor | None = None  # (b,)

    def accumulate(
        self,
        anchors: Tensor,  # (b, D)
        keys: Keys,
        rows: Statistics,  # (b,)
        columns: Statistics | None = None,  # (B,)
        *,
        mask: Mask | None,  # (b, B)
        positive: Tensor | None = None,  # (b,)
    ) -> None:
        for block in keys.blocks():
            self.blocks.accumulate(
                anchors,
                block.rows,
                rows,
                columns and columns[block.columns],
                diagonal=block.diagonal(self.plan.ranks.rank * len(anchors)),
                positive=positive,
                exclude_positive=self.plan.exclude_positive,
                mask=mask and mask[:, block.columns],
                cache=self.cache,
            )

    def differentiate(
        self,
        anchors: Tensor,  # (b, D)
        keys: Keys,
        rows: Weights | None,  # (b,)
        columns: Weights | None,  # (b,): gathered here
        *,
        mask: Mask | None,  # (b, B)
        d_anchors: Tensor | None,  # (b, D)
        also_keys: bool = False,  # leave the keys' gradient in keys.gradient
    ) -> None:
        columns = gather_weights(columns, self.plan.ranks)
        for block in keys.blocks(self.plan.dtype if also_keys else None, self.plan.gradient_width):
            self.blocks.differentiate(
                anchors,
                block.rows,
                rows,
                columns and columns[block.columns],
                d_anchors=d_anchors,
                d_keys=block.gradient,
                diagonal=block.diagonal(self.plan.ranks.rank * len(anchors)),
                positive_weight=self.positive_weight,
                mask=mask and mask[:, block.columns],
                cache=self.cache,
            )

    def accumulate_extra(self, anchors: Tensor, extra: ExtraKeys | None, sums: Statistics, mask: Mask | None) -> None:
        """Add extra keys to the sums (b,) of their anchors (b, D). Of sharded ones, ranks add up what they have."""
        if extra is None:
            return
        if not extra.sharded:
            for keys, here in _pieces(extra, mask, anchors.device):
                self.blocks.accumulate(anchors, keys, sums, mask=here)
            return
        ranks = group()
        every, mask = Statistics.empty(all_gather(sums.rate, ranks)), _of_all_anchors(mask, ranks)
        for block in keys_of(anchors, ranks, self.plan.settings.gather).blocks():
            for keys, here in _pieces(extra, mask and mask[block.columns, :], anchors.device):
                self.blocks.accumulate(block.rows, keys, every[block.columns], mask=here)
        merge(every, sums, ranks)

    def differentiate_extra(
        self, anchors: Tensor, extra: ExtraKeys | None, weights: Weights | None, mask: Mask | None,
        d_anchors: Tensor | None,
    ) -> None:  # fmt: skip
        """Add the gradients of their anchors (b, D). For those of sharded keys, ranks work for one another."""
        if extra is None or d_anchors is None or weights is None:
            return
        if not extra.sharded:
            for keys, here in _pieces(extra, mask, anchors.device):
                self.blocks.differentiate(anchors, keys, weights, d_anchors=d_anchors, mask=here)
            return
        ranks = group()
        every, mask = gather_weights(weights, ranks), _of_all_anchors(mask, ranks)
        travelling = keys_of(anchors, ranks, self.plan.settings.gather)
        for block in travelling.blocks(self.plan.dtype, self.plan.gradient_width):
            for keys, here in _pieces(extra, mask and mask[block.columns, :], anchors.device):
                rows = every and every[block.columns]
                self.blocks.differentiate(block.rows, keys, rows, d_anchors=block.gradient, mask=here)
        assert travelling.gradient is not None
        d_anchors += travelling.gradient


def _as_wide(gradient: Tensor, features: Tensor) -> Tensor:
    """In the features' type, and 0 in the columns that have none."""
    missing = features.shape[1] - gradient.shape[1]
    return F.pad(gradient.to(features.dtype), (0, missing)) if missing else gradient.to(features.dtype)


def _pieces(extra: ExtraKeys, mask: Mask | None, device: torch.device) -> Iterator[tuple[Tensor, Mask | None]]:
    """The keys on a device, all at once where they are there, and what anchors leave out of them."""
    step = max(1, len(extra.rows) if extra.rows.device == device else PIECE)
    for start in range(0, len(extra.rows), step):
        part = slice(start, start + step)
        yield extra.rows[part].to(device), mask and mask[:, part]


def _of_all_anchors(mask: Mask | None, ranks: Group) -> Mask | None:
    """A mask of this rank's anchors -> of all ranks', for the same keys."""
    if mask is None:
        return None
    limit = None if mask.row_limit is None else all_gather(mask.row_limit, ranks)
    return replace(mask, row_groups=tuple(all_gather(x, ranks) for x in mask.row_groups), row_limit=limit)


def merge(columns: Statistics, into: Statistics, ranks: Group) -> None:
    """Every rank's sums (B,) over its own keys -> this rank's anchors' sums (b,) over all keys. 3 B numbers travel."""
    parts = torch.stack([columns.shift, columns.mass, columns.moment]).view(3, ranks.size, -1)
    for shift, mass, moment in exchange(parts.transpose(0, 1), ranks):
        into.add(shift, mass, moment)


def expected_of(side: Statistics, offset: Tensor) -> Tensor:
    """(b,); 0 of an anchor to which no key is left."""
    return torch.where(side.mass > 0, offset + side.moment / side.mass / LOG2_E, 0.0)


def side_weights(
    upstream: Tensor | None, shift: Tensor, mass: Tensor, temperature: Tensor, positive: Tensor, *,
    dtype: torch.dtype, exclude_positive: bool = False, centred: bool = True,
) -> tuple[Weights | None, Tensor]:  # fmt: skip
    """One direction's weights, and its part of the positives' weights (b,) in float64."""
    if upstream is None:
        return None, torch.zeros_like(positive, dtype=torch.float64)
    per_unit = torch.where(mass > 0, upstream.double() / temperature.double(), 0.0)  # no key: a constant, -inf
    factor = torch.where(mass > 0, per_unit / mass.double(), 0.0)
    part = torch.zeros_like(factor)
    if not exclude_positive:
        part = factor * ((positive.double() - shift.double()) / temperature.double()).exp()
    if centred:
        part = part - per_unit
    return Weights(LOG2_E / temperature, shift, factor.to(dtype)), part


def gather_weights(weights: Weights | None, ranks: Group) -> Weights | None:
    """(b,) of each rank -> (B,)."""
    if weights is None or ranks.size == 1:
        return weights
    numbers = all_gather(torch.stack([weights.rate, weights.shift, weights.factor], dim=1), ranks)
    rate, shift, factor = numbers.T.contiguous()
    return Weights(rate, shift, factor)
