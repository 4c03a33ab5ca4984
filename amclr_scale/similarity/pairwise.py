"""Losses of single pairs: SigLIP's sigmoid over all B x B pairs.

Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023, arXiv:2303.15343.

    y_ij = 1 if i = j else -1;    r_ij = scale s_ij + bias;    loss_i = sum_j log(1 + exp(-y_ij r_ij))
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from amclr_scale.similarity.collectives import Negatives
from amclr_scale.similarity.rows import map_rows


def pairwise(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, *, negatives: Negatives = "all"
) -> Tensor:
    """Mean over this rank's images of the sigmoid losses against all ranks' texts: a tensor ()."""

    def rows(block: Tensor, positive: Tensor) -> tuple[Tensor, ...]:
        logits = logit_scale * block + logit_bias
        sign = torch.full_like(logits, -1).scatter(1, positive[:, None], 1)
        return (-F.logsigmoid(sign * logits).sum(1),)

    return map_rows(rows, image, text, negatives=negatives)[0].mean()
