"""Contrast of samples that are made of tokens: late interaction, in both directions, over all ranks.

Yao et al., "FILIP: Fine-grained Interactive Language-Image Pre-Training", ICLR 2022, arXiv:2111.07783.

b  samples of this rank    B = b W  over all ranks    n1, n2  tokens of an image and of a text    D  width

With tokens f_ik of images and g_jr of texts, of which A_i and V_j count:

    s1_ij = mean_{k in A_i} max_{r in V_j} f_ik.g_jr          of image anchors i: each patch meets its best word
    s2_ij = mean_{r in V_j} max_{k in A_i} f_ik.g_jr          of text anchors j: each word meets its best patch

and log-sums, centred on the positive, of s1 over texts and of s2 over images, as in `contrast`. The gradient of a
maximum goes to the first of the tokens that reach it, image tokens in their order, text tokens in theirs.

Tiles of tokens are made in forward and again in backward (token_blocks.py); all texts' tokens cross ranks, their
gradients are summed over ranks, and so are the texts' statistics: a rank holds O((b + B) n D), or O(b n D) in a ring.
Work per pair of samples is n1 n2 that of `contrast`, bytes n2 times those, so gradients are always sent and never
made twice (distribution.py).
"""

from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor

from amclr_scale.distributed.collectives import Group, all_gather, check_even, group
from amclr_scale.distributed.first_order import first_order_only
from amclr_scale.similarity import settings
from amclr_scale.similarity.backends import TORCH, similarity_dtype
from amclr_scale.similarity.blocks import MASKED, Mask, Statistics
from amclr_scale.similarity.contrast import Contrast, Side, Temperature, per_anchor
from amclr_scale.similarity.keys import keys_of
from amclr_scale.similarity.log_sums import LOG2_E, expected_of, gather_weights, merge, side_weights
from amclr_scale.similarity.masks import Grouping, Groups, masks
from amclr_scale.similarity.precision import form_of
from amclr_scale.similarity.settings import Settings
from amclr_scale.similarity.token_blocks import Counted, Pairing, TokenBlocks

OWN_NUMBERS = 2**21  # of products of tokens of the same sample at a time


def token_contrast(
    image: Tensor,
    text: Tensor,
    image_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    *,
    temperature: Temperature,
    image_groups: Groups | None = None,
    text_groups: Groups | None = None,
    margin: float | None = None,
) -> Contrast:
    """Contrast each image with the texts of all ranks, and each text with the images of all ranks, token by token.

    Args:
        image: (b, n1, D), this rank's tokens; every rank has as many samples and tokens.
        text: (b, n2, D), row i is the positive of image row i.
        image_mask: (b, n1) bool, the tokens that count; None: all. A sample of which none does counts with all.
        text_mask: (b, n2) bool.
        temperature: of all anchors, (), (1,) or a number; or of each, (b,).
        image_groups: (b,) int64, a number of every image, as in `contrast`: samples of one group are no negatives.
        text_groups: (b,) int64, of every text.
        margin: leave out keys whose similarity exceeds the positive's by more, each direction by its own similarity.

    Returns:
        Centred log-sums; each side has positives of its own.

    Raises:
        ValueError: shapes, types, devices or temperatures that cannot be, or an uneven batch.
    """
    _check(image, text, image_mask, text_mask)
    ranks, now, dtype = group(), settings.current(), similarity_dtype(image, text)
    image, text = image.contiguous(), text.contiguous()  # tokens end to end are one view of them
    b, n1, D = image.shape
    n2 = text.shape[1]
    check_even(b, n1 * D, ranks)
    check_even(b, n2 * D, ranks)
    t = per_anchor(temperature, image, dtype)
    words = _there(text_mask, text)
    images, texts = (Counted.of(x, dtype) for x in (_there(image_mask, image), all_gather(words, ranks)))
    groups = Grouping(image_groups, text_groups, None, None, "others")
    left_out = masks(groups, b, 0, 0, exclude_positive=False, limit=None, ranks=ranks)
    mask = left_out.images
    if margin is not None:
        if margin < 0:
            raise ValueError(f"margin: expected a difference of similarities of at least 0, got {margin}")
        mine = texts[ranks.rank * b : (ranks.rank + 1) * b]
        of_image, of_text = (x + margin for x in _own(image.detach(), text.detach(), images, mine, dtype))
        mask = replace(mask or Mask(), row_limit=of_image, column_limit=all_gather(of_text, ranks))
    plan = _Plan(ranks, now, dtype, images, texts, (n1, n2), torch.is_grad_enabled(), mask)
    outputs = _TokenLogSums.apply(plan, image, text, t)  # type: ignore[no-untyped-call]
    image_sum, text_sum, image_own, text_own, image_expected, text_expected = cast(tuple[Tensor, ...], outputs)
    B = b * ranks.size
    return Contrast(
        Side(image_sum, image_own, image_expected, B, left_out.kept_texts),
        Side(text_sum, text_own, text_expected, B, left_out.kept_images),
    )


def _own(image: Tensor, text: Tensor, images: Counted, texts: Counted, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """s1_ii and s2_ii of this rank's samples, (b,) each, without gradient."""
    found: list[tuple[Tensor, Tensor]] = []
    size = max(1, OWN_NUMBERS // (image.shape[1] * text.shape[1]))
    for start in range(0, len(image), size):
        rows = slice(start, start + size)
        with torch.autocast(image.device.type, enabled=False):
            products = image[rows].to(dtype) @ text[rows].to(dtype).mT  # (r, n1, n2)
        for there, dim in ((images[rows].there, 2), (texts[rows].there, 1)):
            if there is not None:
                products.masked_fill_(~there.unsqueeze(dim), MASKED)
        of_image = (products.amax(2) * images[rows].shares).sum(1)
        found.append((of_image, (products.amax(1) * texts[rows].shares).sum(1)))
    one, other = zip(*found, strict=True)
    return torch.cat(one), torch.cat(other)


def _there(mask: Tensor | None, tokens: Tensor) -> Tensor:
    """(b, n) bool."""
    if mask is None:
        return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    mask = mask.to(tokens.device)
    return mask | ~mask.any(1, keepdim=True)


def _check(image: Tensor, text: Tensor, image_mask: Tensor | None, text_mask: Tensor | None) -> None:
    if image.ndim != 3 or not image.numel():
        raise ValueError(f"image: expected tokens (b, n, D), at least one of a sample, got {tuple(image.shape)}")
    if text.ndim != 3 or not text.numel() or (len(text), text.shape[2]) != (len(image), image.shape[2]):
        raise ValueError(f"text: expected ({len(image)}, n, {image.shape[2]}), got {tuple(text.shape)}")
    for name, x, mask in (("image", image, image_mask), ("text", text, text_mask)):
        if not x.is_floating_point() or x.device != image.device:
            got = f"{x.dtype} on {x.device}"
            raise ValueError(f"{name}: expected floating-point tokens on {image.device}, got {got}")
        if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool):
            got = f"{tuple(mask.shape)} {mask.dtype}"
            raise ValueError(f"{name}_mask: expected {tuple(x.shape[:2])} torch.bool, got {got}")


@dataclass(frozen=True)
class _Plan:
    """What forward decided, for backward to do likewise."""

    ranks: Group
    settings: Settings
    dtype: torch.dtype
    images: Counted  # of this rank
    texts: Counted  # of all ranks
    tokens: tuple[int, int]
    will_differentiate: bool
    mask: Mask | None  # (b, B), of samples

    def blocks(self, *tokens: Tensor) -> TokenBlocks:
        device = tokens[0].device
        widest = reduce(torch.promote_types, (x.dtype for x in tokens))
        form = form_of(self.settings, widest, fast_narrow=TORCH.fast_narrow(device))
        return TokenBlocks(self.settings, self.dtype, form, device, self.tokens)

    def pairing(self, columns: slice, diagonal: int | None) -> Pairing:
        return Pairing(self.images, self.texts[columns], diagonal, self.mask and self.mask[:, columns])


class _TokenLogSums(torch.autograd.Function):
    """(plan, image (b, n1, D), text (b, n2, D), temperatures (b,)) -> log-sums of image and text anchors, positives
    and expectations of both: (b,) each.
    """

    @staticmethod
    def forward(ctx: Any, plan: _Plan, image: Tensor, text: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        D, ranks, b = image.shape[2], plan.ranks, len(image)
        with torch.autocast(image.device.type, enabled=False):
            own = torch.empty(b, dtype=plan.dtype, device=image.device), torch.empty_like(t.contiguous())
            rows, columns = Statistics.empty(LOG2_E / t), Statistics.empty(all_gather(LOG2_E / t, ranks))
            blocks = plan.blocks(image, text)
            for block in keys_of(text.flatten(1), ranks, plan.settings.gather).blocks():
                pairs = plan.pairing(block.columns, block.diagonal(ranks.rank * b))
                blocks.accumulate_pairs(
                    image.reshape(-1, D), block.rows.view(-1, D), pairs, rows, columns[block.columns], own
                )
            texts = Statistics.empty(LOG2_E / t)
            merge(columns, texts, ranks)
            sums, expected = [], []
            for side, positive in ((rows, own[0]), (texts, own[1])):
                offset = (side.shift - positive) / t
                sums.append(offset + side.mass.log())
                expected.append(expected_of(side, offset))
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*expected)
        ctx.save_for_backward(image, text, t, *own, *expected, rows.shift, rows.mass, texts.shift, texts.mass)
        return *sums, *own, *expected

    @staticmethod
    @first_order_only
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        image, text, t, *rest = ctx.saved_tensors
        own, expected, statistics = rest[:2], rest[2:4], (rest[4:6], rest[6:8])
        D, ranks, (need_image, need_text, need_t) = image.shape[2], plan.ranks, ctx.needs_input_grad[1:4]
        with torch.autocast(image.device.type, enabled=False):
            sides, positives = [], []
            for d_sum, d_own, (shift, mass), positive in zip(upstream[:2], upstream[2:4], statistics, own, strict=True):
                weights, part = side_weights(d_sum, shift, mass, t, positive, dtype=plan.dtype)
                sides.append(weights)
                positives.append((part if d_own is None else part + d_own).to(plan.dtype))
            columns = gather_weights(sides[1], ranks)
            d_image = torch.zeros_like(image, dtype=plan.dtype) if need_image else None
            blocks, keys = plan.blocks(image, text), keys_of(text.flatten(1), ranks, plan.settings.gather)
            for block in keys.blocks(gradient=plan.dtype if need_text else None):
                blocks.differentiate_pairs(
                    image.reshape(-1, D),
                    block.rows.view(-1, D),
                    plan.pairing(block.columns, block.diagonal(ranks.rank * len(image))),
                    sides[0],
                    columns and columns[block.columns],
                    (positives[0], positives[1]),
                    d_images=None if d_image is None else d_image.view(-1, D),
                    d_texts=None if block.gradient is None else block.gradient.view(-1, D),
                )
        d_t = [
            -d_sum * side / t
            for d_sum, side in zip(upstream[:2], expected, strict=True)
            if d_sum is not None and need_t
        ]
        return (
            None,
            None if d_image is None else d_image.to(image.dtype),
            None if keys.gradient is None else keys.gradient.view_as(text).to(text.dtype),
            sum(d_t[1:], d_t[0]) if d_t else None,
        )
