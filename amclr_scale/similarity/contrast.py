"""The primitive on which the objectives stand: log-sums of similarities with all ranks' keys, in both directions.

b  anchors of this rank    B = b W  keys, over all ranks    M  extra keys    D  width

For image anchors a_i and text keys k_j (and the other way round for text anchors), with s_ij = a_i . k_j, a temperature
t_i per anchor, c_i = s_ii if centred or else 0, and N_i all keys, or all but the positive, and any extra ones:

    x_ij = (s_ij - c_i) / t_i        log_sum_i = log sum_{j in N_i} exp(x_ij)        p_ij = exp(x_ij - log_sum_i)
    expected_i = sum_j p_ij x_ij

    d log_sum_i = (1/t_i) sum_j p_ij d(s_ij - c_i) - (expected_i / t_i) d t_i

Groups leave keys out: with g_i the number of anchor i and g_j that of key j, N_i loses every j but the positive that
has g_j = g_i, or, with `group_keys="own"`, every j but the positive that has another. So duplicates stop being
negatives, and log-sums over further positives are had. `margin` leaves out keys with s_ij > s_ii + margin.

Forward streams tiles of s and keeps numbers per anchor; backward makes the tiles again. One tile serves the rows (image
anchors) and the columns (text anchors). Across ranks go the features and numbers per anchor; whether the gradient of
one tower does is a matter of speed (`distribution.py`). Nothing of size b x B outlives a tile, unless
`Settings.cache_bytes` pays for it. Similarities and sums are float32 (float64 for float64 features), also for features
of 16 bits and under autocast.
"""

import math
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from amclr_scale.distributed.collectives import Negatives, check_even, group
from amclr_scale.similarity import settings
from amclr_scale.similarity.backends import check_features, similarity_dtype
from amclr_scale.similarity.distribution import choose
from amclr_scale.similarity.keys import ExtraKeys
from amclr_scale.similarity.log_sums import LogSums, Plan
from amclr_scale.similarity.masks import Grouping, GroupKeys, Groups, counted, masks, own_mask

Temperature = float | Tensor


@dataclass(frozen=True)
class Side:
    """One direction; tensors over this rank's anchors."""

    log_sum: Tensor  # (b,) differentiable in anchors, keys and temperature
    positive: Tensor  # (b,) s_ii, differentiable in anchors and keys; not divided by the temperature
    expected: Tensor  # (b,) without gradient
    num_keys: int  # |N_i| where no key is left out
    kept: Tensor | None = None  # (b,) int64, |N_i| where groups or ids leave keys out; None without

    @property
    def log_num_keys(self) -> float | Tensor:
        """The logarithm of |N_i|, of everybody or of each anchor (b,); 0 where no key is left."""
        if self.kept is None:
            return math.log(self.num_keys)
        return self.kept.clamp(min=1).to(self.log_sum.dtype).log()


@dataclass(frozen=True)
class Contrast:
    """Both directions."""

    image: Side  # anchors: the first argument's rows; keys: the second's
    text: Side  # anchors: the second argument's rows; keys: the first's

    @property
    def num_keys(self) -> int:
        """The number of keys of each anchor, where both directions have the same.

        Raises:
            ValueError: extra keys on one side only, or keys that are left out; ask a side.
        """
        if self.image.kept is not None:
            raise ValueError("num_keys: anchors have different numbers; ask .image.kept or .text.kept")
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
    extra_image_keys: Tensor | ExtraKeys | None = None,
    extra_text_keys: Tensor | ExtraKeys | None = None,
    image_groups: Groups | None = None,
    text_groups: Groups | None = None,
    extra_image_groups: Groups | None = None,
    extra_text_groups: Groups | None = None,
    group_keys: GroupKeys = "others",
    margin: float | None = None,
    limit: Tensor | None = None,
    negatives: Negatives = "all",
    batch_negatives: bool = True,
    key_gradient: bool = True,
    gradient_width: int | None = None,
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
        extra_image_keys: (M, D), further keys for text anchors, without gradient, the same on every rank; or
            `ExtraKeys`, which may be sharded over all ranks, and of which anchors leave out those of their own id.
        extra_text_keys: likewise, further keys for image anchors.
        image_groups: (b,) int64, a number of every image, whether it is an anchor or a key; or two such tensors, of
            which it is enough that one agrees. A negative number agrees with none. Positives follow `exclude_positive`
            whatever their numbers. An anchor that is left without keys has the log-sum -inf, without gradient.
        text_groups: (b,) int64, of every text.
        extra_image_groups: (M,) int64, of the extra keys that are a tensor; None: they are in no group.
        extra_text_groups: (M,) int64.
        group_keys: keep the keys of "others", or those of an anchor's "own" group.
        margin: leave out keys whose similarity exceeds the positive's by more; None: none. Neither the limit nor the
            choice has a gradient, and `kept` does not see it.
        limit: (b,), leave out keys whose similarity exceeds it, in place of a margin over the positive of this call.
        negatives: whose keys count: "all" ranks', "local", or those of a group of so many consecutive ranks.
        batch_negatives: False: of the batch an anchor meets its positive alone, and there are no groups.
        key_gradient: False: no gradient flows into what an anchor is compared with, its positive among it.
        gradient_width: of image and text, only so many of the first columns get a gradient; None: all. What is behind
            them, such as features of a frozen model, costs a share of the products of similarities and none of those
            of gradients.

    Raises:
        ValueError: shapes, types, devices or temperatures that cannot be, an uneven batch, or no key left.
    """
    if not key_gradient:
        one, other = (
            contrast(
                rows, keys, temperature=temperature, exclude_positive=exclude_positive, centred=centred,
                extra_image_keys=extra_image_keys, extra_text_keys=extra_text_keys, image_groups=image_groups,
                text_groups=text_groups, extra_image_groups=extra_image_groups, extra_text_groups=extra_text_groups,
                group_keys=group_keys, margin=margin, limit=limit, negatives=negatives, batch_negatives=batch_negatives,
                gradient_width=gradient_width,
            )
            for rows, keys in ((image, text.detach()), (image.detach(), text))
        )  # fmt: skip
        return Contrast(one.image, other.text)
    ranks = group(negatives)
    extra_images = ExtraKeys(extra_image_keys) if isinstance(extra_image_keys, Tensor) else extra_image_keys
    extra_texts = ExtraKeys(extra_text_keys) if isinstance(extra_text_keys, Tensor) else extra_text_keys
    _check(image, text, extra_images, extra_texts)
    if gradient_width is not None and not 0 < gradient_width <= image.shape[1]:
        raise ValueError(f"gradient_width: expected 1 to {image.shape[1]} columns, got {gradient_width}")
    check_even(image.shape[0], image.shape[1], ranks)
    b, now = len(image), settings.current()
    if not batch_negatives and (image_groups is not None or text_groups is not None):
        raise ValueError("batch_negatives: expected True where keys have groups, got False")
    if (
        exclude_positive
        and (b * ranks.size == 1 or not batch_negatives)
        and (extra_image_keys is None or extra_text_keys is None)
    ):
        raise ValueError(
            "exclude_positive: a global batch of 1, or one without batch_negatives, has no key but the positive; "
            "expected at least 2 samples, or extra keys for both sides"
        )
    dtype = similarity_dtype(image, text)
    of_image, of_text = temperature if isinstance(temperature, tuple) else (temperature, temperature)
    image_temperature = per_anchor(of_image, image, dtype)
    text_temperature = image_temperature if of_text is of_image else per_anchor(of_text, image, dtype)
    inputs = (image, text, image_temperature, text_temperature)
    if limit is not None:
        if limit.shape != (b,) or margin is not None:
            beside = "" if margin is None else f" beside margin={margin}"
            raise ValueError(f"limit: expected shape ({b},) without a margin, got {tuple(limit.shape)}{beside}")
        limit = limit.detach().to(dtype)
    if margin is not None:
        if margin < 0:
            raise ValueError(f"margin: expected a difference of similarities of at least 0, got {margin}")
        limit = (image.detach().to(dtype) * text.detach().to(dtype)).sum(1) + margin
    tensors = [len(x) if isinstance(x, Tensor) else 0 for x in (extra_image_keys, extra_text_keys)]
    left_out = masks(
        Grouping(image_groups, text_groups, extra_image_groups, extra_text_groups, group_keys),
        b,
        *tensors,
        exclude_positive=exclude_positive,
        limit=limit,
        ranks=ranks,
    )
    if isinstance(extra_image_keys, ExtraKeys):
        left_out = replace(left_out, extra_images=own_mask(extra_image_keys, limit, group_keys))
    if isinstance(extra_text_keys, ExtraKeys):
        left_out = replace(left_out, extra_texts=own_mask(extra_text_keys, limit, group_keys))
    plan = Plan(
        ranks=ranks,
        settings=now,
        distribution=choose(now.distribution, ranks, b, image.device),
        dtype=dtype,
        exclude_positive=exclude_positive,
        centred=centred,
        masks=left_out,
        batch_negatives=batch_negatives,
        extra_texts=extra_texts,
        extra_images=extra_images,
        will_differentiate=torch.is_grad_enabled() and any(x.requires_grad for x in inputs),
        gradient_width=gradient_width,
    )
    outputs = LogSums.apply(plan, *inputs)  # type: ignore[no-untyped-call]
    image_log_sum, text_log_sum, positive, image_expected, text_expected = cast(tuple[Tensor, ...], outputs)
    num_keys = (b * ranks.size if batch_negatives else 1) - exclude_positive
    return Contrast(
        Side(image_log_sum, positive, image_expected, *_counts(num_keys, extra_text_keys, left_out.kept_texts)),
        Side(text_log_sum, positive, text_expected, *_counts(num_keys, extra_image_keys, left_out.kept_images)),
    )


def _counts(in_batch: int, extra: Tensor | ExtraKeys | None, kept: Tensor | None) -> tuple[int, Tensor | None]:
    """The keys of an anchor where none is left out, and those of each anchor (b,) where some are."""
    if not isinstance(extra, ExtraKeys):
        return in_batch + (0 if extra is None else len(extra)), kept
    there, met = counted(extra)
    if isinstance(met, Tensor):
        return in_batch + there, met + (in_batch if kept is None else kept)
    return in_batch + there, None if kept is None else kept + met


def per_anchor(temperature: Temperature, anchors: Tensor, dtype: torch.dtype) -> Tensor:
    """(b,), differentiable in a temperature that is a tensor."""
    b = len(anchors)
    if not isinstance(temperature, Tensor):
        if not temperature > 0:
            raise ValueError(f"temperature: expected a number above 0, got {temperature}")
        return torch.full((b,), temperature, dtype=dtype, device=anchors.device)
    if temperature.shape not in ((), (1,), (b,)):
        raise ValueError(
            f"temperature: expected shape (), (1,), or ({b},) with one per anchor; got {tuple(temperature.shape)}"
        )
    if temperature.device.type == "cpu" and not bool((temperature > 0).all()):  # elsewhere the look would be a wait
        raise ValueError(f"temperature: expected numbers above 0, got {float(temperature.min())}")
    return temperature.to(dtype=dtype, device=anchors.device).reshape(-1).expand(b)


def _check(image: Tensor, text: Tensor, extra_images: ExtraKeys | None, extra_texts: ExtraKeys | None) -> None:
    check_features(image, text)
    for name, extra in (("extra_image_keys", extra_images), ("extra_text_keys", extra_texts)):
        if extra is None:
            continue
        if extra.rows.ndim != 2 or extra.rows.shape[1] != image.shape[1]:
            raise ValueError(f"{name}: expected (M, {image.shape[1]}), got {tuple(extra.rows.shape)}")
        if extra.rows.requires_grad:
            raise ValueError(f"{name}: extra keys get no gradient; pass {name}.detach()")
        if (extra.ids is None) != (extra.anchor_ids is None):
            raise ValueError(f"{name}: expected ids of keys and of anchors, or neither")
        if extra.there is not None and (extra.ids is None or extra.same is None):
            raise ValueError(f"{name}.there: expected with ids, and with same, which counts what is not there")
        for of, found, n in (("ids", extra.ids, len(extra.rows)), ("anchor_ids", extra.anchor_ids, len(image))):
            if found is not None and (found.shape != (n,) or found.dtype != torch.int64):
                raise ValueError(f"{name}.{of}: expected ({n},) torch.int64, got {tuple(found.shape)} {found.dtype}")
