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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amclr_scale.distributed.collectives import Group, all_gather, exchange
from amclr_scale.distributed.first_order import first_order_only
from amclr_scale.similarity.backends import blocks_for
from amclr_scale.similarity.blocks import Blocks, Mask, Statistics, TileCache, Weights
from amclr_scale.similarity.keys import GatheredKeys, Keys, keys_of
from amclr_scale.similarity.masks import Masks
from amclr_scale.similarity.settings import Distribution, Settings

LOG2_E = math.log2(math.e)


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
    will_differentiate: bool

    def keys(self, local: Tensor, gathered: Tensor | None = None) -> Keys:
        if gathered is not None:
            return GatheredKeys(gathered, self.ranks)
        return keys_of(local, self.ranks, self.settings.gather)


class LogSums(torch.autograd.Function):
    """(plan, image, text (b, D), temperatures of image and text anchors (b,), extra text and image keys (M, D) or None)
    -> log-sums of image and text anchors, positives, expectations of image and text anchors: (b,) each.
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        image, text, image_t, text_t, extra_text, extra_image = inputs
        assert image is not None
        assert text is not None
        assert image_t is not None
        assert text_t is not None
        masks = plan.masks
        cache = TileCache(plan.settings.cache_bytes if plan.will_differentiate else 0)
        with torch.autocast(image.device.type, enabled=False):
            positive = torch.empty_like(image_t, memory_format=torch.contiguous_format)
            images, texts = Statistics.empty(LOG2_E / image_t), Statistics.empty(LOG2_E / text_t)
            text_keys = plan.keys(text)
            stream = _Stream(plan, blocks_for(plan.settings, plan.dtype, image, text, extra_text, extra_image), cache)
            if plan.distribution == "two_blocks":
                stream.accumulate(image, text_keys, images, mask=masks.images, positive=positive)
                stream.accumulate(text, plan.keys(image), texts, mask=masks.texts)
            else:
                columns = Statistics.empty(all_gather(texts.rate, plan.ranks))
                stream.accumulate(image, text_keys, images, columns, mask=masks.images, positive=positive)
                _merge(columns, texts, plan.ranks)
            if extra_text is not None:
                stream.blocks.accumulate(image, extra_text, images, mask=masks.extra_texts)
            if extra_image is not None:
                stream.blocks.accumulate(text, extra_image, texts, mask=masks.extra_images)

            centre = positive if plan.centred else torch.zeros_like(positive)
            image_offset, text_offset = (images.shift - centre) / image_t, (texts.shift - centre) / text_t
            image_sum, text_sum = image_offset + images.mass.log(), text_offset + texts.mass.log()
            image_expected = _expected(images, image_offset)
            text_expected = _expected(texts, text_offset)

        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(image_expected, text_expected)
        gathered = text_keys.rows if isinstance(text_keys, GatheredKeys) and plan.will_differentiate else None
        ctx.save_for_backward(*inputs, gathered, positive, image_expected, text_expected,
                              images.shift, images.mass, texts.shift, texts.mass, *cache.tiles)  # fmt: skip
        return image_sum, text_sum, positive, image_expected, text_expected

    @staticmethod
    @first_order_only
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        d_image_sum, d_text_sum, d_positive = upstream[:3]
        image, text, image_t, text_t, extra_text, extra_image, gathered, positive, *rest = ctx.saved_tensors
        image_expected, text_expected, image_shift, image_mass, text_shift, text_mass, *tiles = rest
        need_image, need_text, need_image_t, need_text_t = ctx.needs_input_grad[1:5]

        with torch.autocast(image.device.type, enabled=False):
            images, image_positive = _weights(plan, d_image_sum, image_shift, image_mass, image_t, positive)
            texts, text_positive = _weights(plan, d_text_sum, text_shift, text_mass, text_t, positive)
            total = image_positive + text_positive + (0 if d_positive is None else d_positive)

            stream = _Stream(
                plan,
                blocks_for(plan.settings, plan.dtype, image, text, extra_text, extra_image),
                TileCache(tiles=tiles),
                total.to(plan.dtype),
            )
            d_image = torch.zeros_like(image, dtype=plan.dtype) if need_image else None
            d_text: Tensor | None = None
            together = need_text and plan.distribution == "reduce_scatter"
            if need_image or together:
                text_keys = plan.keys(text, gathered)
                stream.differentiate(
                    image, text_keys, images, texts, mask=plan.masks.images, d_anchors=d_image, also_keys=together
                )
                d_text = text_keys.gradient
            if need_text and not together:
                if plan.distribution == "column_sums" or not need_image:
                    stream.cache = TileCache()  # the tiles in it are those of the pass above
                d_text = torch.zeros_like(text, dtype=plan.dtype)
                stream.differentiate(text, plan.keys(image), texts, images, mask=plan.masks.texts, d_anchors=d_text)
            if images and d_image is not None and extra_text is not None:
                mask = plan.masks.extra_texts
                stream.blocks.differentiate(image, extra_text, images, d_anchors=d_image, mask=mask)
            if texts and d_text is not None and extra_image is not None:
                mask = plan.masks.extra_images
                stream.blocks.differentiate(text, extra_image, texts, d_anchors=d_text, mask=mask)

        return (
            None,
            None if d_image is None else d_image.to(image.dtype),
            None if d_text is None else d_text.to(text.dtype),
            -d_image_sum * image_expected / image_t if need_image_t and d_image_sum is not None else None,
            -d_text_sum * text_expected / text_t if need_text_t and d_text_sum is not None else None,
            None,
            None,
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
        columns = _gather(columns, self.plan.ranks)
        for block in keys.blocks(gradient=self.plan.dtype if also_keys else None):
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


def _merge(columns: Statistics, into: Statistics, ranks: Group) -> None:
    """Every rank's sums (B,) over its own keys -> this rank's anchors' sums (b,) over all keys. 3 B numbers travel."""
    parts = torch.stack([columns.shift, columns.mass, columns.moment]).view(3, ranks.size, -1)
    for shift, mass, moment in exchange(parts.transpose(0, 1), ranks):
        into.add(shift, mass, moment)


def _expected(side: Statistics, offset: Tensor) -> Tensor:
    """(b,); 0 of an anchor to which no key is left."""
    return torch.where(side.mass > 0, offset + side.moment / side.mass / LOG2_E, 0.0)


def _weights(
    plan: Plan, upstream: Tensor | None, shift: Tensor, mass: Tensor, *numbers: Tensor
) -> tuple[Weights | None, Tensor]:
    """One direction's weights, and its part of the positives' weights (b,) in float64."""
    temperature, positive = numbers
    if upstream is None:
        return None, torch.zeros_like(positive, dtype=torch.float64)
    per_unit = torch.where(mass > 0, upstream.double() / temperature.double(), 0.0)  # no key: a constant, -inf
    factor = torch.where(mass > 0, per_unit / mass.double(), 0.0)
    part = torch.zeros_like(factor)
    if not plan.exclude_positive:
        part = factor * ((positive.double() - shift.double()) / temperature.double()).exp()
    if plan.centred:
        part = part - per_unit
    return Weights(LOG2_E / temperature, shift, factor.to(plan.dtype)), part


def _gather(weights: Weights | None, ranks: Group) -> Weights | None:
    """(b,) of each rank -> (B,)."""
    if weights is None or ranks.size == 1:
        return weights
    numbers = all_gather(torch.stack([weights.rate, weights.shift, weights.factor], dim=1), ranks)
    rate, shift, factor = numbers.T.contiguous()
    return Weights(rate, shift, factor)
