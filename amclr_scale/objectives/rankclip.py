"""RankCLIP: lists of similarities are ordered alike, inside the modalities and between them.

Zhang et al., "RankCLIP: Ranking-Consistent Language-Image Pretraining", ICCV 2025, arXiv:2404.09387.

With pi the order of row i of `true`, from large to small, x = scale times a row of `pred`:

    ListMLE(pred, true) = mean_i sum_k [ log sum_{l >= k} exp(x_pi(l)) - x_pi(k) ]
    value = CLIP + w / (32 B) ( ListMLE(ZZ^T, TT^T) + ListMLE(TT^T, ZZ^T) + ListMLE(S, S^T) + ListMLE(S^T, S) )
    w     = min(3 e / (ramp_epochs - 1), weight) in epoch e = 0, 1, ...                     constant without a ramp

The gradient goes to what is ordered, not to what gives the order.

Numerics: a block of rows at a time, once; ties of the order go by position. Sums of tails are float64, relative to the
row's largest, or logcumsumexp in float32 where they would span too much for that (t below 0.003) and on accelerators.
"""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from amclr_scale.distributed.first_order import first_order_only
from amclr_scale.objectives.base import (
    Objective,
    at_least_float32,
    beside,
    global_batch_size,
    learned_temperature,
    numbers,
    require,
)
from amclr_scale.objectives.clip import check_temperature, softmax_loss
from amclr_scale.objectives.masking import MaskOptions
from amclr_scale.similarity import contrast, mean_rows
from amclr_scale.types import Embeddings, Loss

WIDEST = 600.0  # a row of logits, for exp in float64
PIECE = 2**17  # entries of some rows: what is made of them stays in a cache
FEW_THREADS = 2  # with more, torch sorts rows side by side
OF_FOUR = 32.0  # what the authors divide the four lists' sum by, beside the batch


class RankCLIP(Objective, name="rankclip"):
    """CLIP with a list-wise loss that makes the order of similarities the same in both modalities."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MaskOptions):
        """Options of `rankclip`."""

        temperature: float | None = None  # fixed; null: learned, 1 / logit_scale
        weight: float = 2.0  # of the lists' part, at most
        ramp_epochs: float | None = None  # epochs over whose first two thirds it grows; null: constant

        def __post_init__(self) -> None:
            super().__post_init__()
            check_temperature(self.temperature)
            require(self.weight >= 0, "weight", "a weight of at least 0", self.weight)
            ramp = self.ramp_epochs
            require(ramp is None or ramp > 1, "ramp_epochs", "more than 1 epoch, or null", ramp)

    config: Config

    def forward(self, embeddings: Embeddings) -> Loss:
        config = self.config
        image, text = at_least_float32(embeddings.image), at_least_float32(embeddings.text)
        t, masks = learned_temperature(embeddings, config.temperature), self.masks(embeddings).of()
        clip = softmax_loss(contrast(image, text, temperature=t, centred=True, **masks))
        inside, between = (list_mle((image, text), keys, t) for keys in ((image, text), (text, image)))
        ranks = (inside + between) / (OF_FOUR * global_batch_size(image))
        weight = config.weight
        if config.ramp_epochs is not None:
            weight = min(3 * math.floor(self.epoch) / (config.ramp_epochs - 1), weight)
        loss = clip + weight * ranks
        return Loss(loss, numbers(objective=loss, clip=clip, ranks=ranks, weight=weight, temperature=t))


def list_mle(anchors: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor], t: Tensor | float) -> Tensor:
    """Of two lists a.k of every row, that of the one in the order of the other, and the other way round: their sum.

    The lists have all ranks' keys, and are divided by the temperature; the mean over this rank's rows.
    """

    def rows(one: Tensor, other: Tensor, own: Tensor, scale: Tensor) -> Tensor:
        pairs = ((one, other.detach()), (other, one.detach()))
        losses = [cast(Tensor, _ListMLE.apply(*pair, scale)) for pair in pairs]  # type: ignore[no-untyped-call]
        return losses[0] + losses[1]

    return mean_rows(rows, anchors, keys, shared=(beside(1 / t, anchors[0]),))


class _ListMLE(torch.autograd.Function):
    """(s (c, B), what gives their order (c, B), 1 / t) -> the loss of each row (c,); some rows at a time."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, true: Tensor, scale: Tensor) -> Tensor:
        found, of_scale, gradient = s.new_empty(len(s)), s.new_empty(len(s)), torch.empty_like(s)
        size = max(1, PIECE // s.shape[1]) if s.device.type == "cpu" else len(s)
        for start in range(0, len(s), size):
            here = slice(start, start + size)
            places = ascending(true[here])
            x = s[here].gather(1, places).mul_(scale)
            found[here], d_x = _tails(x)
            of_scale[here] = torch.linalg.vecdot(d_x, x) / scale
            gradient[here].scatter_(1, places, d_x.mul_(scale))
        ctx.save_for_backward(gradient, of_scale, scale)
        return found

    @staticmethod
    @first_order_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient, of_scale, scale = ctx.saved_tensors
        return upstream[:, None] * gradient, None, (upstream * of_scale).sum().reshape(scale.shape)


def _tails(x: Tensor) -> tuple[Tensor, Tensor]:
    """(c, B), each row from its end to its beginning -> sum_k log sum_{l <= k} exp(x_l) - x_k, and its gradient."""
    most = x.amax(1, keepdim=True)
    if x.device.type == "cpu" and bool((most - x).max() < WIDEST):  # elsewhere the look would be a wait
        e = (x - most).double().exp_()
        sums = e.cumsum(1)
        found = (sums.log().sum(1) + (most - x).sum(1, dtype=torch.float64)).to(x.dtype)
        ahead = sums.reciprocal_().flip(1).cumsum(1).flip(1)  # sum_{k >= l} 1 / sums_k
        return found, ahead.mul_(e).sub_(1).to(x.dtype)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        found = (leaf.logcumsumexp(1) - leaf).sum(1)
        (gradient,) = torch.autograd.grad(found.sum(), leaf)
    return found.detach(), gradient


def ascending(rows: Tensor) -> Tensor:
    """Where the entries of each row are, from its smallest to its largest; of equal ones the last one first."""
    n = rows.shape[1]
    if rows.dtype != torch.float32 or rows.device.type != "cpu" or torch.get_num_threads() > FEW_THREADS:
        return rows.argsort(stable=True, dim=1, descending=True).flip(1)
    # The entry as an integer of the same order, and its place below: numpy sorts these with vector instructions, in a
    # third of the time that torch takes to sort places along.
    bits = (rows + 0.0).view(torch.int32)  # no negative zero
    keys = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32) + torch.arange(n - 1, -1, -1)
    keys.numpy().sort(axis=1)
    return (n - 1) - (keys & 0xFFFFFFFF)
