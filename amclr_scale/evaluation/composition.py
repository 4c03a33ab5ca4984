"""Does a model read a caption's order and attributes? An image, its caption, and wrong captions made from it.

Yuksekgonul et al., "When and why vision-language models behave like bags-of-words, and what to do about it?", ICLR
2023, arXiv:2210.01936 (ARO, NegCLIP).

An image counts as right where its caption scores higher than every wrong one; ties count against the model, and scores
nearer than rounding (1e-6 in float32) are ties, as is any score beside one that is no number. Chance is the mean of
1 / (1 + number of wrong captions). Numbers are kept apart by what is wrong with the captions (order, attribute, ...).
"""

import torch
from torch import Tensor

from amclr_scale.evaluation.numbers import Number, number
from amclr_scale.evaluation.shares import gather_rows


@torch.no_grad()
def composition(
    image: Tensor, caption: Tensor, wrong: Tensor, *, sample_of_wrong: Tensor, kind_of_wrong: Tensor, kinds: list[str]
) -> dict[str, Number]:
    """Accuracy by kind of wrong caption. All ranks call it together.

    Args:
        image: (n_r, D), unit length: this rank's, numbered over ranks.
        caption: (n_r, D): the right caption of each.
        wrong: (m_r, D): wrong captions, of any rank's images.
        sample_of_wrong: (m_r,) int64, which image.
        kind_of_wrong: (m_r,) int64, positions in `kinds`.
    """
    images, captions = gather_rows(image), gather_rows(caption)
    everything, samples, of_kind = gather_rows(wrong), gather_rows(sample_of_wrong), gather_rows(kind_of_wrong)
    tolerance = 1e-12 if image.dtype == torch.float64 else 1e-6
    right = (images * captions).sum(1)
    beaten = torch.empty(len(everything), dtype=torch.bool, device=image.device)
    for rows in torch.split(torch.arange(len(everything), device=image.device), 1 << 16):
        lower = (images[samples[rows]] * everything[rows]).sum(1) < right[samples[rows]] - tolerance
        beaten[rows] = ~lower  # also where a score is nan
    numbers: dict[str, Number] = {}
    for place, kind in enumerate(kinds):
        mine = of_kind == place
        count = torch.bincount(samples[mine], minlength=len(images))
        lost = torch.bincount(samples[mine], weights=beaten[mine].double(), minlength=len(images))
        has = count > 0
        chance = float((1 / (1 + count[has].double())).mean())
        numbers[f"composition_{kind}"] = number((lost[has] == 0).double(), chance=chance)
    return numbers
