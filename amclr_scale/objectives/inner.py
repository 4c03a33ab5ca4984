"""Weights that an objective trains itself: several steps of an own rule in each step of training, on any ranks.

What the optimizer trains beside the towers are `model_parts`, one step per batch. A method that alternates, some steps
for a small network on features that are held, then one for the towers, keeps its network here: it is state of the
objective, as tables and banks are. So it needs nothing of the engine, is the same at every stage of ZeRO and under the
gradient cache, waits until the optimizer has applied the step (staging.py), and is saved, resumed and accounted with
the rest of the state. Every rank holds all of it; gradients of inner steps are averaged over ranks, one exchange of
all weights per inner step, so that ranks agree to the bit.

Numerics: float32, float64 where embeddings are; a step that would leave a weight that is not finite is not taken.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from amclr_scale.distributed.purpose import purpose
from amclr_scale.objectives.base import FullPrecision
from amclr_scale.objectives.sample_state import STATE
from amclr_scale.objectives.staging import when_applied
from amclr_scale.similarity import all_sum, world_size

Shapes = Mapping[str, tuple[int, ...]]
Weights = dict[str, Tensor]  # by name, in their shapes

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # Adam's
ADAGRAD_EPS = 1e-10


class Inner(FullPrecision):
    """Weights, as one flat buffer, beside what their rule remembers; made when the width is known.

    Attributes:
        width: D; 0 before anything was made.
        counts: plain numbers that every rank counts alike, saved with the weights.
        weights, squares: (P,), of all weights; further buffers by their names.
    """

    weights: Tensor
    squares: Tensor
    average: Tensor

    def __init__(self, shapes: Callable[[int], Shapes], buffers: tuple[str, ...], counts: tuple[str, ...]) -> None:
        """Nothing yet.

        Args:
            shapes: D -> shapes of the weights.
            buffers: what there is of the size of all weights; `weights` among them.
            counts: names of the plain numbers, 0 at first.
        """
        super().__init__()
        self.shapes_of, self.buffers_held = shapes, buffers
        self.width, self.counts = 0, dict.fromkeys(counts, 0)

    def make(self, width: int, device: torch.device | None = None) -> None:
        """Allocate for embeddings of this width; all zeros."""
        self.width = width
        size = sum(math.prod(shape) for shape in self.shapes_of(width).values())
        for name in self.buffers_held:
            self.register_buffer(name, torch.zeros(size, device=device))

    def ready(self, features: Tensor) -> None:
        """Be as precise as these features."""
        if features.dtype == torch.float64:
            for name in self.buffers_held:
                setattr(self, name, getattr(self, name).double())

    def shaped(self, flat: Tensor) -> Weights:
        """A flat tensor of all weights, by name."""
        shapes = self.shapes_of(self.width)
        pieces = flat.split([math.prod(shape) for shape in shapes.values()])
        return {name: x.view(shape) for (name, shape), x in zip(shapes.items(), pieces, strict=True)}

    def flat(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The reverse of `shaped`."""
        return torch.cat([weights[name].flatten() for name in self.shapes_of(self.width)])

    def gradient(self, loss: Callable[[Weights], Tensor], at: Tensor) -> Tensor:
        """Of the mean over ranks of `loss`, with respect to all weights; no further gradient.

        Args:
            loss: weights by name -> this rank's mean over its own rows.
            at: the weights, flat.
        """
        with torch.enable_grad():
            leaf = at.detach().requires_grad_()
            (found,) = torch.autograd.grad(loss(self.shaped(leaf)), leaf)
        return self.averaged(found)

    @purpose(STATE)
    @torch.no_grad()
    def averaged(self, gradient: Tensor) -> Tensor:
        """Over ranks: a gradient of all weights, flat."""
        return all_sum(gradient) / world_size()

    def keep(self, counts: Mapping[str, int], **buffers: Tensor) -> None:
        """What to go on from, once the step has been applied."""
        now = dict(counts)

        @torch.no_grad()
        def write() -> None:
            if not torch.stack([x.isfinite().all() for x in buffers.values()]).all():
                return
            self.counts |= now
            for name, new in buffers.items():
                table: Tensor = getattr(self, name)
                table.copy_(new)

        when_applied(write)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, count in {"width": self.width, **self.counts}.items():
            destination[prefix + name] = torch.tensor(count)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *rest: Any) -> None:
        plain = {name: state_dict[prefix + name] for name in ("width", *self.counts) if prefix + name in state_dict}
        width = int(plain.pop("width", torch.tensor(self.width)))
        if width and not self.width:
            self.make(width)
        self.counts |= {name: int(x) for name, x in plain.items()}
        tensors = dict(state_dict)
        for name in ("width", *self.counts):
            tensors.pop(prefix + name, None)
        for name in self.buffers_held if self.width else ():
            saved = tensors.get(prefix + name)
            if saved is not None and saved.dtype == torch.float64:
                setattr(self, name, getattr(self, name).double())
        super()._load_from_state_dict(tensors, prefix, *rest)


def adam(weights: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: int, lr: float) -> tuple[Tensor, ...]:
    """One step: the next weights and moments; `step` counts from 1."""
    first = BETA1 * first + (1 - BETA1) * gradient
    second = BETA2 * second + (1 - BETA2) * gradient.square()
    size = (second / (1 - BETA2**step)).sqrt() + EPS
    return weights - lr * (first / (1 - BETA1**step)) / size, first, second


def adagrad(weights: Tensor, gradient: Tensor, squares: Tensor, lr: float) -> tuple[Tensor, Tensor]:
    """One step: the next weights and sum of squares."""
    squares = squares + gradient.square()
    return weights - lr * gradient / (squares.sqrt() + ADAGRAD_EPS), squares
