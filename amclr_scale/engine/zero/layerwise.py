"""Optimizers that look at whole layers or rows, made right on ZeRO's flat shards.

LAMB   You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", ICLR 2020,
       arXiv:1904.00962.
LARS   You et al., "Large Batch Training of Convolutional Networks", 2017, arXiv:1708.03888.
AdamP  Heo et al., "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights", ICLR 2021,
       arXiv:2006.08217.

Weight decay is decoupled, as in every other rule here, so that one value of `optimizer.weight_decay` means one thing:
p <- (1 - lr decay) p, then the step. LAMB's and LARS's papers add decay p to what is rescaled, where the norms decide
how much of it is left; timm calls LAMB with decoupled decay LAMBW.

ZeRO hands an optimizer one flat tensor per group, this rank's part of all its parameters laid end to end. A norm taken
over that is no layer's norm, and AdamP's projection, which needs rows, never runs: nothing raises, the weights are
just wrong. So these optimizers are told where the pieces of each parameter lie (`Shard`), sum what they need row by
row, add the sums over ranks in one all-reduce per step and tensor, and every rank then takes the same decision.
Without shards (stage 0) each tensor is a parameter of its own and nothing is reduced.

R  rows of a parameter (its first dimension)    C  columns (all other dimensions together)
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from amclr_scale.engine.zero.flat_shards import Piece, Shard, shards_of


class LayerwiseOptimizer(torch.optim.Optimizer):
    """Base: walks over tensors, sums over rows and ranks. Subclasses say what to sum and what to do with it.

    Attributes:
        shards: by id of the flat tensor; tensors that are not in it are whole parameters.
        device: where sums are added over ranks (NCCL needs the GPU even when states are offloaded to the CPU).
    """

    def __init__(self, params: Any, **defaults: Any):
        super().__init__(params, defaults)
        self.shards: dict[int, Shard] = {}
        self.device: torch.device | None = None

    def rows(self, shape: torch.Size) -> int:
        """Rows that a parameter is summed in."""
        return 1

    def update(self, p: Tensor, group: dict[str, Any], sums: "Callable[..., RowSums]") -> None:
        """Change p in place. `sums(a, b)` gives the row sums of a * b over all ranks' pieces."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step every tensor that has a gradient. All ranks call it together."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                shard = self.shards.get(id(p))
                whole = Shard((p.shape,), (Piece(0, 0, 0, p.numel()),))
                layout = Layout(shard or whole, self.rows, reduced=shard is not None, device=self.device or p.device)
                self.update(p, group, layout.sums)
        return loss


class Layout:
    """Row sums over the pieces of a tensor, added over ranks."""

    def __init__(self, shard: Shard, rows: Callable[[torch.Size], int], *, reduced: bool, device: torch.device):
        self.shard, self.reduced, self.device = shard, reduced, device
        self.rows = [rows(shape) for shape in shard.shapes]
        self.columns = [math.prod(shape) // max(1, r) for shape, r in zip(shard.shapes, self.rows, strict=True)]
        self.begin = [sum(self.rows[:i]) for i in range(len(self.rows))]

    def _spread(self, piece: Piece) -> tuple[int, int, int]:
        """First row of a piece, number of rows it touches, and its place in the first of them."""
        columns = self.columns[piece.parameter]
        first, inside = divmod(piece.offset, columns)
        return first, -(-(inside + piece.numel) // columns), inside

    def pieces(self) -> Iterator[tuple[Piece, int]]:
        """The pieces that are summed, with the place of their parameter's first row among all rows."""
        return ((p, self.begin[p.parameter]) for p in self.shard.pieces if self.rows[p.parameter])

    def sums(self, *pairs: tuple[Tensor, Tensor]) -> "RowSums":
        """Row sums of a * b for each pair of tensors shaped like the flat tensor, in one all-reduce."""
        total = pairs[0][0].new_zeros(len(pairs), sum(self.rows))
        for row, (a, b) in enumerate(pairs):
            flat = (a * b).flatten()
            for piece, begin in self.pieces():
                first, count, inside = self._spread(piece)
                padded = flat.new_zeros(count * self.columns[piece.parameter])
                padded[inside : inside + piece.numel] = flat[piece.start : piece.start + piece.numel]
                total[row, begin + first : begin + first + count] += padded.view(count, -1).sum(1)
        if self.reduced:
            travelling = total.to(self.device)
            dist.all_reduce(travelling)
            total.copy_(travelling)
        return RowSums(self, total)


@dataclass(frozen=True)
class RowSums:
    """One number per pair and row, the same on every rank."""

    layout: Layout
    values: Tensor  # (pairs, rows of all parameters)

    def per_parameter(self) -> list[Tensor]:
        """(pairs, R) of each parameter."""
        return list(self.values.split(self.layout.rows, dim=1))

    def spread(self, factors: list[Tensor], like: Tensor, otherwise: float) -> Tensor:
        """Elements shaped like the flat tensor from one factor per row; `otherwise` where no row is summed.

        Args:
            factors: for each parameter (R,) or (1,).
        """
        layout, out = self.layout, torch.full_like(like, otherwise)
        flat = out.view(-1)
        for piece, _ in layout.pieces():
            first, count, inside = layout._spread(piece)
            rows = factors[piece.parameter].expand(layout.rows[piece.parameter])[first : first + count]
            each = rows.repeat_interleave(layout.columns[piece.parameter])
            flat[piece.start : piece.start + piece.numel] = each[inside : inside + piece.numel]
        return out


def _adam_moments(
    state: dict[str, Any], grad: Tensor | None, betas: tuple[float, float], eps: float
) -> tuple[Tensor, Tensor]:
    """Adam's bias-corrected first moment and its denominator, after this gradient."""
    assert grad is not None  # tensors without one are passed over in step()
    if not state:
        state.update(step=0, exp_avg=torch.zeros_like(grad), exp_avg_sq=torch.zeros_like(grad))
    state["step"] += 1
    state["exp_avg"].lerp_(grad, 1 - betas[0])
    state["exp_avg_sq"].mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    moment = state["exp_avg"] / (1 - betas[0] ** state["step"])
    return moment, (state["exp_avg_sq"] / (1 - betas[1] ** state["step"])).sqrt_().add_(eps)


def _trust_ratio(weight: Tensor, update: Tensor, coefficient: float = 1.0) -> Tensor:
    """|w| / |u| times the coefficient, and 1 where either is zero. Both are squared norms, (R,)."""
    ratio = coefficient * weight.sqrt() / update.sqrt()  # their quotient may be too large for a float where this is not
    return torch.where((weight > 0) & (update > 0), ratio, torch.ones_like(weight))


class LAMB(LayerwiseOptimizer):
    """Adam's update of each layer, rescaled to the norm of its weights where its group says `layerwise`."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, layerwise=True)

    def update(self, p: Tensor, group: dict[str, Any], sums: Callable[..., RowSums]) -> None:
        moment, denominator = _adam_moments(self.state[p], p.grad, group["betas"], group["eps"])
        change = moment.div_(denominator)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        if group["layerwise"]:
            squares = sums((p, p), (change, change))
            change *= squares.spread([_trust_ratio(w, u) for w, u in squares.per_parameter()], change, 1.0)
        p.add_(change, alpha=-group["lr"])


class LARS(LayerwiseOptimizer):
    """Momentum SGD, each layer's gradient scaled by trust |w| / |g| where its group says `layerwise`."""

    def __init__(
        self, params: Any, lr: float, momentum: float, weight_decay: float = 0.0, trust_coefficient: float = 1e-3
    ):
        super().__init__(
            params, lr=lr, momentum=momentum, weight_decay=weight_decay, trust_coefficient=trust_coefficient,
            layerwise=True,
        )  # fmt: skip

    def update(self, p: Tensor, group: dict[str, Any], sums: Callable[..., RowSums]) -> None:
        assert p.grad is not None  # tensors without one are passed over in step()
        change = p.grad
        p.mul_(1 - group["lr"] * group["weight_decay"])
        if group["layerwise"]:
            squares = sums((p, p), (change, change))
            trust = group["trust_coefficient"]
            ratios = [_trust_ratio(w, g, trust) for w, g in squares.per_parameter()]
            change = change * squares.spread(ratios, change, 1.0)
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        state["momentum_buffer"].mul_(group["momentum"]).add_(change)
        p.add_(state["momentum_buffer"], alpha=-group["lr"])


class AdamP(LayerwiseOptimizer):
    """Adam without the part of its update that only lengthens scale-invariant weights.

    A parameter of two or more dimensions is taken as scale-invariant, row by row or as a whole, where the gradient is
    nearly orthogonal to the weights: |cos| < delta / sqrt(C). Its update is projected and its weight decay multiplied
    by `wd_ratio`.
    """

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0,
        delta: float = 0.1, wd_ratio: float = 0.1, nesterov: bool = False,
    ):  # fmt: skip
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            delta=delta,
            wd_ratio=wd_ratio,
            nesterov=nesterov,
        )

    def rows(self, shape: torch.Size) -> int:
        return shape[0] if len(shape) > 1 else 0

    def update(self, p: Tensor, group: dict[str, Any], sums: Callable[..., RowSums]) -> None:
        beta, eps, state = group["betas"][0], group["eps"], self.state[p]
        moment, denominator = _adam_moments(state, p.grad, group["betas"], eps)
        if group["nesterov"]:
            moment = (beta * state["exp_avg"] + (1 - beta) * p.grad) / (1 - beta ** state["step"])
        change = moment.div_(denominator)

        found = sums((p, p), (p.grad, p.grad), (p, p.grad), (p, change))
        decided = [
            self._decide(s, math.prod(shape), group)
            for s, shape in zip(found.per_parameter(), found.layout.shard.shapes, strict=True)
        ]
        change -= p * found.spread([radial for radial, _ in decided], change, 0.0)
        if group["weight_decay"]:
            decay = found.spread([ratio for _, ratio in decided], change, 1.0)
            p.mul_(1 - group["lr"] * group["weight_decay"] * decay)
        p.add_(change, alpha=-group["lr"])

    @staticmethod
    def _decide(sums: Tensor, numel: int, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """What multiplies the weights in the projection, per row, and the weight decay's factor, (1,)."""
        delta, eps = group["delta"], group["eps"]
        if not sums.shape[1]:  # one dimension: never projected
            return sums.new_zeros(1), sums.new_ones(1)

        def invariant(s: Tensor, columns: float) -> tuple[Tensor, Tensor]:
            weight, gradient, both, change = s
            cosine = both.abs() / (weight.sqrt().clamp(min=eps) * gradient.sqrt().clamp(min=eps))
            return cosine.max() < delta / math.sqrt(columns), change / (weight.sqrt() + eps) ** 2

        by_row, row_radial = invariant(sums, numel / sums.shape[1])
        as_whole, whole_radial = invariant(sums.sum(1, keepdim=True), numel)
        radial = torch.where(
            by_row, row_radial, torch.where(as_whole, whole_radial.expand_as(row_radial), torch.zeros_like(row_radial))
        )
        return radial, torch.where(by_row | as_whole, group["wd_ratio"], 1.0).to(sums).view(1)


def attach(optimizer: torch.optim.Optimizer, zero: Any, stage: int, device: torch.device) -> None:
    """Tell a `LayerwiseOptimizer` where ZeRO put the pieces of each parameter. Call it once after initialization.

    Args:
        optimizer: the one given to DeepSpeed.
        zero: `engine.optimizer`, ZeRO's wrapper around it.
        stage: ZeRO stage, 0 to 3.
        device: the engine's.
    """
    if not isinstance(optimizer, LayerwiseOptimizer) or stage == 0:
        return
    optimizer.device = device
    optimizer.shards = {id(flat): shard for flat, _, shard in shards_of(zero, stage)}
