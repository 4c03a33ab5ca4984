"""The primitive on which the objectives stand: log-sums of similarities with all ranks' keys, in both directions.

b  anchors of this rank    B = b W  keys, over all ranks    M  extra keys    D  width

For image anchors a_i and text keys k_j (and the other way round for text anchors), with s_ij = a_i . k_j, a temperature
t_i per anchor, c_i = s_ii if centred or else 0, and N_i all keys, or all but the positive, and any extra ones:

    x_ij = (s_ij - c_i) / t_i        log_sum_i = log sum_{j in N_i} exp(x_ij)        p_ij = exp(x_ij - log_sum_i)
    expected_i = sum_j p_ij x_ij

    d log_sum_i = (1/t_i) sum_j p_ij d(s_ij - c_i) - (expected_i / t_i) d t_i

Forward streams tiles of s and keeps numbers per anchor; backward makes the tiles again. One tile serves the rows (image
anchors) and the columns (text anchors). Across ranks go the features and numbers per anchor; whether the gradient of
one tower does is a matter of speed (`distribution.py`). Nothing of size b x B outlives a tile, unless
`Settings.cache_bytes` pays for it. Similarities and sums are float32 (float64 for float64 features), also for features
of 16 bits and under autocast.
"""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from amclr_scale.similarity import settings
from amclr_scale.similarity.blocks import Blocks, Statistics, TileCache, Weights
from amclr_scale.similarity.collectives import Group, Negatives, all_gather, check_even, exchange, group
from amclr_scale.similarity.distribution import choose
from amclr_scale.similarity.keys import GatheredKeys, Keys, keys_of
from amclr_scale.similarity.settings import Distribution, Settings
from amclr_scale.similarity.torch_backend import TorchBlocks, similarity_dtype

Temperature = float | Tensor

LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Side:
    """One direction; tensors over this rank's anchors."""

    log_sum: Tensor  # (b,) differentiable in anchors, keys and temperature
    positive: Tensor  # (b,) s_ii, differentiable in anchors and keys; not divided by the temperature
    expected: Tensor  # (b,) without gradient
    num_keys: int  # |N_i|


@dataclass(frozen=True)
class Contrast:
    """Both directions."""

    image: Side  # anchors: the first argument's rows; keys: the second's
    text: Side  # anchors: the second argument's rows; keys: the first's

    @property
    def num_keys(self) -> int:
        """The number of keys of each anchor, where both directions have the same.

        Raises:
            ValueError: extra keys on one side only; ask that side.
        """
        if self.image.num_keys != self.text.num_keys:
            raise ValueError(
                f"num_keys: image anchors have {self.image.num_keys} keys, text anchors {self.text.num_keys}; "
                "ask .image.num_keys or .text.num_keys"
            )
        return self.image.num_keys


def contrast(
    image: Tensor,
    text: Tensor,
    *,
    temperature: Temperature | tuple[Temperature, Temperature],
    exclude_positive: bool = False,
    centred: bool = False,
    extra_image_keys: Tensor | None = None,
    extra_text_keys: Tensor | None = None,
    negatives: Negatives = "all",
) -> Contrast:
    """Contrast each image with the texts of all ranks, and each text with the images of all ranks.

    Any two views serve, also two of one modality or the same tensor twice. `centred` log-sums are the more exact ones:
    they subtract the positive before the division by the temperature.

    Args:
        image: (b, D), this rank's rows; every rank has as many.
        text: (b, D), row i is the positive of image row i.
        temperature: of all anchors, (), (1,) or a number; of each, (b,); or a pair (image anchors, text anchors).
        exclude_positive: leave the positive out of the sums (j != i).
        centred: subtract the positive's similarity from all others (c_i = s_ii).
        extra_image_keys: (M, D), further keys for text anchors, without gradient, the same on every rank.
        extra_text_keys: (M, D), further keys for image anchors.
        negatives: whose keys count: "all" ranks', "local", or those of a group of so many consecutive ranks.

    Raises:
        ValueError: shapes or temperatures that cannot be, an uneven batch, or no key left.
    """
    ranks = group(negatives)
    _check(image, text, extra_image_keys, extra_text_keys)
    check_even(*_shape(image), ranks)
    b, now = len(image), settings.current()
    if exclude_positive and b * ranks.size == 1 and (extra_image_keys is None or extra_text_keys is None):
        raise ValueError(
            "exclude_positive: a global batch of 1 has no key but the positive; expected at least 2 samples, or extra "
            "keys for both sides"
        )
    dtype = similarity_dtype(image, text)
    of_image, of_text = temperature if isinstance(temperature, tuple) else (temperature, temperature)
    image_temperature = _per_anchor(of_image, image, dtype)
    text_temperature = image_temperature if of_text is of_image else _per_anchor(of_text, image, dtype)
    inputs = (image, text, image_temperature, text_temperature)
    plan = _Plan(
        ranks=ranks,
        settings=now,
        distribution=choose(now.distribution, ranks, b, image.device),
        dtype=dtype,
        exclude_positive=exclude_positive,
        centred=centred,
        will_differentiate=torch.is_grad_enabled() and any(x.requires_grad for x in inputs),
    )
    outputs = _Contrast.apply(plan, *inputs, extra_text_keys, extra_image_keys)  # type: ignore[no-untyped-call]
    image_log_sum, text_log_sum, positive, image_expected, text_expected = cast(tuple[Tensor, ...], outputs)
    num_keys = b * ranks.size - exclude_positive
    return Contrast(
        Side(image_log_sum, positive, image_expected, num_keys + _rows(extra_text_keys)),
        Side(text_log_sum, positive, text_expected, num_keys + _rows(extra_image_keys)),
    )


@dataclass(frozen=True)
class _Plan:
    """What forward decided, for backward to do likewise."""

    ranks: Group
    settings: Settings
    distribution: Distribution
    dtype: torch.dtype
    exclude_positive: bool
    centred: bool
    will_differentiate: bool

    def blocks(self, like: Tensor) -> Blocks:
        return TorchBlocks(self.settings, self.dtype, like)

    def keys(self, local: Tensor, gathered: Tensor | None = None) -> Keys:
        return (
            keys_of(local, self.ranks, self.settings.gather) if gathered is None else GatheredKeys(gathered, self.ranks)
        )


class _Contrast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: _Plan,
        image: Tensor,  # (b, D)
        text: Tensor,  # (b, D)
        image_temperature: Tensor,  # (b,)
        text_temperature: Tensor,  # (b,)
        extra_text_keys: Tensor | None,  # (M, D)
        extra_image_keys: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        with torch.autocast(image.device.type, enabled=False):
            blocks, first = plan.blocks(image), plan.ranks.rank * len(image)
            budget = plan.settings.cache_bytes if plan.will_differentiate else 0
            image_tiles = TileCache(budget)
            positive = image_temperature.new_empty(len(image))
            images = Statistics.empty(LOG2_E / image_temperature)
            text_rate = LOG2_E / text_temperature
            one_pass = plan.distribution != "two_blocks"
            # Columns are the other direction's anchors, of all ranks: each rank adds its images to their sums.
            columns = Statistics.empty(all_gather(text_rate, plan.ranks)) if one_pass else None

            text_keys = plan.keys(text)
            for keys in text_keys.blocks():
                blocks.accumulate(
                    image,
                    keys.rows,
                    images,
                    columns and columns[keys.first : keys.first + len(keys.rows)],
                    diagonal=keys.diagonal(first),
                    positive=positive,
                    exclude_positive=plan.exclude_positive,
                    cache=image_tiles,
                )
            text_tiles = TileCache(image_tiles.left)
            if columns:
                texts = _merge(columns, text_rate, plan.ranks)
            else:
                texts = Statistics.empty(text_rate)
                for keys in plan.keys(image).blocks():
                    blocks.accumulate(
                        text,
                        keys.rows,
                        texts,
                        diagonal=keys.diagonal(first),
                        exclude_positive=plan.exclude_positive,
                        cache=text_tiles,
                    )
            if extra_text_keys is not None:
                blocks.accumulate(image, extra_text_keys, images)
            if extra_image_keys is not None:
                blocks.accumulate(text, extra_image_keys, texts)

            centre = positive if plan.centred else torch.zeros_like(positive)
            sides = (images, image_temperature), (texts, text_temperature)
            offsets = [(side.shift - centre) / t for side, t in sides]
            log_sums = [offset + side.mass.log() for (side, _), offset in zip(sides, offsets, strict=True)]
            expected = [
                offset + side.moment / (side.mass * LOG2_E) for (side, _), offset in zip(sides, offsets, strict=True)
            ]

        ctx.plan, ctx.num_image_tiles = plan, len(image_tiles.tiles)
        gathered = text_keys.rows if isinstance(text_keys, GatheredKeys) and plan.will_differentiate else None
        per_anchor = (images.shift, images.mass, texts.shift, texts.mass, image_temperature, text_temperature)
        ctx.save_for_backward(
            image, text, gathered, extra_text_keys, extra_image_keys, positive, *expected, *per_anchor,
            *image_tiles.tiles, *text_tiles.tiles,
        )  # fmt: skip
        ctx.mark_non_differentiable(*expected)
        return (*log_sums, positive, *expected)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_image_log_sum: Tensor | None, d_text_log_sum: Tensor | None, d_positive: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        image, text, gathered, extra_text_keys, extra_image_keys, positive, *rest = ctx.saved_tensors
        image_expected, text_expected, image_shift, image_mass, text_shift, text_mass, image_t, text_t, *tiles = rest
        need_image, need_text, need_image_t, need_text_t = ctx.needs_input_grad[1:5]
        image_tiles = TileCache(tiles=tuple(tiles[: ctx.num_image_tiles]))
        text_tiles = TileCache(tiles=tuple(tiles[ctx.num_image_tiles :]))

        with torch.autocast(image.device.type, enabled=False):
            blocks, first = plan.blocks(image), plan.ranks.rank * len(image)
            images, image_weight = _weights(plan, d_image_log_sum, image_shift, image_mass, image_t, positive)
            texts, text_weight = _weights(plan, d_text_log_sum, text_shift, text_mass, text_t, positive)
            positive_weight = image_weight + text_weight
            if d_positive is not None:
                positive_weight = positive_weight + d_positive
            positive_weight = positive_weight.to(plan.dtype)

            both_at_once = plan.distribution == "reduce_scatter"
            d_image = torch.zeros_like(image, dtype=plan.dtype) if need_image else None
            d_text = torch.zeros_like(text, dtype=plan.dtype) if need_text and not both_at_once else None
            if need_image or (need_text and both_at_once):
                columns = _gather_weights(texts, plan.ranks)
                text_keys = plan.keys(text, gathered)
                for keys in text_keys.blocks(gradient=plan.dtype if need_text and both_at_once else None):
                    blocks.differentiate(
                        image,
                        keys.rows,
                        images,
                        columns and columns[keys.first : keys.first + len(keys.rows)],
                        d_image,
                        keys.gradient,
                        diagonal=keys.diagonal(first),
                        positive_weight=positive_weight,
                        cache=image_tiles,
                    )
                d_text = text_keys.gradient if both_at_once else d_text
            if need_text and not both_at_once:
                columns = _gather_weights(images, plan.ranks)
                for keys in plan.keys(image).blocks():
                    blocks.differentiate(
                        text,
                        keys.rows,
                        texts,
                        columns and columns[keys.first : keys.first + len(keys.rows)],
                        d_text,
                        None,
                        diagonal=keys.diagonal(first),
                        positive_weight=positive_weight,
                        cache=text_tiles,
                    )
            if images and d_image is not None and extra_text_keys is not None:
                blocks.differentiate(image, extra_text_keys, images, None, d_image, None)
            if texts and d_text is not None and extra_image_keys is not None:
                blocks.differentiate(text, extra_image_keys, texts, None, d_text, None)

        d_image_t = (
            -d_image_log_sum * image_expected / image_t if need_image_t and d_image_log_sum is not None else None
        )
        d_text_t = -d_text_log_sum * text_expected / text_t if need_text_t and d_text_log_sum is not None else None
        d_image = d_image if d_image is None else d_image.to(image.dtype)
        d_text = d_text if d_text is None else d_text.to(text.dtype)
        return None, d_image, d_text, d_image_t, d_text_t, None, None


def _merge(columns: Statistics, rate: Tensor, ranks: Group) -> Statistics:
    """This rank's anchors' sums over all ranks' keys, from every rank's sums over its own: 3 B numbers are sent."""
    if ranks.size == 1:
        return columns
    parts = torch.stack([columns.shift, columns.mass, columns.moment]).view(3, ranks.size, -1)
    merged = Statistics.empty(rate)
    for shift, mass, moment in exchange(parts.transpose(0, 1), ranks):
        merged.add(shift, mass, moment)
    return merged


def _weights(
    plan: _Plan, upstream: Tensor | None, shift: Tensor, mass: Tensor, temperature: Tensor, positive: Tensor
) -> tuple[Weights | None, Tensor]:
    """What makes one direction's weights, and its weight of the positives (b,) in float64."""
    if upstream is None:
        return None, torch.zeros_like(positive, dtype=torch.float64)
    per_unit = upstream.double() / temperature.double()
    factor = per_unit / mass.double()
    weight = torch.zeros_like(per_unit)
    if not plan.exclude_positive:
        weight = factor * ((positive.double() - shift.double()) / temperature.double()).exp()
    if plan.centred:
        weight = weight - per_unit
    return Weights((LOG2_E / temperature), shift, factor.to(plan.dtype)), weight


def _gather_weights(weights: Weights | None, ranks: Group) -> Weights | None:
    """All ranks' (B,), from each rank's (b,): 3 B numbers are sent."""
    if weights is None or ranks.size == 1:
        return weights
    gathered = all_gather(torch.stack([weights.rate, weights.shift, weights.factor], dim=1), ranks)
    rate, shift, factor = gathered.unbind(1)
    return Weights(rate.contiguous(), shift.contiguous(), factor.contiguous())


def _per_anchor(temperature: Temperature, anchors: Tensor, dtype: torch.dtype) -> Tensor:
    """(b,), differentiable in a temperature that is a tensor."""
    b = len(anchors)
    if not isinstance(temperature, Tensor):
        if not temperature > 0:
            raise ValueError(f"temperature: expected a number above 0, got {temperature}")
        return torch.full((b,), temperature, dtype=dtype, device=anchors.device)
    if temperature.shape not in ((), (1,), (b,)):
        raise ValueError(
            f"temperature: expected shape (), (1,) or ({b},), one per anchor of this rank; got {tuple(temperature.shape)}"
        )
    if temperature.device.type == "cpu" and not bool((temperature > 0).all()):  # elsewhere the look would be a wait
        raise ValueError(f"temperature: expected numbers above 0, got {float(temperature.min())}")
    return temperature.to(dtype=dtype, device=anchors.device).reshape(-1).expand(b)


def _check(image: Tensor, text: Tensor, extra_image_keys: Tensor | None, extra_text_keys: Tensor | None) -> None:
    if image.ndim != 2 or image.shape[0] == 0:
        raise ValueError(f"image: expected (b, D) with at least one row, got {tuple(image.shape)}")
    if text.shape != image.shape:
        raise ValueError(f"text: expected {tuple(image.shape)}, the shape of image, got {tuple(text.shape)}")
    for name, extra in (("extra_image_keys", extra_image_keys), ("extra_text_keys", extra_text_keys)):
        if extra is None:
            continue
        if extra.ndim != 2 or extra.shape[1] != image.shape[1]:
            raise ValueError(f"{name}: expected (M, {image.shape[1]}), got {tuple(extra.shape)}")
        if extra.requires_grad:
            raise ValueError(f"{name}: extra keys get no gradient; pass {name}.detach()")


def _shape(x: Tensor) -> tuple[int, int]:
    return x.shape[0], x.shape[1]


def _rows(extra: Tensor | None) -> int:
    return 0 if extra is None else len(extra)
