"""Losses of single pairs: SigLIP's sigmoid over all B x B pairs, in one pass.

Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023, arXiv:2303.15343.

b  images of this rank    B = b W  texts, over all ranks    D  width

    y_ij = 1 if i = j else -1        r_ij = scale s_ij + bias        loss = (1/b) sum_ij log(1 + exp(-y_ij r_ij))
    Q_ij = -(1/b) y_ij sigmoid(-y_ij r_ij)
    d image_i = scale sum_j Q_ij text_j,  d text_j = scale sum_i Q_ij image_i,  d scale = sum Q s,  d bias = sum Q

No number of a row or column has to be known before the weights Q, so forward makes loss and gradients together, 3
matrix products instead of 4, and backward only multiplies them by its upstream gradient. Similarities, logits and
gradients are float32 (float64 for float64 features), the sums of loss, scale and bias float64.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from amclr_scale.distributed.collectives import Group, Negatives, all_gather, check_even, group
from amclr_scale.distributed.first_order import first_order_only
from amclr_scale.similarity import settings
from amclr_scale.similarity.backends import blocks_for, check_features, similarity_dtype
from amclr_scale.similarity.blocks import Sigmoid
from amclr_scale.similarity.distribution import choose
from amclr_scale.similarity.keys import keys_of
from amclr_scale.similarity.settings import Distribution, Settings


def pairwise(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, *, negatives: Negatives = "all"
) -> Tensor:
    """The sigmoid loss: the mean over this rank's images of their sums over all ranks' texts.

    Args:
        image: (b, D), this rank's rows; every rank has as many.
        text: (b, D), row i is the positive of image row i.
        logit_scale: () or (1,), 1 / temperature; differentiable.
        logit_bias: () or (1,); differentiable.
        negatives: whose texts count: "all" ranks', "local", or those of a group of so many consecutive ranks.

    Returns:
        (), to be differentiated once, and with one factor on all ranks: its gradients are made with it.

    Raises:
        ValueError: shapes, types or devices that cannot be, or an uneven batch.
    """
    check_features(image, text)
    for name, x in (("logit_scale", logit_scale), ("logit_bias", logit_bias)):
        if x.numel() != 1:
            raise ValueError(f"{name}: expected one number, shape () or (1,), got {tuple(x.shape)}")
    ranks, now = group(negatives), settings.current()
    check_even(image.shape[0], image.shape[1], ranks)
    plan = _Plan(ranks, now, choose(now.distribution, ranks, len(image), image.device), torch.is_grad_enabled())
    loss = _Pairwise.apply(plan, image, text, logit_scale, logit_bias)  # type: ignore[no-untyped-call]
    return cast(Tensor, loss)


@dataclass(frozen=True)
class _Plan:
    ranks: Group
    settings: Settings
    distribution: Distribution
    will_differentiate: bool


class _Pairwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, *inputs: Tensor) -> Tensor:
        image, text, logit_scale, logit_bias = inputs
        dtype, first = similarity_dtype(image, text), plan.ranks.rank * len(image)
        need_image, need_text = (plan.will_differentiate and x.requires_grad for x in (image, text))
        both_at_once = plan.distribution == "reduce_scatter"
        scale, bias = logit_scale.detach().to(dtype).reshape(()), logit_bias.detach().to(dtype).reshape(())
        numbers, unused = (
            Sigmoid(scale, bias, *(torch.zeros((), dtype=torch.float64, device=image.device) for _ in range(3)))
            for _ in range(2)
        )
        d_image = torch.zeros_like(image, dtype=dtype) if need_image else None
        d_text = torch.zeros_like(text, dtype=dtype) if need_text and not both_at_once else None
        with torch.autocast(image.device.type, enabled=False):
            blocks = blocks_for(plan.settings, dtype, image, text)
            keys = keys_of(text, plan.ranks, plan.settings.gather)
            for block in keys.blocks(gradient=dtype if need_text and both_at_once else None):
                diagonal = block.diagonal(first)
                blocks.sigmoid(image, block.rows, numbers, d_anchors=d_image, d_keys=block.gradient, diagonal=diagonal)
            if d_text is not None:
                for block in keys_of(image, plan.ranks, plan.settings.gather).blocks():
                    blocks.sigmoid(text, block.rows, unused, d_anchors=d_text, diagonal=block.diagonal(first))
            d_text = keys.gradient if both_at_once else d_text
            for gradient in (d_image, d_text):
                if gradient is not None:
                    gradient.mul_(scale / len(image))
        ctx.ranks = plan.ranks
        ctx.inputs = [(x.dtype, x.shape) for x in inputs]
        ctx.gradients = [d_image, d_text, numbers.d_scale / len(image), numbers.d_bias / len(image)]
        return (numbers.loss / len(image)).to(dtype)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "pairwise: backward was called twice; the gradients were made in forward and handed over the first "
                "time, so call pairwise again"
            )
        scales = all_gather(upstream.reshape(1), ctx.ranks)
        if ctx.ranks.size > 1 and not bool((scales == upstream).all()):  # on one rank nobody has to be asked
            raise RuntimeError(
                f"pairwise: the losses of ranks were scaled differently, by {', '.join(map(str, scales.tolist()))}; "
                "gradients were made for one common factor, so scale all losses alike"
            )
        gradients, ctx.gradients = ctx.gradients, None  # the only reference: autograd need not copy what it is given
        return None, *(
            gradient.mul_(upstream).to(dtype).reshape(shape) if needed and gradient is not None else None
            for gradient, needed, (dtype, shape) in zip(gradients, ctx.needs_input_grad[1:], ctx.inputs, strict=True)
        )
