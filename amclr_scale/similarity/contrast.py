"""The differentiable primitive: log-sums of similarities with all ranks' keys, in both directions."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from amclr_scale.similarity.collectives import Negatives, check_even, gather, group

Temperature = float | Tensor


@dataclass(frozen=True)
class Side:
    """One direction; tensors over this rank's anchors."""

    log_sum: Tensor  # (b,) log sum_{j in N_i} exp((s_ij - c_i) / t_i), differentiable in anchors, keys, temperature
    positive: Tensor  # (b,) s_ii, differentiable
    expected: Tensor  # (b,) E_i = sum_j p_ij x_ij, detached
    num_keys: int  # |N_i|


@dataclass(frozen=True)
class Contrast:
    """Both directions."""

    image: Side  # anchors: the first argument's rows; keys: the second's
    text: Side

    @property
    def num_keys(self) -> int:
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
    """Contrast each image with all texts, and each text with all images."""
    ranks = group(negatives)
    check_even(len(image), image.shape[1], ranks)
    image_temperature, text_temperature = temperature if isinstance(temperature, tuple) else (temperature, temperature)

    def side(anchors: Tensor, keys: Tensor, temperature: Temperature, extra: Tensor | None) -> Side:
        dtype = torch.promote_types(torch.promote_types(image.dtype, text.dtype), torch.float32)
        keys = gather(keys, ranks)
        if extra is not None:
            keys = torch.cat([keys, extra.detach().to(keys.dtype)])
        s = anchors.to(dtype) @ keys.to(dtype).T
        own = torch.arange(len(anchors), device=s.device)[:, None] + ranks.rank * len(anchors)
        positive = s.gather(1, own)
        t = temperature.to(dtype).reshape(-1, 1) if isinstance(temperature, Tensor) else temperature
        x = (s - positive if centred else s) / t
        masked = x.scatter(1, own, -math.inf) if exclude_positive else x
        log_sum = masked.logsumexp(1)
        p = (masked - log_sum[:, None]).exp()
        return Side(log_sum, positive[:, 0], (p * x).sum(1).detach(), s.shape[1] - exclude_positive)

    return Contrast(
        side(image, text, image_temperature, extra_text_keys), side(text, image, text_temperature, extra_image_keys)
    )
